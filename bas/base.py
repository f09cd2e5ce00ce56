"""A base model in memory: read once, then trained on one scene after another, each time from the weights it had."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bas.checkpoint import Models, weights_hash
from bas.class_images import class_images
from bas.config import TrainConfig
from bas.models.vae import Posterior

TRAINED = ("unet", "text_encoder")  # the networks that a training can change


class Base:
    """The models at `path`, and with `keep` a copy of what training changes, in the host's memory.

    Weights are restored in place, so a later scene computes with the same addresses, and the same bits, as the first.
    """

    def __init__(self, path: Path, models: Models, keep: bool = False):
        self.path, self.hash, self.models = path, weights_hash(path), models
        self.embedding, self.tokenizer = models.text_encoder.get_input_embeddings(), deepcopy(models.tokenizer)
        self.kept = {name: self._copy(name) for name in TRAINED} if keep else {}
        self.encoded: dict[tuple, tuple[Posterior, str]] = {}

    def _copy(self, network: str) -> dict[str, Tensor]:
        state = getattr(self.models, network).state_dict()
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def fresh(self) -> Models:
        """The models as they were read, without handles and gradients, whatever was done with them since."""
        if self.kept:
            self.models.text_encoder.set_input_embeddings(self.embedding)
        for name, state in self.kept.items():
            network = getattr(self.models, name)
            network.load_state_dict(state)
            network.zero_grad(set_to_none=True)
        return replace(self.models, tokenizer=deepcopy(self.tokenizer))

    def class_images(self, config: TrainConfig, size: tuple[int, int]) -> tuple[Posterior, str]:
        """`bas.class_images.class_images` of fresh models, computed once for all scenes of one size and settings."""
        made_with = (config.class_prompt, config.num_class_images, config.class_data_dir, config.mixed_precision)
        key = (size, config.seed, *made_with)
        if key not in self.encoded:
            self.encoded[key] = class_images(self.models, config, self.hash, size)
        return self.encoded[key]
