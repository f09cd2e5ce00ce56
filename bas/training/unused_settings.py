"""Settings of a training that are given and change nothing, because another one turns off what they belong to."""

from collections.abc import Callable, Iterable

import torch

from bas.config import TrainConfig
from bas.presets import METHODS, OF_ADAPTERS

Used = Callable[[TrainConfig], bool]
USED: tuple[tuple[tuple[str, ...], Used, str], ...] = (  # settings, whether they are used, else the reason
    (
        ("num_class_images", "class_prompt", "class_data_dir", "prior_loss_weight", "sample_batch_size"),
        lambda config: any(phase.prior for phase in config.phases),
        "this training takes no class images",
    ),
    (
        ("initial_learning_rate", "exact_phase1"),
        lambda config: config.method in METHODS or config.phase1_train_steps > 0,
        "--phase1_train_steps 0 leaves out phase 1",
    ),
    (
        ("learning_rate", "train", "train_text_encoder", *OF_ADAPTERS),
        lambda config: config.method in METHODS or config.phase2_train_steps > 0,
        "--phase2_train_steps 0 leaves out phase 2",
    ),
    (
        ("initial_learning_rate",),
        lambda config: rate_of(config) in (None, "initial_learning_rate"),
        "this --method trains at --learning_rate",
    ),
    (
        ("learning_rate",),
        lambda config: rate_of(config) in (None, "learning_rate"),
        "this --method trains at --initial_learning_rate",
    ),
    (
        ("train_text_encoder",),
        lambda config: config.method not in METHODS or METHODS[config.method].trains is None,
        "this --method trains no text encoder",
    ),
    (
        ("train_text_encoder",),
        lambda config: config.kind.text is not None,
        "--train kv, v and token leave the text encoder frozen",
    ),
    (
        ("attention_loss",),
        lambda config: config.lambda_attention > 0,
        "--lambda_attention 0 turns off the attention loss",
    ),
    (
        ("attention_grid",),
        lambda config: config.reads_maps,
        "--lambda_attention 0 and --img_log_steps 0 leave no map that is read",
    ),
    (
        ("close_ups",),
        lambda config: config.method not in METHODS or METHODS[config.method].collection,
        "--method ti and db see the whole image alone",
    ),
    (("normalize_masked_loss",), lambda config: config.apply_masked_loss, "the loss is taken without masks"),
    (
        ("seg_mix_move", "seg_mix_cells"),
        lambda config: config.seg_mix_probability > 0,
        "--seg_mix_probability 0 turns off Seg-Mix",
    ),
    (("collection_size",), lambda config: config.method.endswith("-m"), "only a -m method learns from a collection"),
    (
        ("lr_num_cycles",),
        lambda config: config.lr_scheduler == "cosine_with_restarts",
        "only --lr_scheduler cosine_with_restarts uses it",
    ),
    (("lr_power",), lambda config: config.lr_scheduler == "polynomial", "only --lr_scheduler polynomial uses it"),
    (
        ("checkpoints_total_limit",),
        lambda config: config.checkpointing_steps > 0,
        "--checkpointing_steps 0 writes no checkpoint",
    ),
    (("preview_inference_steps",), lambda config: config.img_log_steps > 0, "--img_log_steps 0 draws no preview"),
    (("allow_tf32", "deterministic"), lambda config: not on_cpu(config), "it is for a GPU, and the device is the CPU"),
)


def on_cpu(config: TrainConfig) -> bool:
    """Return whether a training computes on the CPU, by name or because there is no GPU."""
    return not torch.cuda.is_available() if config.device is None else config.device.startswith("cpu")


def rate_of(config: TrainConfig) -> str | None:
    """Return the setting that holds the learning rate of a baseline, None for the paper's method, which has two."""
    return METHODS[config.method].rate if config.method in METHODS else None


def without_effect(config: TrainConfig, usual: TrainConfig, given: Iterable[str]) -> list[str]:
    """List each given setting that differs from the usual one and yet changes nothing: its name and the reason.

    usual: the settings of the same base when none are given.
    """
    changed = {name for name in given if getattr(config, name) != getattr(usual, name)}
    reasons = {name: reason for names, used, reason in USED if not used(config) for name in names}
    return [f"--{name} has no effect: {reason}" for name, reason in reasons.items() if name in changed]
