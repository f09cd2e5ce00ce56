"""The studio's folder HOME: scenes, runs, jobs and trash. Nothing else holds state.

HOME/scenes/NAME/      as `bas masks` and `bas train` read it; draft.json while a concept has no pixels yet
HOME/runs/NAME/        as `bas train` writes it; pictures/ edits/ exports/ of the studio
HOME/jobs/STAMP-KIND-NAME/    what was asked, and what became of it (jobs.py)
HOME/trash/STAMP-NAME/        what was deleted, and in was.json where it was
"""

import os
import re
import shutil
import time
from pathlib import Path

from bas.errors import InputError
from bas.io.json_files import read_json, write_json
from bas.web.studio import own
from bas.web.studio.refusal import Refusal, missing

SCENES, RUNS, JOBS, TRASH = "scenes", "runs", "jobs", "trash"
WAS = "was.json"  # beside what was deleted: where it was
NAME = re.compile(r"[^\W_](?:[\w .()-]{0,78}[\w()-])?")  # of a scene, a run or a job: no slash, no dot at the ends
NAME_RULE = "a name begins with a letter or digit, and has up to 80 letters, digits, spaces and _ . - ( )"
MOST_NAMED = 10  # folders in one line
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)  # files that Windows does not make
UNTIDY = re.compile(r"[^\w ()-]+")


class Home:
    """The folder, and safe ways into it.

    segmenters: folders of segmentation models that were named at the start, by their method
    """

    def __init__(self, folder: Path, segmenters: dict[str, str] | None = None):
        self.folder = folder.resolve()
        self.segmenters = segmenters or {}

    def make(self) -> None:
        """Make the folders. InputError where that is not possible."""
        try:
            for name in (SCENES, RUNS, JOBS, TRASH):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot hold the studio: {error.strerror}") from None

    def token(self) -> str:
        """Return the secret part of the address."""
        return own.token(self.folder)

    def names(self, kind: str) -> list[str]:
        """Return the folders of one kind, those changed last first."""
        place = self.folder / kind
        found = [entry for entry in os.scandir(place) if entry.is_dir() and NAME.fullmatch(entry.name)]
        return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)]

    def unnamed(self) -> str | None:
        """List the folders of scenes and runs that have other names, and say what to do. None if there is none."""
        found = [
            f"{kind}/{entry.name}"
            for kind in (SCENES, RUNS)
            for entry in os.scandir(self.folder / kind)
            if entry.is_dir() and not (NAME.fullmatch(entry.name) or entry.name.startswith("."))
        ]
        named = ", ".join(sorted(found)[:MOST_NAMED]) + (" and more" if len(found) > MOST_NAMED else "")
        return f"Rename {named}: {NAME_RULE}." if found else None

    def find(self, kind: str, name: str) -> Path:
        """Return the folder of a scene, a run or a job. Refusal for a name that is none, or that leads out of HOME."""
        path = self.folder / kind / name
        if not NAME.fullmatch(name) or not path.is_dir() or not inside(path, self.folder / kind):
            raise missing(f"{kind.removesuffix('s')} {name!r:.90}")
        return path

    def free_name(self, kind: str, wanted: str) -> str:
        """Return a name that is not taken: the wanted one, tidied, or with a number behind it."""
        tidy = UNTIDY.sub(" ", wanted).strip(" _()-")[:60].strip() or kind[:-1]
        tidy = f"{tidy} 1" if DEVICES.fullmatch(tidy) else tidy
        taken = {entry.name.lower() for entry in os.scandir(self.folder / kind)}
        numbered = (f"{tidy}-{i}" for i in range(2, 100_000))
        return next(name for name in (tidy, *numbered) if name.lower() not in taken)

    def make_folder(self, kind: str, wanted: str) -> Path:
        """Make a new folder with a free name. Of two requests at once each gets its own."""
        while True:
            folder = self.folder / kind / self.free_name(kind, wanted)
            try:
                folder.mkdir()
            except FileExistsError:  # another request has just made it
                continue
            return folder

    def trash(self, path: Path) -> str:
        """Move what is deleted to HOME/trash, with a note of where it was. Returns the name that it has there."""
        place = self.make_folder(TRASH, f"{stamp()}-{path.name}")
        write_json(place / WAS, {"was": path.relative_to(self.folder).as_posix()})
        shutil.move(path, place / path.name)
        return place.name

    def deleted(self) -> list[dict[str, str]]:
        """List what can be restored from the trash, deleted last first: its name there, and where it was."""
        found = sorted((self.folder / TRASH).iterdir(), key=lambda place: place.name, reverse=True)
        return [{"name": place.name, "was": was} for place in found if (was := where_it_was(place))]

    def restore(self, name: str) -> str:
        """Move something from the trash back to where it was. Returns that place.

        Refusal if something else is there by now, or if an image's run is gone.
        """
        place = self.find(TRASH, name)
        was = where_it_was(place)
        if was is None:
            raise missing("what was deleted")
        path = self.folder / was
        if path.exists():
            raise Refusal(409, f"{was} is there again: delete or rename that first", "taken")
        if not path.parent.is_dir() or not inside(path.parent, self.folder):
            raise Refusal(409, f"{Path(was).parent.as_posix()} is not here any more: restore that first", "missing")
        shutil.move(place / path.name, path)
        shutil.rmtree(place)
        return was


def where_it_was(place: Path) -> str | None:
    """Return the path in HOME of what a trash folder holds. None if its note or the thing itself is missing."""
    try:
        was = read_json(place / WAS)["was"]
    except (InputError, KeyError, TypeError):
        return None
    if not isinstance(was, str):
        return None
    kind, *parts = was.split("/")
    known = kind in (SCENES, RUNS) and parts and not any(part in ("", ".", "..") or "\\" in part for part in parts)
    return was if known and (place / parts[-1]).exists() else None


def inside(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a folder, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def file_inside(folder: Path, name: str) -> Path:
    """Return an ordinary file in a folder, by its path from there. Refusal for anything else."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") or part.startswith(".") or "\\" in part for part in parts):
        raise missing("the file")
    path = folder.joinpath(*parts)
    if not path.is_file() or not inside(path, folder):
        raise missing("the file")
    return path


def stamp() -> str:
    """Return the time as part of a name, in order: 20250131-235959"""
    return time.strftime("%Y%m%d-%H%M%S")


def text_of(body: dict, key: str, most: int = 2000) -> str:
    """Return a text of a request. Refusal for anything else."""
    value = body.get(key)
    if not isinstance(value, str) or len(value) > most:
        raise Refusal(400, f"{key} is not a text of {most} characters or fewer", "bad", key)
    return value
