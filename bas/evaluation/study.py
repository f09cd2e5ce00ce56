"""The pages of a user study (Break-A-Scene, appendix): is it the same thing, and does the picture show the text?

A page is one file that needs no server. It shows picture by picture, from all methods alike and in random order, the
thing cut out of the input, the generated picture and its text, and asks for two marks from 1 to 5. Which method drew a
picture stands in key.json alone, which stays with whoever runs the study; ratings.py reads both.
"""

import hashlib
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bas import __version__
from bas.config import StudyConfig
from bas.errors import InputError
from bas.evaluation.masking import blacken
from bas.evaluation.metrics import in_words
from bas.evaluation.protocol import RUN, TRIAL, TRIALS
from bas.evaluation.scores import NAMELESS
from bas.io.files import read_json, write_json, write_text
from bas.io.images import read_image, read_mask
from bas.training.preview import SCENE
from bas.web.report import data_uri, embedded_json, escape

TEMPLATE = Path(__file__).parents[1] / "web" / "templates" / "study.html"
KEY = "key.json"
SIDE = 512  # pixels of a picture on a page
MARGIN = 0.06  # around a cut-out thing, as a share of its larger side
EVALUATED = f"{TRIALS}/*/*/seed-*/{TRIAL}"  # what `bas evaluate` leaves
METHOD = "bas"  # whose trials hold the photograph as it is: the baselines train on pictures pasted together
FIELDS = ("method", "scene", "prompt", "word", "picture", "reference", "mask")  # of a line in a list of pictures


@dataclass(frozen=True)
class Item:
    """One generated picture, and one thing that it should show."""

    method: str
    scene: str
    prompt: str  # in words
    word: str  # the thing's class
    picture: Path
    reference: Path  # the input photograph
    mask: Path  # of the thing in it
    repeat: int = 0  # the seed of the training, where there are several

    @property
    def unit(self) -> tuple[str, str, str, str, int]:
        """What the methods are compared on: the same for each."""
        return self.scene, self.prompt, self.word, self.mask.name, self.repeat


def read_items(source: Path) -> list[Item]:
    """The pictures of a study: a folder of `bas evaluate`, or a .jsonl list of them. InputError for anything else."""
    if source.is_dir():
        trials = sorted(path.parent for path in source.glob(EVALUATED))
        if not trials:
            raise InputError(f"{source} is no evaluation: it has no {EVALUATED}")
        shown: dict[str, Path] = {}  # where each scene's photograph is taken from, for all methods
        for trial in sorted(trials, key=lambda trial: trial.parent.name != METHOD):
            shown.setdefault(trial.parents[1].name, trial / RUN / SCENE)
        return [item for trial in trials for item in read_trial(trial, shown[trial.parents[1].name])]
    return list(read_list(source))


def read_trial(trial: Path, reference: Path) -> Iterator[Item]:
    """The pictures of one method on one scene with one seed, once for each thing that their prompts name.

    reference: folder with the scene's photograph and masks.
    """
    note = read_json(trial / TRIAL)
    try:
        words = [word or NAMELESS for word in note["words"]]
        names = dict(zip(note["handles"], words, strict=True))
        for picture in note["pictures"]:
            for concept in picture["concepts"]:
                yield Item(
                    method=note["method"],
                    scene=note["scene"],
                    prompt=in_words(picture["prompt"], names),
                    word=words[concept],
                    picture=trial / picture["file"],
                    reference=reference / "img.png",
                    mask=reference / f"mask{concept}.png",
                    repeat=note["seed"],
                )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(f"{trial / TRIAL} is no note of an evaluation ({type(error).__name__}: {error})") from error


def read_list(path: Path) -> Iterator[Item]:
    """One JSON object a line with the texts FIELDS; files are named from the list's folder."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is neither an evaluation's folder nor a list of pictures") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            texts = {name: row[name] for name in FIELDS}
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = {}
        if not texts or not all(isinstance(text, str) for text in texts.values()):
            raise InputError(f"{path} line {number} is no object with the texts {', '.join(FIELDS)}")
        yield Item(**texts | {name: path.parent / texts[name] for name in ("picture", "reference", "mask")})


def choose_pages(items: list[Item], config: StudyConfig) -> list[list[Item]]:
    """What each page shows, in its order: the same things and texts from every method, different ones on each page.

    Only what every method has drawn is shown. When the pages want more than there is, what was shown comes again.
    Raises InputError for fewer than two methods, or when they share nothing.
    """
    methods = sorted({item.method for item in items})
    if len(methods) < 2:
        raise InputError(f"a study compares two methods or more: here is {', '.join(methods) or 'none'}")
    if config.questions < len(methods):
        raise InputError(
            f"--questions is {config.questions}: a page has one for each of {len(methods)} methods at least"
        )
    by_unit: dict[tuple, dict[str, Item]] = {}
    for item in items:
        by_unit.setdefault(item.unit, {})[item.method] = item
    units = sorted(unit for unit, drawn in by_unit.items() if len(drawn) == len(methods))
    if not units:
        raise InputError(f"the methods {', '.join(methods)} have no prompt of a scene in common")
    draw = random.Random(config.seed)
    draw.shuffle(units)
    each = min(config.questions // len(methods), len(units))
    pages = []
    for page in range(config.pages):
        chosen = [units[(page * each + i) % len(units)] for i in range(each)]
        shown = [by_unit[unit][method] for unit in chosen for method in methods]
        draw.shuffle(shown)
        pages.append(shown)
    return pages


def write_study(items: list[Item], folder: Path, config: StudyConfig) -> list[Path]:
    """Write page-0.html, page-1.html, ... and key.json; returns the pages' paths."""
    pages = choose_pages(items, config)
    told = [[(item.method, *map(str, item.unit)) for item in page] for page in pages]
    study = hashlib.sha256(json.dumps([config.seed, told]).encode()).hexdigest()[:12]
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    key, paths = {}, []
    for number, page in enumerate(pages):
        names = [hashlib.sha256(f"{study}:{number}:{i}".encode()).hexdigest()[:10] for i in range(len(page))]
        questions = [question(name, item) for name, item in zip(names, page, strict=True)]
        data = embedded_json({"study": study, "page": number, "questions": questions})
        paths.append(folder / f"page-{number}.html")
        write_text(paths[-1], template.substitute(data=data, version=escape(__version__)))
        for name, item in zip(names, page, strict=True):
            key[name] = {"method": item.method, "scene": item.scene, "prompt": item.prompt, "word": item.word}
    write_json(folder / KEY, {"study": study, "questions": key})
    return paths


def question(name: str, item: Item) -> dict[str, str]:
    """What a page shows of one picture; nothing of it tells the method."""
    picture = read_image(item.picture)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    thing = cut_out(item.reference, item.mask)
    return {
        "id": name,
        "text": item.prompt,
        "word": item.word,
        "picture": data_uri(picture),
        "thing": data_uri(thing),
    }


def cut_out(reference: Path, mask_path: Path) -> Image.Image:
    """The thing under a mask, all else black, cut to its surroundings and no larger than SIDE."""
    photo, mask = read_image(reference), read_mask(mask_path)
    if mask.shape != (photo.height, photo.width):
        raise InputError(f"{mask_path} is {mask.shape[1]}x{mask.shape[0]}, {reference} {photo.width}x{photo.height}")
    inside = mask > 0.5 * mask.max()
    if not inside.any():
        raise InputError(f"{mask_path} is black all over: there is no thing to show")
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    margin = round(MARGIN * max(np.ptp(rows), np.ptp(columns))) + 1
    box = columns[0] - margin, rows[0] - margin, columns[-1] + 1 + margin, rows[-1] + 1 + margin
    thing = blacken(photo, mask).crop(tuple(map(int, box)))  # beyond the photograph: black
    thing.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return thing
