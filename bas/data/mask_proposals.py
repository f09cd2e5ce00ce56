"""Masks proposed by a segmentation model of transformers: SAM, CLIPSeg or Mask2Former.

SAM (Kirillov et al. 2023) segments what points or boxes show, or everything; CLIPSeg (Lüddecke and Ecker 2022) what
words say; Mask2Former (Cheng et al. 2022) the things and stuff it was trained on. The models are read from this
machine, as safetensors only, and the network is never asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from bas.config import ProposalConfig
from bas.errors import InputError
from bas.pretrained.helper_models import find_helper, load_helper

if TYPE_CHECKING:
    from transformers import ProcessorMixin, SamModel, SamProcessor

GRID = 16  # points per side that SAM looks at when nothing is pointed out
AT_ONCE = 32  # of them per pass through its decoder
SURE = 0.88  # SAM's own estimate of a mask's overlap with the truth, from where on it counts (its authors' value)
STABLE = 0.95  # overlap of a mask drawn 1 logit wider and 1 narrower (its authors' value)
MOST = 0.95  # what covers more of the picture is no thing in it
ALIKE = 0.7  # two masks that overlap more than that are one thing


@dataclass(frozen=True)
class Proposal:
    """One concept's mask, and what the model calls it."""

    mask: np.ndarray  # (H, W) bool
    word: str | None


@dataclass(frozen=True)
class Method:
    """One family of models."""

    default: str  # hub id
    kind: str  # model_type in its config.json
    model: str  # class names in transformers
    processor: str
    run: Callable[..., list[Proposal]]  # of (model, processor, picture, config)


def propose(method: str, picture: Image.Image, config: ProposalConfig, device: torch.device) -> list[Proposal]:
    """Masks for an RGB picture, refined. Raises InputError when the model is not here, or it finds nothing."""
    row = METHODS[method]
    for name, owner in (("points", "sam"), ("boxes", "sam"), ("words", "clipseg")):
        if getattr(config, name) and method != owner:
            raise InputError(f"--{name} is for --auto {owner}, not {method}")
    if method == "clipseg" and not config.words:
        raise InputError("--auto clipseg needs --words, one per concept")
    if config.points and config.boxes:
        raise InputError("--points and --boxes: use one of them")
    read_prompts(picture, config)
    model, processor = load_segmenter(row, config.segmenter or row.default)
    with torch.inference_mode():
        found = row.run(model.to(device), processor, picture, config)
    refined = [Proposal(refine(proposal.mask, config), proposal.word) for proposal in found]
    if not refined:
        raise InputError(f"{method} finds nothing here: lower --threshold or --min_coverage, or point things out")
    for i, proposal in enumerate(refined):
        name = f"mask {i}" + f" ({proposal.word})" * bool(proposal.word)
        if proposal.mask.all():
            raise InputError(f"{method} puts everything into {name}: raise --threshold, or grow less")
        if not proposal.mask.any():
            raise InputError(f"{method} leaves nothing of {name}: lower --threshold or --smooth, or shrink less")
    return refined


def load_segmenter(row: Method, name: str) -> tuple[torch.nn.Module, ProcessorMixin]:
    """The model and its processor, strictly, as `load_helper` reads them."""
    return load_helper(find_helper(name, "--segmenter"), row.kind, row.model, row.processor)


# --- The methods --------------------------------------------------------------------------------------------------


class SamReader:
    """SAM on one picture, which is encoded once however often it is asked."""

    def __init__(self, model: SamModel, processor: SamProcessor, picture: Image.Image):
        inputs = processor(picture, return_tensors="pt")
        self.model, self.processor, self.picture = model, processor, picture
        self.sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        self.embedding = model.get_image_embeddings(inputs["pixel_values"].to(model.device))

    def ask(self, **prompts: list) -> tuple[Tensor, Tensor]:
        """SAM's best mask for each prompt, as logits (n, h, w) on its own padded grid, and its estimate of it (n,)"""
        inputs = self.processor(self.picture, **prompts, return_tensors="pt")
        shown = {name: inputs[name].to(self.model.device, torch.float32) for name in prompts}
        outputs = self.model(image_embeddings=self.embedding, **shown, multimask_output=True)
        scores, best = outputs.iou_scores[0].max(dim=-1)  # of three readings: part, thing, whole
        return outputs.pred_masks[0][torch.arange(len(best)), best].cpu(), scores.cpu()

    def enlarge(self, logits: Tensor) -> Tensor:
        """Logits of SAM's grid at the picture's size, without the padding. (n, h, w) -> (n, H, W)"""
        return self.processor.post_process_masks([logits[:, None]], *self.sizes, binarize=False)[0][:, 0]


def sam(model, processor, picture: Image.Image, config: ProposalConfig) -> list[Proposal]:
    """What points or boxes show, or everything: then SAM is asked at a grid of points."""
    reader = SamReader(model, processor, picture)
    asked = [reader.ask(**prompt)[0] for prompt in read_prompts(picture, config)]
    logits = torch.cat(asked) if asked else find_everything(reader, config)
    return [Proposal(mask.numpy(), None) for mask in reader.enlarge(logits).sigmoid() >= config.threshold]


def find_everything(reader: SamReader, config: ProposalConfig) -> Tensor:
    """The largest things that SAM finds anywhere: sure and stable masks, alike ones only once. -> logits (n, h, w)"""
    width, height = reader.picture.size
    spots = [[(x + 0.5) * width / GRID, (y + 0.5) * height / GRID] for y in range(GRID) for x in range(GRID)]
    asked = [
        reader.ask(input_points=[[[spot] for spot in spots[start : start + AT_ONCE]]])
        for start in range(0, len(spots), AT_ONCE)
    ]
    logits, scores = (torch.cat(parts) for parts in zip(*asked, strict=True))
    rows, columns = (round(side * logits.shape[-1] / max(width, height)) for side in (height, width))  # not padding
    seen = logits[:, :rows, :columns]
    stable = (seen > 1).sum(dim=(1, 2)) / (seen > -1).sum(dim=(1, 2)).clamp(min=1)
    inside = seen.sigmoid() >= config.threshold
    covered = inside.float().mean(dim=(1, 2))
    good = (scores >= SURE) & (stable >= STABLE) & (covered >= config.min_coverage) & (covered <= MOST)
    distinct: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if good[i] and all(overlap(inside[i], inside[j]) <= ALIKE for j in distinct):
            distinct.append(i)
    chosen = sorted(distinct, key=lambda i: -covered[i])[: config.max_concepts]
    return logits[chosen]


def clipseg(model, processor, picture: Image.Image, config: ProposalConfig) -> list[Proposal]:
    """What each word says."""
    words = list(config.words)
    inputs = processor(text=words, images=[picture] * len(words), padding=True, return_tensors="pt")
    logits = model(**inputs.to(model.device)).logits
    logits = logits.reshape(len(words), 1, *logits.shape[-2:])  # a single word comes without its dimension
    size = picture.height, picture.width
    inside = F.interpolate(logits, size, mode="bilinear").sigmoid()[:, 0] >= config.threshold
    return [Proposal(mask, word) for mask, word in zip(inside.cpu().numpy(), words, strict=True)]


def mask2former(model, processor, picture: Image.Image, config: ProposalConfig) -> list[Proposal]:
    """The largest segments of a panoptic segmentation, each with the name of its class."""
    outputs = model(**processor(picture, return_tensors="pt").to(model.device))
    size = picture.height, picture.width
    (result,) = processor.post_process_panoptic_segmentation(
        outputs, threshold=config.threshold, target_sizes=[size], label_ids_to_fuse=set()
    )
    segments = result["segmentation"].cpu().numpy()
    names = {row["id"]: model.config.id2label[row["label_id"]] for row in result["segments_info"]}
    # COCO's stuff is named as wall-other-merged.
    things = [Proposal(segments == i, name.split("-")[0]) for i, name in names.items()]
    fits = [thing for thing in things if config.min_coverage <= thing.mask.mean() <= MOST]
    return sorted(fits, key=lambda thing: -thing.mask.sum())[: config.max_concepts]


METHODS = {
    "sam": Method("facebook/sam-vit-base", "sam", "SamModel", "SamProcessor", sam),
    "clipseg": Method(
        "CIDAS/clipseg-rd64-refined", "clipseg", "CLIPSegForImageSegmentation", "CLIPSegProcessor", clipseg
    ),
    "mask2former": Method(
        "facebook/mask2former-swin-tiny-coco-panoptic",
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerImageProcessorPil",
        mask2former,
    ),
}


# --- Masks --------------------------------------------------------------------------------------------------------


def read_prompts(picture: Image.Image, config: ProposalConfig) -> list[dict[str, list]]:
    """What SAM is asked, one question per concept. Raises InputError for points and boxes outside the picture."""
    points = [[parse(point, "x,y", picture) for point in text.split("+")] for text in config.points]
    boxes = [parse(text, "x0,y0,x1,y1", picture) for text in config.boxes]
    return [{"input_points": [[shown]]} for shown in points] + [{"input_boxes": [[box]]} for box in boxes]


def parse(text: str, form: str, picture: Image.Image) -> list[float]:
    """Coordinates inside the picture, such as 120,80 for the form x,y."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    inside = all(0 <= value <= side for value, side in zip(values, cycle(picture.size)))
    if len(values) != len(form.split(",")) or not inside:
        raise InputError(f"{text!r}: expected {form} in pixels, inside {picture.width}x{picture.height}")
    return values


def overlap(first: Tensor, second: Tensor) -> float:
    """The share of two masks' union that both cover."""
    return float((first & second).sum() / (first | second).sum())


def refine(mask: np.ndarray, config: ProposalConfig) -> np.ndarray:
    """Smooth, then grow or shrink. (H, W) bool -> (H, W) bool"""
    if config.smooth:
        soft = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(config.smooth))
        mask = np.asarray(soft) >= 128
    return ~dilate(~mask, -config.grow) if config.grow < 0 else dilate(mask, config.grow)


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Every pixel at most `radius` pixels from the mask, row by row of a disc. (H, W) bool -> (H, W) bool"""
    image = torch.from_numpy(mask)[None].float()
    height, result = mask.shape[0], image.bool()
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = int((radius**2 - dy**2) ** 0.5)
        wide = F.max_pool1d(image[0], 2 * reach + 1, stride=1, padding=reach)[None].bool()
        source, target = slice(max(0, -dy), height - max(0, dy)), slice(max(0, dy), height - max(0, -dy))
        result[:, target] |= wide[:, source]
    return result[0].numpy()
