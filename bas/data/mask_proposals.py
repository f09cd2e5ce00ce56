"""Propose masks with a segmentation model of transformers: SAM, CLIPSeg or Mask2Former.

SAM (Kirillov et al. 2023) segments what points or boxes mark, or everything. CLIPSeg (Lüddecke and Ecker 2022) segments
what words name, Mask2Former (Cheng et al. 2022) the classes that it was trained on. The models are read from this
machine, as safetensors only, without the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from bas.config import ProposalConfig
from bas.errors import InputError
from bas.pretrained.helper_models import find_helper, load_helper

if TYPE_CHECKING:
    from transformers import SamModel

GRID = 16  # points per side that SAM is asked at when neither points nor boxes are given
POINTS_PER_BATCH = 32  # through SAM's decoder
MIN_SCORE = 0.88  # SAM's own estimate of a mask's IoU with the truth (its authors' value)
MIN_STABILITY = 0.95  # IoU of a mask cut 1 logit lower and 1 higher (its authors' value)
OF_SEARCH = {"max_concepts", "min_coverage"}  # settings of a search of the whole image
MAX_COVERAGE = 0.95  # a mask that covers more of the image shows no object in it
MAX_IOU = 0.7  # two masks with more show one object


@dataclass(frozen=True)
class Proposal:
    """One concept's mask, and its name as the model gives it."""

    mask: np.ndarray  # (H, W) bool
    word: str | None


@dataclass(frozen=True)
class Segmenter:
    """One family of models."""

    default: str  # hub id
    kind: str  # model_type in its config.json
    model: str  # class names in transformers
    processor: str
    run: Callable[..., list[Proposal]]  # of (model, processor, image, config)


def propose(method: str, image: Image.Image, config: ProposalConfig, device: torch.device) -> list[Proposal]:
    """Propose and refine masks for an RGB image. Raises InputError for a missing model, and where it finds nothing."""
    row = METHODS[method]
    for name, owner in (("points", "sam"), ("boxes", "sam"), ("words", "clipseg")):
        if getattr(config, name) and method != owner:
            raise InputError(f"--{name} is for --auto {owner}, not {method}")
    if method == "clipseg" and not config.words:
        raise InputError("--auto clipseg needs --words, one per concept")
    if config.points and config.boxes:
        raise InputError("--points and --boxes: use one of them")
    read_prompts(image, config)
    model, processor = load_segmenter(row, config.segmenter or row.default)
    with torch.inference_mode():
        found = row.run(model.to(device), processor, image, config)
    refined = [Proposal(refine(proposal.mask, config), proposal.word) for proposal in found]
    if not refined:
        raise InputError(f"{method} finds nothing here: lower --threshold or --min_coverage, or give points")
    for i, proposal in enumerate(refined):
        name = f"mask {i}" + f" ({proposal.word})" * bool(proposal.word)
        if proposal.mask.all():
            raise InputError(f"{method} puts everything into {name}: raise --threshold, or grow less")
        if not proposal.mask.any():
            raise InputError(f"{method} leaves nothing of {name}: lower --threshold or --smooth, or shrink less")
    return refined


def load_segmenter(row: Segmenter, name: str) -> tuple[Any, Any]:
    """Load the model and its processor, as `load_helper` does."""
    return load_helper(find_helper(name, "--segmenter"), row.kind, row.model, row.processor)


# --- The methods --------------------------------------------------------------------------------------------------


class SamReader:
    """SAM on one image, which is encoded once for all prompts."""

    def __init__(self, model: SamModel, processor: Any, image: Image.Image):
        inputs = processor(image, return_tensors="pt")
        self.model, self.processor, self.image = model, processor, image
        self.sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        self.embedding = model.get_image_embeddings(inputs["pixel_values"].to(model.device))

    def ask(self, **prompts: list) -> tuple[Tensor, Tensor]:
        """SAM's best mask for each prompt, as logits (n, h, w) on its own padded grid, and its estimate of it (n,)"""
        inputs = self.processor(self.image, **prompts, return_tensors="pt")
        shown = {name: inputs[name].to(self.model.device, torch.float32) for name in prompts}
        outputs = self.model(image_embeddings=self.embedding, **shown, multimask_output=True)
        scores, best = outputs.iou_scores[0].max(dim=-1)  # of three masks: part, object, whole
        return outputs.pred_masks[0][torch.arange(len(best)), best].cpu(), scores.cpu()

    def enlarge(self, logits: Tensor) -> Tensor:
        """Resize logits from SAM's padded grid to the image. (n, h, w) -> (n, H, W)"""
        return self.processor.post_process_masks([logits[:, None]], *self.sizes, binarize=False)[0][:, 0]


def sam(model: Any, processor: Any, image: Image.Image, config: ProposalConfig) -> list[Proposal]:
    """Segment what points or boxes mark; without them everything, from a grid of points."""
    reader = SamReader(model, processor, image)
    asked = [reader.ask(**prompt)[0] for prompt in read_prompts(image, config)]
    logits = torch.cat(asked) if asked else find_everything(reader, config)
    return [Proposal(mask.numpy(), None) for mask in reader.enlarge(logits).sigmoid() >= config.threshold]


def find_everything(reader: SamReader, config: ProposalConfig) -> Tensor:
    """Find the largest objects that SAM finds on a grid of points: stable masks of a high score. -> logits (n, h, w)"""
    width, height = reader.image.size
    spots = [[(x + 0.5) * width / GRID, (y + 0.5) * height / GRID] for y in range(GRID) for x in range(GRID)]
    asked = [
        reader.ask(input_points=[[[spot] for spot in spots[start : start + POINTS_PER_BATCH]]])
        for start in range(0, len(spots), POINTS_PER_BATCH)
    ]
    logits, scores = (torch.cat(parts) for parts in zip(*asked, strict=True))
    rows, columns = (round(side * logits.shape[-1] / max(width, height)) for side in (height, width))  # not padding
    seen = logits[:, :rows, :columns]
    stable = (seen > 1).sum(dim=(1, 2)) / (seen > -1).sum(dim=(1, 2)).clamp(min=1)
    inside = seen.sigmoid() >= config.threshold
    covered = inside.float().mean(dim=(1, 2))
    good = (
        (scores >= MIN_SCORE) & (stable >= MIN_STABILITY) & (covered >= config.min_coverage) & (covered <= MAX_COVERAGE)
    )
    distinct: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if good[i] and all(iou(inside[i], inside[j]) <= MAX_IOU for j in distinct):
            distinct.append(i)
    chosen = sorted(distinct, key=lambda i: -covered[i])[: config.max_concepts]
    return logits[chosen]


def clipseg(model: Any, processor: Any, image: Image.Image, config: ProposalConfig) -> list[Proposal]:
    """Segment what each word names."""
    words = list(config.words)
    inputs = processor(text=words, images=[image] * len(words), padding=True, return_tensors="pt")
    logits = model(**inputs.to(model.device)).logits
    logits = logits.reshape(len(words), 1, *logits.shape[-2:])  # a single word comes without its dimension
    size = image.height, image.width
    inside = F.interpolate(logits, size, mode="bilinear").sigmoid()[:, 0] >= config.threshold
    return [Proposal(mask, word) for mask, word in zip(inside.cpu().numpy(), words, strict=True)]


def mask2former(model: Any, processor: Any, image: Image.Image, config: ProposalConfig) -> list[Proposal]:
    """Return the largest segments of a panoptic segmentation, each with the name of its class."""
    outputs = model(**processor(image, return_tensors="pt").to(model.device))
    size = image.height, image.width
    (result,) = processor.post_process_panoptic_segmentation(
        outputs, threshold=config.threshold, target_sizes=[size], label_ids_to_fuse=set()
    )
    segments = result["segmentation"].cpu().numpy()
    names = {row["id"]: model.config.id2label[row["label_id"]] for row in result["segments_info"]}
    # COCO names stuff as wall-other-merged.
    found = [Proposal(segments == i, name.split("-")[0]) for i, name in names.items()]
    fits = [one for one in found if config.min_coverage <= one.mask.mean() <= MAX_COVERAGE]
    return sorted(fits, key=lambda one: -one.mask.sum())[: config.max_concepts]


METHODS = {
    "sam": Segmenter("facebook/sam-vit-base", "sam", "SamModel", "SamProcessor", sam),
    "clipseg": Segmenter(
        "CIDAS/clipseg-rd64-refined", "clipseg", "CLIPSegForImageSegmentation", "CLIPSegProcessor", clipseg
    ),
    "mask2former": Segmenter(
        "facebook/mask2former-swin-tiny-coco-panoptic",
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerImageProcessorPil",
        mask2former,
    ),
}


# --- Masks --------------------------------------------------------------------------------------------------------


def read_prompts(image: Image.Image, config: ProposalConfig) -> list[dict[str, list]]:
    """SAM's prompts, one for each concept. Raises InputError for points and boxes outside the image."""
    points = [[parse(point, "x,y", image) for point in text.split("+")] for text in config.points]
    boxes = [parse(text, "x0,y0,x1,y1", image) for text in config.boxes]
    return [{"input_points": [[shown]]} for shown in points] + [{"input_boxes": [[box]]} for box in boxes]


def parse(text: str, form: str, image: Image.Image) -> list[float]:
    """Parse coordinates inside the image, such as 120,80 for the form x,y. Raises InputError for others."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    inside = all(0 <= value <= side for value, side in zip(values, cycle(image.size)))
    if len(values) != len(form.split(",")) or not inside:
        raise InputError(f"{text!r}: expected {form} in pixels, inside {image.width}x{image.height}")
    return values


def iou(first: Tensor, second: Tensor) -> float:
    """Return the IoU of two masks (h, w) bool."""
    return float((first & second).sum() / (first | second).sum())


def refine(mask: np.ndarray, config: ProposalConfig) -> np.ndarray:
    """Smooth, then grow or shrink. (H, W) bool -> (H, W) bool"""
    if config.smooth:
        soft = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(config.smooth))
        mask = np.asarray(soft) >= 128
    return ~dilate(~mask, -config.grow) if config.grow < 0 else dilate(mask, config.grow)


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return every pixel at most `radius` pixels from the mask, by the rows of a disc. (H, W) bool -> (H, W) bool"""
    image = torch.from_numpy(mask)[None].float()
    height, result = mask.shape[0], image.bool()
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        reach = int((radius**2 - dy**2) ** 0.5)
        wide = F.max_pool1d(image[0], 2 * reach + 1, stride=1, padding=reach)[None].bool()
        source, target = slice(max(0, -dy), height - max(0, dy)), slice(max(0, dy), height - max(0, -dy))
        result[:, target] |= wide[:, source]
    return result[0].numpy()
