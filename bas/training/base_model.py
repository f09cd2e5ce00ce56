"""A base model in memory: loaded once, then trained on one scene after another, each time from its first weights."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from bas.config import TrainConfig
from bas.data.batches import ClassImages
from bas.errors import InputError
from bas.models.adapters import remove_adapters
from bas.models.bundle import TEXT_ENCODERS, Models
from bas.models.text import mark_tokens
from bas.pretrained.additions import Additions
from bas.pretrained.folder import load
from bas.pretrained.hashes import base_hash
from bas.schedulers import NoiseSchedule
from bas.training.class_images import class_images

OF_ADAPTERS = {"unet_lora", "unet_token"}  # parts that a phase can train beside the UNet's own weights
TRAINED = ("unet", *TEXT_ENCODERS)  # the networks that a training can change


def home_of(device: torch.device, precision: str) -> torch.device:
    """Return the device that loads the base of a training: for bf16 the CPU, where its weights are rounded.

    So the training device never holds them all in float32.
    """
    return torch.device("cpu") if precision == "bf16" else device


def rounded_at_once(config: TrainConfig, precision: str) -> dict[str, torch.dtype]:
    """Return the networks that are loaded in bf16, by component: the UNet, if a training in bf16 freezes its weights.

    No float32 values of them are needed, neither to train nor to save.
    """
    trained = {part for phase in config.phases for part in phase.trains}
    frozen = not config.kind.whole and not any(part.startswith(("unet", "cross")) for part in trained - OF_ADAPTERS)
    return {"unet": torch.bfloat16} if precision == "bf16" and frozen else {}


class Base:
    """The models at `path`, their weights' hash, and with `keep` a copy of what training changes, in the host's memory.

    Weights are restored in place, so that a later scene computes with the same addresses as the first, and so the same
    bits; only those that a training left in another precision, or moved from where they were loaded, get new ones.
    """

    def __init__(self, path: Path, models: Models, weights: str, keep: bool = False):
        self.path, self.hash, self.models = path, weights, models
        self.embeddings = [text_encoder.get_input_embeddings() for text_encoder in models.text_encoders]
        self.tokenizer = deepcopy(models.tokenizer)
        self.home = models.device
        self.kept = {name: self._copy(name) for name in TRAINED if name in models.networks} if keep else {}
        self.encoded: dict[tuple, tuple[ClassImages, str]] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        device: torch.device,
        weights: str | None = None,
        keep: bool = False,
        prediction_type: str | None = None,
        additions: Additions | None = None,
        own: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> "Base":
        """Load the models at `path` and what is added to them, whose hash is `weights`.

        own: the precision of networks that are not loaded in float32, by component.

        InputError if a file changes meanwhile.
        """
        weights = weights or base_hash(path, additions, remembered=False)
        models = load(path, device=device, prediction_type=prediction_type, additions=additions, own=own)
        if base_hash(path, additions) != weights:
            raise InputError(f"{path} was changed while it was read: start again")
        return cls(path, models, weights, keep)

    def _copy(self, network: str) -> dict[str, Tensor]:
        state = self.models.networks[network].state_dict()
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def fresh(self) -> Models:
        """Return the models as they were loaded, without handles and gradients, however they were trained since."""
        if self.kept:
            for text_encoder, embedding in zip(self.models.text_encoders, self.embeddings, strict=True):
                text_encoder.set_input_embeddings(embedding)
        for name, state in self.kept.items():
            network = self.models.networks[name]
            remove_adapters(network)
            mark_tokens(network, ())
            put_back(network.to(self.home), state)
            network.zero_grad(set_to_none=True)
        return replace(self.models, tokenizer=deepcopy(self.tokenizer))

    def class_images(
        self, config: TrainConfig, size: tuple[int, int], schedule: NoiseSchedule
    ) -> tuple[ClassImages, str]:
        """`class_images.class_images` of fresh models, computed once for all scenes of one size and settings.

        schedule: the noise schedule to generate them with.
        """
        made_with = (config.class_prompt, config.num_class_images, config.class_data_dir, config.mixed_precision)
        key = (size, schedule, config.seed, *made_with)
        if key not in self.encoded:
            self.encoded[key] = class_images(replace(self.models, schedule=schedule), config, self.hash, size)
        return self.encoded[key]


@torch.no_grad()
def put_back(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore the values and the precision of `state` in a network's weights, in place."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name not in state:  # a table that is no weight
            continue
        if tensor.dtype == state[name].dtype:
            tensor.copy_(state[name])
        else:
            tensor.data = state[name].to(tensor.device, copy=True)
