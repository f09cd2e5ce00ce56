"""The pages of a user study (Break-A-Scene, appendix): is it the same concept, and does the image show the text?

A page is one file that needs no server. It shows images of all methods in random order, each with its text and the
concept cut out of the input. It asks for two ratings from 1 to 5. Only key.json says which method generated an image;
participants do not get it. ratings.py reads both.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bas.config import StudyConfig
from bas.errors import InputError
from bas.evaluation.masking import blacken
from bas.evaluation.metrics import class_prompt
from bas.evaluation.protocol import RUN, TRIAL, TRIALS
from bas.io.files import read_bytes, write_text
from bas.io.images import read_image, read_mask, to_floats
from bas.io.json_files import decode_text, read_record, write_json
from bas.training.preview import SCENE
from bas.web.elements import data_uri, render

KEY = "key.json"
SIDE = 512  # pixels of an image on a page
MARGIN = 0.06  # around a cut-out concept, as a share of its larger side
EVALUATED = f"{TRIALS}/*/*/seed-*/{TRIAL}"  # what `bas evaluate` leaves
METHOD = "bas"  # whose trials hold the scene itself: the baselines train on collages
FIELDS = ("method", "scene", "prompt", "word", "picture", "reference", "mask")  # of a line in a list of images
DETERMINERS = {
    "a",
    "an",
    "the",
    "this",
    "that",
    "my",
    "your",
    "his",
    "her",
    "its",
    "our",
    "their",
    "some",
    "one",
    "two",
}
SPOKEN_VOWEL = ("hour", "honest", "honor", "honour", "heir")  # words that begin with a vowel as they are spoken
SPOKEN_CONSONANT = ("uni", "use", "usu", "uk", "eu", "ewe", "one", "once")  # and with a consonant
NAMELESS = "object"  # what participants read for a concept without a word


@dataclass(frozen=True)
class Item:
    """One generated image, and one concept that it should show."""

    method: str
    scene: str
    prompt: str  # in words
    word: str  # the concept's class
    image: Path
    reference: Path  # the input image
    mask: Path  # of the concept in it
    repeat: int = 0  # the seed of the training, where there are several

    @property
    def unit(self) -> tuple[str, str, str, str, int]:
        """What every method is asked for alike."""
        return self.scene, self.prompt, self.word, self.mask.name, self.repeat


def read_items(source: Path) -> list[Item]:
    """Read a study's images from a folder of `bas evaluate` or a .jsonl list. Raises InputError for anything else."""
    if source.is_dir():
        trials = sorted(path.parent for path in source.glob(EVALUATED))
        if not trials:
            raise InputError(f"{source} is not an evaluation: it has no {EVALUATED}")
        shown: dict[str, Path] = {}  # the folder of each scene's image, for all methods
        for trial in sorted(trials, key=lambda trial: trial.parent.name != METHOD):
            shown.setdefault(trial.parents[1].name, trial / RUN / SCENE)
        return [item for trial in trials for item in read_trial(trial, shown[trial.parents[1].name])]
    return list(read_list(source))


def read_trial(trial: Path, reference: Path) -> Iterator[Item]:
    """Yield the images of one method on one scene with one seed, once for each concept that their prompts name.

    reference: folder with the scene's image and masks. Raises InputError for a trial that `bas evaluate` did not write.
    """
    noted = read_record(trial / TRIAL, {}, "remove it, and `bas evaluate` makes the trial again")
    try:
        words = [word or NAMELESS for word in noted["words"]]
        names = {handle: with_article(word) for handle, word in zip(noted["handles"], words, strict=True)}
        for row in noted["pictures"]:
            for concept in row["concepts"]:
                yield Item(
                    method=noted["method"],
                    scene=noted["scene"],
                    prompt=class_prompt(row["prompt"], names),
                    word=words[concept],
                    image=trial / row["file"],
                    reference=reference / "img.png",
                    mask=reference / f"mask{concept}.png",
                    repeat=noted["seed"],
                )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise InputError(
            f"{trial / TRIAL} was not written by bas evaluate ({type(error).__name__}: {error})"
        ) from error


def with_article(word: str) -> str:
    """Put "a" or "an" before a word, and nothing before a plural or a word that has an article or a possessive."""
    first, last = word.split(" ")[0].lower(), word.split(" ")[-1].lower()
    if first in DETERMINERS or (last.endswith("s") and not last.endswith(("ss", "us"))):
        return word
    spoken_vowel = first.startswith(SPOKEN_VOWEL) or (first[:1] in "aeiou" and not first.startswith(SPOKEN_CONSONANT))
    return f"{'an' if spoken_vowel else 'a'} {word}"


def read_list(path: Path) -> Iterator[Item]:
    """Read one JSON object a line with the texts FIELDS. Files are named from the list's folder.

    Raises InputError for a file or a line of another kind.
    """
    try:
        lines = [line for line in decode_text(read_bytes(path)).splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is neither an evaluation's folder nor a list of images ({error})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            texts = {name: row[name] for name in FIELDS}
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = {}
        if not texts or not all(isinstance(text, str) for text in texts.values()):
            raise InputError(f"{path} line {number} is not an object with the strings {', '.join(FIELDS)}")
        image, reference, mask = (path.parent / texts[name] for name in ("picture", "reference", "mask"))
        yield Item(texts["method"], texts["scene"], texts["prompt"], texts["word"], image, reference, mask)


def choose_pages(items: list[Item], config: StudyConfig) -> list[list[Item]]:
    """Choose what each page shows, in its order: the same concepts and texts of every method, others on each page.

    Only what every method has generated is shown. Where the pages ask for more than there is, images come again.
    Raises InputError for fewer than two methods, and where they share nothing.
    """
    methods = sorted({item.method for item in items})
    if len(methods) < 2:
        raise InputError(f"a study compares two methods or more: here is {', '.join(methods) or 'none'}")
    if config.questions < len(methods):
        raise InputError(
            f"--questions is {config.questions}: a page needs one or more for each of the {len(methods)} methods"
        )
    by_unit: dict[tuple, dict[str, Item]] = {}
    for item in items:
        found = by_unit.setdefault(item.unit, {})
        if item.method in found:
            raise InputError(
                f"{item.image} is a second image of {item.method} for {item.prompt!r} of {item.scene}: list one of "
                "them, or give each a scene of its own"
            )
        found[item.method] = item
    units = sorted(unit for unit, found in by_unit.items() if len(found) == len(methods))
    if not units:
        raise InputError(f"the methods {', '.join(methods)} have no prompt of a scene in common")
    rng = random.Random(config.seed)
    rng.shuffle(units)
    each = min(config.questions // len(methods), len(units))
    pages = []
    for page in range(config.pages):
        chosen = [units[(page * each + i) % len(units)] for i in range(each)]
        shown = [by_unit[unit][method] for unit in chosen for method in methods]
        rng.shuffle(shown)
        pages.append(shown)
    return pages


def write_study(items: list[Item], folder: Path, config: StudyConfig) -> list[Path]:
    """Write page-0.html, page-1.html, ... and key.json; returns the pages' paths. Raises as `choose_pages` does."""
    pages = choose_pages(items, config)
    folder.mkdir(parents=True, exist_ok=True)
    content = [[(item.method, *map(str, item.unit)) for item in page] for page in pages]
    study = hashlib.sha256(json.dumps([config.seed, content]).encode()).hexdigest()[:12]
    key, paths = {}, []
    for number, page in enumerate(pages):
        names = [hashlib.sha256(f"{study}:{number}:{i}".encode()).hexdigest()[:10] for i in range(len(page))]
        questions = [question(name, item) for name, item in zip(names, page, strict=True)]
        paths.append(folder / f"page-{number}.html")
        data = {"study": study, "page": number, "questions": questions}
        write_text(paths[-1], render("study.html", "study.js", data=data))
        for name, item in zip(names, page, strict=True):
            key[name] = {"method": item.method, "scene": item.scene, "prompt": item.prompt, "word": item.word}
    write_json(folder / KEY, {"study": study, "questions": key})
    return paths


def question(name: str, item: Item) -> dict[str, str]:
    """Return what a page shows of one image. Nothing of it names the method."""
    image = read_image(item.image)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return {
        "id": name,
        "text": item.prompt,
        "word": item.word,
        "image": data_uri(image),
        "concept": data_uri(cut_out(item.reference, item.mask)),
    }


def cut_out(reference: Path, mask_path: Path) -> Image.Image:
    """Cut the concept under a mask out, all else black, at most SIDE pixels a side.

    Raises InputError for a mask of another size than its image, and for one that is black all over.
    """
    image, mask = read_image(reference), read_mask(mask_path)
    if mask.shape != (image.height, image.width):
        raise InputError(f"{mask_path} is {mask.shape[1]}x{mask.shape[0]}, {reference} {image.width}x{image.height}")
    inside = mask > 0.5 * mask.max()
    if not inside.any():
        raise InputError(f"{mask_path} is black all over: it masks no concept")
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    margin = round(MARGIN * max(np.ptp(rows), np.ptp(columns))) + 1
    left, top = int(columns[0]) - margin, int(rows[0]) - margin
    right, bottom = int(columns[-1]) + 1 + margin, int(rows[-1]) + 1 + margin
    concept = blacken(image, to_floats(mask)).crop((left, top, right, bottom))  # black beyond the image
    concept.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return concept
