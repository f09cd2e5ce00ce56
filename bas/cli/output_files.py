"""Where the images of a command go: numbered files, or the folder of a gallery."""

import argparse
import logging
from pathlib import Path

from bas.cli.flags import Parser
from bas.errors import InputError
from bas.io.files import new_folder
from bas.io.images import image_path, numbered_paths
from bas.io.run_files import SETTINGS
from bas.sampling.gallery import FIRST_IMAGE, GRID

log = logging.getLogger(__name__)

NAMED = 6  # files that a warning names at most


def add_output_path(parser: Parser, default: str) -> None:
    """Declare --output_path of a command that writes images."""
    text = "image to write, .png, .jpg or .webp; several are numbered (default: %(default)s)"
    parser.add_argument("--output_path", metavar="FILE", default=default, help=text)


def check_output_path(name: str, count: int, *inputs: Path | None) -> Path:
    """Return the path under which `count` images are saved. `warn_of_replacement` follows when all is checked.

    InputError for a path that cannot be an image, and for one that the command reads.
    """
    target = image_path(name)
    for path in numbered_paths(target, count):
        if path.is_dir():
            raise InputError(f"--output_path {name}: {path} is in the way")
        if path.exists() and any(each and each.exists() and path.samefile(each) for each in inputs):
            raise InputError(f"--output_path {path} is an input of this command: name another file")
    return target


def warn_of_replacement(paths: list[Path], advice: str = "name another file") -> None:
    """Warn of files that exist and will be replaced. advice: how to keep them"""
    if replaced := [path for path in paths if path.exists()]:
        names = ", ".join([str(replaced[0]), *(path.name for path in replaced[1:NAMED])])
        more = f" and {len(replaced) - NAMED} more" if len(replaced) > NAMED else ""
        log.warning("%s%s will be replaced; %s to keep %s", names, more, advice, "them" if replaced[1:] else "it")


def add_gallery(parser: Parser, name: str) -> None:
    """Declare --output_dir of a command that generates a gallery."""
    text = f"new folder to write (default: RUN/{name}, which the run's report shows; {name} for other models)"
    parser.add_argument("--output_dir", metavar="DIR", help=text)


def gallery_folder(args: argparse.Namespace, model: Path, name: str) -> Path:
    """Return the new folder of a gallery: the one that is named, else one in the run."""
    folder = Path(args.output_dir or (model / name if (model / SETTINGS).is_file() else name))
    if (folder / FIRST_IMAGE).exists() and not (folder / GRID).exists():
        found = f"--output_dir {folder} holds images of a gallery that was not finished"
        raise InputError(f"{found}: move the folder away or remove it, or name a new one")
    return new_folder(str(folder))


def print_gallery(grid: Path) -> None:
    """Print the path of the grid, and of the run's report, which now shows it."""
    from bas.web.report import renew_report  # here: other commands need no template engine

    print(grid)
    if page := renew_report(grid.parent):
        print(page)
