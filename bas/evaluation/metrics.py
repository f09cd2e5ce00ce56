"""Metrics of the paper's evaluation (Break-A-Scene, appendix), and two that show whether handles are kept apart.

Prompt similarity: CLIP's cosine of image and prompt (Radford et al. 2021). Identity similarity: DINO's cosine of the
concept in the input and in the output, all else black (Caron et al. 2021). Attention IoU: how well a handle's attention
covers its mask. Leakage: how much a handle shows of another's concept. docs/evaluation.md has them in full.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bas.evaluation.masking import blacken, blacken_each
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.losses import resize_mask
from bas.pretrained.helper_models import find_helper, load_helper, load_words
from bas.pretrained.hub import find

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CLIP = "openai/clip-vit-large-patch14"  # hub ids of the paper's models
DINO = "facebook/dino-vitb16"
MINI_CLIP = "clip"  # the miniature's own encoders, in its folder
AT_ONCE = 64  # images in one pass


class Identity(Protocol):
    """Either measure of identity: DINO's, or the miniature's."""

    right: float | None  # the value from which on an image shows the concept; None where the measure has no such value

    def identity_similarity(
        self,
        images: list[Image.Image],
        reference: Image.Image,
        mask: np.ndarray,
        segments: list[np.ndarray] | None = None,
    ) -> list[float]:
        """Return for each image how alike it shows what `reference` shows under `mask`."""
        ...


class PromptSimilarity:
    """CLIP's cosine of an image and a text."""

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu"):
        folder = find_helper(name, "--clip")
        model, self.processor = load_helper(folder, "clip", "CLIPModel", "CLIPImageProcessorPil")
        self.tokenizer: CLIPTokenizer = load_words(folder)
        self.model: Any = model.to(device)  # of transformers, whose classes are loaded by name
        self.positions: int = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def prompt_similarity(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """Return one cosine in [-1, 1] for each image and its prompt. A prompt longer than the model reads is cut."""
        found: list[float] = []
        for start in range(0, len(images), AT_ONCE):
            shown, texts = images[start : start + AT_ONCE], prompts[start : start + AT_ONCE]
            words = self.tokenizer(
                texts, padding="max_length", max_length=self.positions, truncation=True, return_tensors="pt"
            )
            values = self.processor(shown, return_tensors="pt")
            outputs = self.model(**words.to(self.model.device), **values.to(self.model.device))
            found += F.cosine_similarity(outputs.image_embeds, outputs.text_embeds, dim=-1).tolist()
        return found


class IdentitySimilarity:
    """The cosine of DINO's features (the class token after the last norm) of two images that show the concept alone."""

    right: float | None = None

    def __init__(self, name: str = DINO, device: torch.device | str = "cpu"):
        folder = find_helper(name, "--dino")
        model, self.processor = load_helper(folder, "vit", "ViTModel", "ViTImageProcessorPil", add_pooling_layer=False)
        self.model: Any = model.to(device)

    @torch.inference_mode()
    def identity_similarity(
        self,
        images: list[Image.Image],
        reference: Image.Image,
        mask: np.ndarray,
        segments: list[np.ndarray] | None = None,
    ) -> list[float]:
        """Return the cosine in [-1, 1] for each image. mask, segments: (H, W) in 0..1, of their images.

        Without `segments` the whole of each image is compared, its background too.
        """
        shown = blacken_each(images, segments)
        (wanted,) = self._features([blacken(reference, mask)])
        found: list[float] = []
        for start in range(0, len(shown), AT_ONCE):
            features = self._features(shown[start : start + AT_ONCE])
            found += F.cosine_similarity(features, wanted[None], dim=-1).tolist()
        return found

    def _features(self, images: list[Image.Image]) -> Tensor:
        """Return the features of n images, (n, d)."""
        values = self.processor(images, return_tensors="pt")
        return self.model(**values.to(self.model.device)).last_hidden_state[:, 0]


class Metrics:
    """Both similarities of the evaluation."""

    def __init__(self, prompt: PromptSimilarity, identity: Identity):
        self.prompt_similarity = prompt.prompt_similarity
        self.identity_similarity, self.right = identity.identity_similarity, identity.right

    @classmethod
    def photographs(cls, device: torch.device | str = "cpu", clip: str = CLIP, dino: str = DINO) -> Metrics:
        """Load the paper's CLIP ViT-L/14 and DINO ViT-B/16, or others of their kinds by folder or hub id."""
        return cls(PromptSimilarity(clip, device), IdentitySimilarity(dino, device))

    @classmethod
    def miniature(cls, device: torch.device | str = "cpu", weights: Path | None = None) -> Metrics:
        """Load the miniature's CLIP, and search for concepts. weights: its folder (default: the shipped one)"""
        clip = (weights or find(None)) / MINI_CLIP
        return cls(PromptSimilarity(str(clip), device), ObjectSimilarity(device))


def class_prompt(prompt: str, names: dict[str, str]) -> str:
    """Replace each handle of a prompt by its class name, so that CLIP can read it. names: by handle"""
    for handle, name in names.items():
        prompt = prompt.replace(handle, name)
    return prompt


def leakage(
    identity: Identity, images: list[list[Image.Image]], reference: Image.Image, masks: list[np.ndarray]
) -> np.ndarray:
    """Return the mean similarity of handle i's images to the concept under mask j, (N, N).

    images: of each handle, those whose prompt names it alone. Where nothing leaks, each row is largest on the diagonal.
    """
    rows = [[np.mean(identity.identity_similarity(own, reference, mask)) for mask in masks] for own in images]
    return np.array(rows)


def attention_iou(maps: Tensor, masks: Tensor) -> list[float]:
    """Return the IoU of each map above half its maximum with its mask. maps: (N, h, w), masks: (N, H, W)"""
    attended = maps > 0.5 * maps.amax(dim=(-2, -1), keepdim=True)
    wanted = resize_mask(masks, *maps.shape[-2:]) > 0.5
    both, either = (attended & wanted).sum(dim=(-2, -1)), (attended | wanted).sum(dim=(-2, -1))
    return (both / either.clamp(min=1)).tolist()
