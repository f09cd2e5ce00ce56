"""A scene: a photograph, one mask per concept, and the handle and initial word of each; further photographs if any.

Files are read by stated rules, pictures in images.py and the many forms of masks in mask_sources.py. Here they become
one scene: sizes must agree, every mask must show something, and picture and masks are resized and cropped together.
Whatever cannot be used is an InputError that names the file.

Further photographs of the same concepts lie in subfolders named by numbers, SCENE/1, SCENE/2, ..., each with its own
img.* and mask0.png, mask1.png, ... A mask has the number of its concept in the first photograph, which shows them all;
where one is missing, that photograph does not show the concept. Each is cut to the shape of the first.
"""

import logging
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bas.config import TrainConfig
from bas.data.mask_formats import READERS, FoundMask, find_source, read_number, read_source
from bas.errors import MAX_SIDE, InputError, did_you_mean
from bas.io.files import read_content, reading
from bas.io.images import SUFFIXES, fit, pixels, read_image, read_mask
from bas.models.text import HANDLE, check_name

log = logging.getLogger(__name__)

MAX_CONCEPTS = 4  # the paper's own limit (its section on limitations): beyond it quality drops
MOST_IN_CLOSE_UPS = 8  # concepts: their sets, of which each has a close-up, double with each one
CLOSE_UP_SHARE = 0.7  # of a close-up's side, which its concepts take up at the most
WIDEST_CLOSE_UP = 0.9  # of the picture's side: a wider one would show no more than the picture
FAINT_MASK = 0.9  # at most, as of colours turned to grey: the loss takes the square (eq. 1)
SHOWN_OVERLAP = 0.005  # of a mask, that lies in another; less rounds to nothing in a table
LARGE_OVERLAP = 0.1  # two handles that share more of a mask are drawn to the same place
DARKEST_MASK = 0.1  # a mask that is nowhere lighter is something else, such as a map of labels 1, 2, 3


@dataclass(frozen=True)
class Shot:
    """A further photograph of a scene's concepts, or of some of them, at its own size."""

    name: str  # of its folder, for messages
    picture: Image.Image  # RGB, upright
    masks: dict[int, np.ndarray]  # by concept: arrays (H, W) float32 in [0, 1]

    def tensors(self, height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
        """Resize to cover this size and crop the middle. -> image (3, H, W) in [-1, 1], masks (N, H, W) in [0, 1]

        Of the N = `count` concepts those that the photograph does not show have masks of 0.
        """
        size = cover(self.picture.size, (width, height))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        box = (left, top, left + width, top + height)
        masks = torch.zeros(count, height, width)
        for i, mask in self.masks.items():
            layer = fit(Image.fromarray(mask), size, Image.Resampling.BILINEAR).crop(box)
            masks[i] = torch.from_numpy(np.array(layer))
        return pixels(fit(self.picture, size, Image.Resampling.BICUBIC).crop(box)), masks


@dataclass(frozen=True)
class Scene:
    """A photograph and its concepts, as read and checked, at the photograph's own size."""

    picture: Image.Image  # RGB, upright
    masks: list[np.ndarray]  # N arrays (H, W) float32 in [0, 1], soft edges kept
    handles: tuple[str, ...]  # N names such as <asset0>
    words: tuple[str | None, ...]  # N initial words, None for a handle that starts from nothing
    shots: tuple[Shot, ...] = ()  # further photographs

    def __len__(self) -> int:
        """The number of concepts N."""
        return len(self.handles)

    @property
    def photographs(self) -> list[tuple[Image.Image, dict[int, np.ndarray]]]:
        """Its picture and the further ones, each with its masks by concept."""
        return [(self.picture, dict(enumerate(self.masks))), *((shot.picture, shot.masks) for shot in self.shots)]

    def tensors(self, resolution: int, multiple: int, square: bool = False) -> tuple[Tensor, Tensor]:
        """Resize and crop picture and masks together. -> image (3, H, W) in [-1, 1], masks (N, H, W) in [0, 1]

        resolution: pixels of the shorter side; multiple: what both sides are a multiple of; square: cut a square.
        """
        size, box = frame(self.picture.size, resolution, multiple, square)
        image = pixels(fit(self.picture, size, Image.Resampling.BICUBIC).crop(box))
        layers = [fit(Image.fromarray(mask), size, Image.Resampling.BILINEAR).crop(box) for mask in self.masks]
        return image, torch.stack([torch.from_numpy(np.array(layer)) for layer in layers])


# --- The scene folder ---------------------------------------------------------------------------------------------


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The picture img.* of a scene folder and the files of its one source of masks, checked for gaps."""
    require_scene_folder(folder)
    return find_picture(folder), find_source(folder)


def require_scene_folder(path: Path) -> None:
    """InputError unless it is a folder."""
    if not path.is_dir():
        advice = f"; `bas paint {quote(str(path))}` makes one of a picture" if path.is_file() else ""
        kind = "a scene is a folder with img.jpg and mask0.png, mask1.png, ..."
        raise InputError(f"{path} is not a folder: {kind}{advice}")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures img.* of a folder: a scene has one."""
    return sorted(path for path in folder.iterdir() if path.stem == "img" and path.is_file())


def find_picture(folder: Path) -> Path:
    """The one picture img.* of a folder."""
    pictures = pictures_in(folder)
    if len(pictures) != 1:
        others = [path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not read_number(path)]
        none = f"none, but {', '.join(sorted(others)[:3])}: rename the one you mean" if others else "none"
        found = ", ".join(path.name for path in pictures) or none
        raise InputError(f"{folder} needs exactly one picture named img.jpg, img.png, ...; found {found}")
    return pictures[0]


def read_shots(folder: Path, count: int) -> tuple[Shot, ...]:
    """The further photographs of a scene folder, by number. count: how many concepts its first one has."""
    return tuple(read_shot(path, count) for path in numbered_folders(folder))


def numbered_folders(folder: Path) -> list[Path]:
    """The subfolders that are named by numbers, by number."""
    numbered = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name))


def read_shot(folder: Path, count: int) -> Shot:
    """One further photograph. Raises InputError without a picture or a mask, for another kind of mask than maskN.png,
    and for a mask of no known concept."""
    image_path = find_picture(folder)
    picture, masks = read_image(image_path), {}
    for path in sorted(folder.iterdir()):
        kind, number = read_number(path) or (None, None)
        if kind == "cutout" or path.name in READERS:
            raise InputError(
                f"{path} would not be read: a further photograph has its masks as mask0.png, mask1.png, ..."
            )
        if kind == "mask":
            if number >= count:
                raise InputError(
                    f"{path}: the scene has the concepts 0 to {count - 1}, as its first picture shows them"
                )
            mask = match_size(read_mask(path), path, picture, image_path)
            _check_coverage(path, mask)
            masks[number] = mask
    if not masks:
        raise InputError(f"{folder} has no mask0.png, mask1.png, ...: name each by the concept that it shows")
    return Shot(folder.name, picture, masks)


def read_notes(folder: Path, found: list[FoundMask]) -> tuple[list[str | None], list[str | None]]:
    """Handles and initial words from an optional scene.json: {"concepts": [{"handle": "<toy>", "word": "toy"}, ...]}

    Without one, they are as the source of the masks names them, if it does.
    """
    path, count = folder / "scene.json", len(found)
    if not path.exists():
        return [mask.handle for mask in found], [mask.word for mask in found]
    if any(mask.handle or mask.word for mask in found):
        log.warning("%s names the concepts: the names beside the masks are not used", path)
    content = read_content(path)
    try:
        notes = [(c.get("handle"), c.get("word")) for c in content["concepts"]]
        if not all(name is None or isinstance(name, str) for note in notes for name in note):
            raise TypeError("a handle or a word is no text")
        for key in sorted({key for c in content["concepts"] for key in c} - {"handle", "word"}):
            if near := did_you_mean(key, ("handle", "word")):  # other notes are the user's own
                raise TypeError(f"unknown {key}{near}")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is not {{"concepts": [{{"handle": ..., "word": ...}}, ...]}}: {error}') from error
    if len(notes) != count:
        raise InputError(f"{path} names {len(notes)} concepts, but there are {count} masks")
    return [handle for handle, _ in notes], [word for _, word in notes]


def name_concepts(
    config: TrainConfig, folder: Path, found: list[FoundMask]
) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Handles and words of N concepts: flags win over scene.json, which wins over <asset0>, <asset1>, ..."""
    count = len(found)
    if config.num_of_assets not in (None, count):
        raise InputError(f"--num_of_assets is {config.num_of_assets}, but {folder} has {count} masks")
    noted_handles, noted_words = read_notes(folder, found)
    pattern = config.placeholder_token.strip("<>")
    noted = tuple(bracketed(handle or f"{pattern}{i}") for i, handle in enumerate(noted_handles))
    handles = tuple(map(bracketed, config.handles)) or noted
    words = config.initializer_tokens or tuple(noted_words)
    for flag, values in (("--handles", handles), ("--initializer_tokens", words)):
        if len(values) != count:
            raise InputError(f"{flag} gives {len(values)} names, but {folder} has {count} masks")
    for handle in handles:
        check_name(handle)
    if len(set(handles)) != count:
        raise InputError(f"the handles {' '.join(handles)} are not all different")
    return tuple(handles), tuple(words)


def bracketed(name: str) -> str:
    """A handle by its name, which may be given with or without < >."""
    return f"<{name.removeprefix('<').removesuffix('>')}>"


def load_scene(config: TrainConfig) -> Scene:
    """Read and check the scene folder `config.instance_data_dir`, before any weights are read.

    Raises InputError for anything that cannot be used; warns of what is odd but possible.
    """
    folder = Path(config.instance_data_dir)
    with reading(folder):
        scene = read_folder(folder, config)
    if scene.shots:
        log.info("%s has %d further pictures: %s", folder, len(scene.shots), ", ".join(s.name for s in scene.shots))
    if config.background_handle:
        scene = with_background(scene, config.background_handle)
    if config.close_ups:
        scene = with_close_ups(scene)
    if len(scene) > MAX_CONCEPTS:
        log.warning("%d concepts: the method works best with up to %d (paper, limitations)", len(scene), MAX_CONCEPTS)
    return scene


def read_folder(folder: Path, config: TrainConfig) -> Scene:
    """The photographs and masks of a scene folder, checked, with the names that the settings give."""
    image_path, mask_files = find_files(folder)
    picture = read_image(image_path)
    found = read_source(mask_files, picture.size)
    handles, words = name_concepts(config, folder, found)
    masks = [match_size(mask.values, folder / mask.name, picture, image_path) for mask in found]
    for i, mask in enumerate(masks):
        path = folder / found[i].name
        _check_coverage(path, mask)
        for other, earlier in zip(found[:i], masks[:i], strict=True):
            if np.array_equal(mask, earlier):
                raise InputError(f"{path} is the same mask as {other.name}: two concepts need two masks")
    return Scene(picture, masks, handles, words, read_shots(folder, len(masks)))


def overlaps(masks: np.ndarray, i: int) -> dict[int, float]:
    """The share of mask i that lies in each other mask, from SHOWN_OVERLAP on. masks: (N, H, W) in 0..1"""
    shares = np.minimum(masks, masks[i]).sum(axis=(1, 2)) / max(masks[i].sum(), 1e-6)
    return {j: float(share) for j, share in enumerate(shares) if j != i and share >= SHOWN_OVERLAP}


def with_background(scene: Scene, name: str) -> Scene:
    """The scene with one more concept, all that no mask covers (paper, section 4), from the word "background".

    `name` is its handle, with or without < >. Raises InputError for a name in use, and when nothing is left over.
    """
    handle, rest = bracketed(name), 1 - np.maximum.reduce(scene.masks)
    if not HANDLE.fullmatch(handle):
        raise InputError(f"--background_handle {name}: expected 1 to 32 letters, digits, _ or -")
    if handle in scene.handles:
        raise InputError(f"--background_handle {handle}: the scene has a concept of that name")
    if rest.max() < DARKEST_MASK:
        raise InputError(f"--background_handle {handle}: the masks cover the whole picture, no background is left")
    shots = []
    for shot in scene.shots:
        left_over = 1 - np.maximum.reduce(list(shot.masks.values()))
        shown = {len(scene): left_over} if left_over.max() >= DARKEST_MASK else {}
        shots.append(replace(shot, masks=shot.masks | shown))
    masks, handles, words = [*scene.masks, rest], (*scene.handles, handle), (*scene.words, "background")
    return Scene(scene.picture, masks, handles, words, tuple(shots))


def with_close_ups(scene: Scene) -> Scene:
    """The scene with a close-up of each proper subset of its concepts as a further photograph, where one is narrower.

    Not in the paper, whose photographs show their concepts large. A small concept fills more of the latents in its
    close-up, and is not learnt as something that stands where the photograph shows it.
    """
    count, (width, height) = len(scene), scene.picture.size
    if count > MOST_IN_CLOSE_UPS:
        expected = f"expected {MOST_IN_CLOSE_UPS} concepts or fewer, or close_ups = false in a --config file"
        raise InputError(f"--close_ups: {count} concepts have {2**count - 2} sets to show: {expected}")
    close_ups = []
    for subset in (c for size in range(1, count) for c in combinations(range(count), size)):
        ys, xs = np.nonzero(np.maximum.reduce([scene.masks[i] for i in subset]) > 0.5)
        if len(ys) == 0:
            continue
        (left, right), (top, bottom) = (xs.min(), xs.max() + 1), (ys.min(), ys.max() + 1)
        share = max((right - left) / width, (bottom - top) / height) / CLOSE_UP_SHARE
        if share > WIDEST_CLOSE_UP:
            continue
        w, h = round(share * width), round(share * height)
        x = min(max((left + right - w) // 2, 0), width - w)
        y = min(max((top + bottom - h) // 2, 0), height - h)
        masks = {i: scene.masks[i][y : y + h, x : x + w] for i in subset}
        name = "-".join(("close-up", *map(str, subset)))
        close_ups.append(Shot(name, scene.picture.crop((x, y, x + w, y + h)), masks))
    return replace(scene, shots=(*scene.shots, *close_ups))


def cover(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """The (W, H) of a picture scaled to just cover another. InputError where a side would pass MAX_SIDE."""
    scale = max(part / side for part, side in zip(least, size, strict=True))
    width, height = (max(part, round(side * scale)) for part, side in zip(least, size, strict=True))
    if max(width, height) > MAX_SIDE:
        raise InputError(f"a picture of {size[0]}x{size[1]} would become {width}x{height} for the model: crop it")
    return width, height


def frame(
    size: tuple[int, int], resolution: int, multiple: int, square: bool
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How to bring a (W, H) picture to the model: the size to resize it to, then the box to cut from its middle."""
    if resolution % multiple:
        raise InputError(f"--resolution {resolution}: this model takes multiples of {multiple} pixels")
    resized = cover(size, (resolution, resolution))
    kept = (resolution, resolution) if square else tuple(side // multiple * multiple for side in resized)
    left, top = ((side - part) // 2 for side, part in zip(resized, kept, strict=True))
    return resized, (left, top, left + kept[0], top + kept[1])


def match_size(mask: np.ndarray, path: Path, picture: Image.Image, image_path: Path) -> np.ndarray:
    """The mask at the picture's size. Another size of the same shape is resized, another shape is an error."""
    (h, w), (image_w, image_h) = mask.shape, picture.size
    if (w, h) == (image_w, image_h):
        return mask
    sizes = f"{path} is {w}x{h}, {image_path.name} is {image_w}x{image_h}"
    if not _alike(w / h, image_w / image_h):
        turned = ": is one turned by an EXIF note? Draw masks on the upright picture"
        raise InputError(f"{sizes}: they must have the same shape{turned if _alike(h / w, image_w / image_h) else ''}")
    log.warning("%s: the mask is resized", sizes)
    return np.array(Image.fromarray(mask).resize(picture.size, Image.Resampling.BILINEAR))


def _alike(shape: float, other: float) -> bool:
    """Whether two ratios of width to height are one shape, up to rounding."""
    return abs(shape - other) <= 0.01 * other


def _check_coverage(path: Path, mask: np.ndarray) -> None:
    """A mask must show something and leave something out; nearly everything is worth a warning."""
    if mask.max() == 0:
        raise InputError(f"{path} is black all over: paint the concept white")
    if mask.max() < DARKEST_MASK:
        raise InputError(f"{path} is nearly black, {255 * mask.max():.0f} of 255 at most: is it a map of labels?")
    if mask.min() == 1:
        raise InputError(f"{path} is white all over: leave out what is not the concept")
    if mask.max() < FAINT_MASK:
        value, weight = 255 * mask.max(), 100 * mask.max() ** 2
        log.warning("%s is %.0f of 255 at most, so its concept weighs %.0f %%: paint it white", path, value, weight)
    if mask.mean() > 0.95:
        log.warning("%s covers %.0f %% of the picture: is it inverted?", path, 100 * mask.mean())


# --- Union sampling -----------------------------------------------------------------------------------------------


def draw_subset(count: int, kind: str, generator: torch.Generator) -> list[int]:
    """The concepts of one training example, in random order (paper, section 3, as the official code draws them).

    kind="union": k is uniform in 1..N and then the subset is uniform among those of size k, so a single concept comes
    up with probability 1/N. "uniform": all subsets are equally likely, so sizes near N/2 come up most. "single": always
    one (the ablation without union sampling). "all": every concept.
    """
    if kind == "uniform":
        number = int(torch.randint(1, 2**count, (), generator=generator))
        return [i for i in torch.randperm(count, generator=generator).tolist() if number >> i & 1]
    fixed = {"single": 1, "all": count}
    k = fixed[kind] if kind in fixed else int(torch.randint(1, count + 1, (), generator=generator))
    return torch.randperm(count, generator=generator)[:k].tolist()


def subset_prompt(handles: tuple[str, ...] | list[str]) -> str:
    """The training prompt of these handles: `a photo of <asset1> and <asset0>`"""
    return "a photo of " + " and ".join(handles)
