"""Metrics of the paper's evaluation (Break-A-Scene, appendix), and two of what the method is for.

Prompt similarity: CLIP's cosine of picture and prompt (Radford et al. 2021). Identity similarity: DINO's cosine of the
concept in the input and in the output, all else black (Caron et al. 2021). Attention IoU: how well a handle's attention
covers its mask. Leakage: whether a handle draws another's concept. docs/evaluation.md has them in full.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bas.evaluation.masking import blacken, blacken_each
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.losses import resize_mask
from bas.models.text import load_tokenizer
from bas.pretrained.helper_models import find_helper, load_helper
from bas.pretrained.hub import find

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CLIP = "openai/clip-vit-large-patch14"  # hub ids of the paper's models
DINO = "facebook/dino-vitb16"
MINI_CLIP = "clip"  # the miniature's own towers, in its folder
AT_ONCE = 64  # pictures in one pass


class Identity(Protocol):
    """Either measure of identity: DINO's, or the miniature's."""

    def identity_similarity(
        self,
        pictures: list[Image.Image],
        image: Image.Image,
        mask: np.ndarray,
        segments: list[np.ndarray] | None = None,
    ) -> list[float]:
        """For each picture: how alike it shows what `image` shows under `mask`."""


class PromptSimilarity:
    """CLIP's cosine of a picture and a text."""

    def __init__(self, name: str = CLIP, device: torch.device | str = "cpu"):
        folder = find_helper(name, "--clip")
        model, self.processor = load_helper(folder, "clip", "CLIPModel", "CLIPImageProcessorPil")
        self.tokenizer: CLIPTokenizer = load_tokenizer(folder)
        self.model = model.to(device)
        self.positions = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def prompt_similarity(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        """One cosine for each picture with its own prompt, in [-1, 1]. A prompt longer than the tower is cut."""
        found: list[float] = []
        for start in range(0, len(pictures), AT_ONCE):
            shown, told = pictures[start : start + AT_ONCE], prompts[start : start + AT_ONCE]
            words = self.tokenizer(
                told, padding="max_length", max_length=self.positions, truncation=True, return_tensors="pt"
            )
            values = self.processor(shown, return_tensors="pt")
            outputs = self.model(**words.to(self.model.device), **values.to(self.model.device))
            found += F.cosine_similarity(outputs.image_embeds, outputs.text_embeds, dim=-1).tolist()
        return found


class IdentitySimilarity:
    """The cosine of DINO's features, its class token after the last norm, of two pictures that are black around."""

    def __init__(self, name: str = DINO, device: torch.device | str = "cpu"):
        folder = find_helper(name, "--dino")
        model, self.processor = load_helper(folder, "vit", "ViTModel", "ViTImageProcessorPil", add_pooling_layer=False)
        self.model = model.to(device)

    @torch.inference_mode()
    def identity_similarity(
        self,
        pictures: list[Image.Image],
        image: Image.Image,
        mask: np.ndarray,
        segments: list[np.ndarray] | None = None,
    ) -> list[float]:
        """For each picture in [-1, 1]: how alike the concept is. mask, segments: (H, W) in 0..1, of their pictures.

        Without `segments` the whole of each picture is compared, its background too.
        """
        shown = blacken_each(pictures, segments)
        (wanted,) = self._features([blacken(image, mask)])
        found: list[float] = []
        for start in range(0, len(shown), AT_ONCE):
            features = self._features(shown[start : start + AT_ONCE])
            found += F.cosine_similarity(features, wanted[None], dim=-1).tolist()
        return found

    def _features(self, pictures: list[Image.Image]) -> Tensor:
        """(n, d)"""
        values = self.processor(pictures, return_tensors="pt")
        return self.model(**values.to(self.model.device)).last_hidden_state[:, 0]


class Metrics:
    """Both similarities of the evaluation behind one name."""

    def __init__(self, prompt: PromptSimilarity, identity: Identity):
        self.prompt_similarity = prompt.prompt_similarity
        self.identity_similarity = identity.identity_similarity

    @classmethod
    def photographs(cls, device: torch.device | str = "cpu", clip: str = CLIP, dino: str = DINO) -> Metrics:
        """The paper's: CLIP ViT-L/14 and DINO ViT-B/16, or others of their kinds by folder or hub id."""
        return cls(PromptSimilarity(clip, device), IdentitySimilarity(dino, device))

    @classmethod
    def miniature(cls, device: torch.device | str = "cpu", weights: Path | None = None) -> Metrics:
        """The miniature's: its own CLIP towers, and the search for its objects. weights: its folder, if not shipped."""
        towers = (weights or find(None)) / MINI_CLIP
        return cls(PromptSimilarity(str(towers), device), ObjectSimilarity(device))


def in_words(prompt: str, names: dict[str, str]) -> str:
    """A prompt as CLIP can read it: each handle replaced by its class name. names: by handle"""
    for handle, name in names.items():
        prompt = prompt.replace(handle, name)
    return prompt


def leakage(
    identity: Identity, pictures: list[list[Image.Image]], image: Image.Image, masks: list[np.ndarray]
) -> np.ndarray:
    """Does handle i draw concept j? (N, N): the mean similarity of i's pictures to the object under mask j.

    pictures: for each handle, those that show it alone. Where nothing leaks, the diagonal is the largest of its row.
    """
    rows = [[np.mean(identity.identity_similarity(drawn, image, mask)) for mask in masks] for drawn in pictures]
    return np.array(rows)


def attention_iou(maps: Tensor, masks: Tensor) -> list[float]:
    """Intersection over union of each map above half its maximum with its mask. maps: (N, h, w), masks: (N, H, W)"""
    looked = maps > 0.5 * maps.amax(dim=(-2, -1), keepdim=True)
    wanted = resize_mask(masks, *maps.shape[-2:]) > 0.5
    both, either = (looked & wanted).sum(dim=(-2, -1)), (looked | wanted).sum(dim=(-2, -1))
    return (both / either.clamp(min=1)).tolist()
