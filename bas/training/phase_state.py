"""What a phase trains: groups of parameters by name, and the state that its steps change."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from bas.config import TrainConfig
from bas.models.bundle import Models, weight_groups
from bas.models.text import HandleEmbedding
from bas.presets import Phase
from bas.training.checkpoints import Checkpoint, restore_optimizer
from bas.training.master_weights import Float32Values, MasterWeights
from bas.training.optimizer import build_optimizer


@dataclass(frozen=True)
class PhaseState:
    """What the steps of one phase change."""

    weights: MasterWeights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss; it does nothing unless the precision is fp16
    precision: str  # "no", "fp16" or "bf16"


def handle_embeddings(models: Models) -> list[HandleEmbedding]:
    """Return the token embedding of each text encoder of models that have handles."""
    embeddings = [text_encoder.get_input_embeddings() for text_encoder in models.text_encoders]
    assert all(isinstance(embedding, HandleEmbedding) for embedding in embeddings), "add_handles comes first"
    return cast("list[HandleEmbedding]", embeddings)


def parameter_groups(models: Models) -> dict[str, dict[str, nn.Parameter]]:
    """Return the groups of weights that a phase can name in `Phase.trains`, by the parameters' names in checkpoints."""
    ends = [component.removeprefix("text_encoder") for component in models.text_networks]  # "", and "_2" for SDXL
    embeddings = list(zip(ends, handle_embeddings(models), strict=True))
    own = {
        "handles": {f"handles{end}": embedding.handles for end, embedding in embeddings},
        "embedding": {f"embedding{end}": embedding.weight for end, embedding in embeddings},
    }
    return {**own, **weight_groups(models)}


def trained_weights(models: Models, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Return all weights that the phases of a training train, by name."""
    groups = parameter_groups(models)
    return {name: p for phase in config.phases for group in phase.trains for name, p in groups[group].items()}


def trainable_parameters(models: Models, phase: Phase) -> dict[str, nn.Parameter]:
    """Freeze everything but what this phase trains, and return that by name, in a fixed order."""
    groups = parameter_groups(models)
    for module in models.networks.values():
        module.requires_grad_(False)
    optimized = {name: p for group in phase.trains for name, p in groups[group].items()}
    for parameter in optimized.values():
        parameter.requires_grad_(True)
    return optimized


def build_phase_state(
    models: Models, phase: Phase, config: TrainConfig, precision: str, exact: Float32Values
) -> PhaseState:
    """Build the state at the beginning of a phase: its master weights, a fresh optimizer and loss scale."""
    optimized = trainable_parameters(models, phase)
    groups = parameter_groups(models) if phase.clips else {}
    with_grad = {name: p for group in phase.clips for name, p in groups[group].items()}
    for parameter in with_grad.values():
        parameter.requires_grad_(True)
    weights = MasterWeights(optimized, exact, with_grad)
    return PhaseState(
        weights=weights,
        optimizer=build_optimizer(weights.optimized.values(), config),
        scaler=torch.amp.GradScaler(models.device.type, enabled=precision == "fp16"),
        precision=precision,
    )


def restore_phase(state: PhaseState, checkpoint: Checkpoint, within: bool) -> None:
    """Copy a checkpoint's weights into a phase's, and with `within`, if it is of this phase, the optimizer's state."""
    with torch.no_grad():
        for name, parameter in state.weights.optimized.items():
            parameter.copy_(checkpoint.tensors[f"trained.{name}"])
    state.weights.copy_to_model()
    if within:
        restore_optimizer(state.optimizer, checkpoint.tensors)
        state.scaler.load_state_dict(checkpoint.scaler)
