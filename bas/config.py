"""Every setting of bas: training, sampling, masks, evaluation.

A setting is one row: default, help, and range or choices. Flags, settings files and Python share the row, and
`check_setting` checks them all. Which settings suit what is in bas/presets.py, the networks' configurations are in
bas/models/config.py.
"""

import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Self

from bas.errors import (
    MAX_SIDE,
    InputError,
    check_bool,
    check_choice,
    check_float,
    check_int,
    did_you_mean,
    is_utf8,
    shown,
)
from bas.presets import (
    CARDS,
    GUIDANCE,
    KINDS,
    LORA_TARGETS,
    METHODS,
    OF_ADAPTERS,
    OPTIMIZERS,
    PLAIN,
    PRESETS,
    Kind,
    Part,
    Phase,
)

MAX_COUNT = 1_000_000  # steps, images, examples
MAX_SEED = 2**62
MAX_RANK = 1024
MAX_BATCH = 1024
MAX_COLLECTION = 500  # images, all in memory
COUNTS = {"least": 0, "most": MAX_COUNT}  # the limits of whole numbers, unless a setting's row has others
NUMBERS = {"least": 0, "most": math.inf}
ANY = {"least": -math.inf, "most": math.inf}
POLYNOMIAL_END = 1e-7  # the learning rate at which the polynomial schedule ends, as in diffusers
RUNS = "runs"  # folder of the run folders, where none is named

# The headings of the help, in this order. The flags that people use first have a heading of their own.
GROUPS = ("used most", "scene", "method", "training", "memory and speed", "output", "expert")


# --- A setting and its check --------------------------------------------------------------------------------------


def setting(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    common: bool = False,
    flag: tuple[str, ...] = (),
    bare: str | None = None,
    choices: tuple[str, ...] = (),
    same: Mapping[str, str] = types.MappingProxyType({}),
    empty: bool = False,
    **limits: float,
) -> Any:
    """Make a dataclass field that holds one setting.

    group, common: the heading of its flag in the help, and whether it is among the flags that people use first.
    flag: other names of its flag; of a switch that is on by default, the flags that turn it off.
    bare: the value that the flag has without one.
    choices: all the values that a text can have. same: other words, each with the choice that it means.
    empty: whether a list may be empty although its default is not.
    limits: `least` and `most`, which belong to the range, or `above` and `below`, which do not.
    """
    assert limits.keys() <= {"least", "most", "above", "below"}, limits
    row = {"help": help, "group": group, "common": common, "flag": flag, "choices": choices}
    row |= {"same": same, "empty": empty, "limits": limits}
    return field(default=default, metadata=row if bare is None else {**row, "bare": bare})


def flag_of(row: Field) -> str:
    """Return the flag of a setting: the shorter one, or the one that turns it off."""
    return next(iter(row.metadata["flag"]), f"--{row.name}")


def value_type(row: Field) -> tuple[type, bool, bool]:
    """Return the type of one value, whether the setting takes several, and whether it may be None."""
    if typing.get_origin(row.type) is tuple:
        return typing.get_args(row.type)[0], True, False
    if isinstance(row.type, types.UnionType):
        return next(kind for kind in typing.get_args(row.type) if kind is not types.NoneType), False, True
    return typing.cast(type, row.type), False, False


def check_setting(row: Field, value: Any, name: str, limits: bool = True) -> Any:
    """Return a value as its setting takes it: a list as a tuple, a path as text. InputError if it is wrong.

    Without `limits`, only its type is checked, not the range or the choices.
    """
    kind, several, optional = value_type(row)
    if several and row.default and value in ([], ()) and not row.metadata["empty"]:
        raise InputError(f"{name} is empty: leave it out, or name one or several")
    if several and isinstance(value, (list, tuple)):
        return tuple(check_one(row, kind, each, name, limits) for each in value)
    if several:
        raise InputError(f"{name} is {shown(value)}: expected a list")
    if value == "" and row.default != "":  # for example an unset variable of the shell
        raise InputError(f"{name} is empty: leave it out, or give it a value")
    return None if value is None and optional else check_one(row, kind, value, name, limits)


def check_one(row: Field, kind: type, value: Any, name: str, limits: bool) -> Any:
    """Return one value of a setting, of the given type. InputError if it is wrong."""
    if kind is bool:
        return check_bool(name, value)
    if kind is int:
        return check_int(name, value, **(COUNTS | row.metadata["limits"] if limits else ANY))
    if kind is float:
        return float(check_float(name, value, **(NUMBERS | row.metadata["limits"] if limits else ANY)))
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise InputError(f"{name} is {shown(text)}: expected a string")
    if not is_utf8(text):  # the files of a run are UTF-8
        raise InputError(f"{name} {text!r} is not UTF-8: rename it")
    if "\0" in text:  # as TOML and JSON can write it
        raise InputError(f"{name} is {shown(text)}: it holds the character 0, which no name and no prompt has")
    return chosen(row, name, text) if limits and row.metadata["choices"] else text


def chosen(row: Field, name: str, text: str) -> str:
    """Return the choice that a word means. InputError for a word that means none."""
    return check_choice(name, row.metadata["same"].get(text, text), row.metadata["choices"])


def setting_rows(kind: type) -> dict[str, Field]:
    """Return the settings of a dataclass by name."""
    return {row.name: row for row in fields(kind)}


@dataclass(frozen=True)
class Settings:
    """A dataclass of settings that checks every value when it is made."""

    def __post_init__(self):
        for row in fields(self):
            name = f"--{row.name}" if row.type is bool else flag_of(row)
            object.__setattr__(self, row.name, check_setting(row, getattr(self, row.name), name))

    def changed(self, **values: Any) -> Self:
        """Return a copy with these values. InputError for one that is wrong, or of an unknown setting."""
        known = setting_rows(type(self))
        for name in sorted(values.keys() - known.keys()):
            raise InputError(f"unknown setting {name}{did_you_mean(name, known)}")
        return replace(self, **values)


# --- Training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of `bas train`.

    Those of the official train.py keep their names, and the defaults that decide the result.
    """

    instance_data_dir: str = setting(
        "", "the scene: a folder with img.* and mask0.png, mask1.png, ...", group="scene", common=True
    )
    pretrained_model_name_or_path: str | None = setting(
        None,
        "base model: a folder, a single .safetensors file or a known name (default: the shipped miniature)",
        group="scene",
        common=True,
        flag=("--weights",),
    )
    lora: tuple[str, ...] = setting(
        (), "LoRA files to add to the base model, FILE or FILE:WEIGHT, such as a style", group="scene"
    )
    embedding: tuple[str, ...] = setting((), "embedding files to add to the base model, as <FILE>", group="scene")
    prediction_type: str | None = setting(
        None,
        "what the base model predicts, if its files do not say it or say it wrongly",
        group="expert",
        choices=("epsilon", "v_prediction"),
    )
    output_dir: str = setting(
        "",
        "the run folder to write (default: runs/SCENE); for several scenes, the folder of their runs (default: runs)",
        group="output",
        common=True,
    )
    num_of_assets: int | None = setting(
        None, "number of concepts, checked against the masks (default: as many as masks)", group="scene", least=1
    )
    initializer_tokens: tuple[str, ...] = setting(
        (), "one word per concept to start its handle from", group="scene", common=True
    )
    placeholder_token: str = setting(
        "<asset>", "pattern of the handles: <asset> gives <asset0>, <asset1>, ...", group="scene"
    )
    handles: tuple[str, ...] = setting(
        (),
        "the handles by name, e.g. toy bowl for <toy> <bowl> (default: made from --placeholder_token)",
        group="scene",
        common=True,
    )
    background_handle: str | None = setting(
        None, "also learn the background, which no mask covers: its handle, e.g. bg for <bg>", group="scene"
    )
    close_ups: bool = setting(
        False, "also train on close-ups of each set of concepts; for small concepts", group="scene"
    )
    resolution: int | None = setting(
        None,
        "pixels of the image's shorter side (default: what the model was trained for)",
        group="scene",
        least=1,
        most=MAX_SIDE,
    )
    center_crop: bool = setting(
        False, "crop to a square; otherwise the image keeps its shape, up to rounding", group="scene"
    )

    # The method (paper, section 3); each part can be turned off
    method: str = setting(
        "bas",
        "Break-A-Scene, or a baseline: Textual Inversion, DreamBooth, Custom Diffusion; -m learns from masked concepts",
        group="method",
        choices=("bas", *METHODS),
    )
    collection_size: int = setting(
        30,
        "images that a -m method learns from: concepts pasted on plain colours",
        group="method",
        least=1,
        most=MAX_COLLECTION,
    )
    preset: str = setting(
        "official",
        "settings of the official code, or those the paper states",
        group="method",
        choices=tuple(PRESETS),
    )
    phase1_train_steps: int = setting(
        400, "steps that train the handles alone; 0 skips phase 1", group="training", common=True
    )
    phase2_train_steps: int = setting(
        400, "steps that train the UNet and the text encoder as well; 0 skips phase 2", group="training", common=True
    )
    initial_learning_rate: float = setting(5e-4, "learning rate of phase 1", group="training")
    learning_rate: float = setting(2e-6, "learning rate of phase 2", group="training")
    train_text_encoder: bool = setting(
        True,
        "also train the text encoder in phase 2; with --train lora, its adapters; kv, v and token leave it frozen",
        group="method",
        flag=("--no_train_text_encoder",),
    )
    train: str = setting(
        "full",
        "what phase 2 trains beside the handles. full: the whole UNet and all token embeddings; cross_attention: the "
        "same, but only cross-attention of the UNet; kv: its keys and values alone; v: its values alone; lora: "
        "low-rank adapters; token: adapters of keys and values that act at the handles' own tokens. The last four "
        "write small runs",
        group="method",
        choices=tuple(KINDS),
    )
    rank: int = setting(16, "with --train lora or token: rank of the adapters", group="method", least=1, most=MAX_RANK)
    alpha: float | None = setting(
        None,
        "with --train lora or token: the adapters are scaled by alpha / rank (default: the rank)",
        group="method",
        above=0,
        most=1000,
    )
    lora_targets: str = setting(
        "transformer",
        "with --train lora: layers that have adapters. kv: keys and values of the UNet's cross-attention; attention: "
        "all of its attention; transformer: also feed-forward layers and projections, and the text encoder's MLPs",
        group="method",
        choices=tuple(LORA_TARGETS),
    )
    conv_rank: int | None = setting(
        None,
        "with --train lora: also adapt residual blocks, downsamplers and upsamplers; this is the rank of their 3x3 "
        "convolutions",
        group="method",
        least=1,
        most=MAX_RANK,
    )
    apply_masked_loss: bool = setting(
        True,
        "take the reconstruction loss only inside the masks (eq. 1)",
        group="method",
        flag=("--do_not_apply_masked_loss",),
    )
    normalize_masked_loss: bool = setting(
        False,
        "divide the masked loss by the masked area, so that small concepts weigh as much as large ones",
        group="method",
    )
    lambda_attention: float = setting(1e-2, "weight of the cross-attention loss; 0 turns it off", group="method")
    attention_loss: str = setting(
        "mse",
        "mse: squared error between each scaled map and its mask; cross_entropy: cross-entropy between the handles' "
        "shares of each cell and the masks",
        group="method",
        choices=("mse", "cross_entropy"),
    )
    attention_grid: int | None = setting(
        None,
        "cells along the shorter side of the maps that the loss reads (default: a quarter of the latent's)",
        group="expert",
        least=1,
        most=MAX_SIDE,
    )
    subset_sampling: str = setting(
        "union",
        "how a step samples its concepts. union: first a size, then a subset; uniform: every subset equally likely; "
        "single: one concept; all: all concepts",
        group="method",
        choices=("union", "uniform", "single", "all"),
    )
    flip_probability: float = setting(0.5, "probability of mirroring image and masks", group="method", most=1)
    seg_mix_probability: float = setting(
        0.0, "probability of pasting the concepts at other places and sizes in a step (Seg-Mix)", group="method", most=1
    )
    seg_mix_move: float = setting(
        1.0, "how far Seg-Mix moves concepts: 1 anywhere, 0 only onto other backgrounds", group="method", most=1
    )
    seg_mix_cells: bool = setting(
        False,
        "Seg-Mix keeps sizes and moves concepts by whole cells of the UNet's coarsest grid; --seg_mix_move is then the "
        "probability that a concept moves",
        group="method",
    )
    with_prior_preservation: bool = setting(
        True,
        "also train on class images, so that the model keeps what it knew",
        group="method",
        flag=("--no_prior_preservation",),
    )
    prior_loss_weight: float = setting(1.0, "weight of the prior preservation loss", group="method")
    exact_phase1: bool = setting(
        False,
        "compute phase 1 as the official code does: with the prior loss, and clipping over all token embeddings",
        group="expert",
    )

    # Class images for prior preservation
    class_prompt: tuple[str, ...] = setting(
        ("a photo at the beach",), "prompt, or several, of the class images", group="training"
    )
    num_class_images: int = setting(100, "number of class images", group="training", least=1)
    class_data_dir: str | None = setting(
        None, "folder of class images; missing ones are generated (default: a shared cache)", group="training"
    )
    sample_batch_size: int = setting(4, "class images generated at once", group="memory and speed", least=1)

    # Optimisation
    train_batch_size: int = setting(
        1, "examples per step, each with one class image beside it", group="training", least=1, most=MAX_BATCH
    )
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step", group="training", least=1)
    optimizer: str = setting(
        "adamw",
        "the optimizer; adamw8bit keeps its moments in 8 bits and needs bitsandbytes",
        group="memory and speed",
        choices=("adamw", "adam", "adamw8bit"),
    )
    adam_beta1: float = setting(0.9, "decay of the first moment", group="expert", below=1)
    adam_beta2: float = setting(0.999, "decay of the second moment", group="expert", below=1)
    adam_weight_decay: float = setting(1e-2, "weight decay; with --optimizer adam the default is 1e-8", group="expert")
    adam_epsilon: float = setting(1e-8, "epsilon of the optimizer", above=0, group="expert")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 turns clipping off", group="expert")
    scale_lr: bool = setting(False, "multiply both learning rates by batch size x accumulation steps", group="training")
    lr_scheduler: str = setting(
        "constant",
        "learning rate schedule of each phase",
        group="training",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
        ),
    )
    lr_warmup_steps: int = setting(0, "steps of linear warm-up in each phase", group="training")
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts", group="expert", least=1)
    lr_power: float = setting(1.0, "power of the polynomial schedule", group="expert")

    # Machine
    device: str | None = setting(
        None, "cpu, cuda or cuda:N (default: cuda if there is a GPU)", group="memory and speed"
    )
    mixed_precision: str = setting(
        "auto",
        "arithmetic: no, or fp32, is float32; bf16 keeps float32 master weights; auto is bf16 if the GPU has it, else "
        "fp16; on a CPU, auto is no, or bf16 if the processor has it and the model is not tiny",
        group="memory and speed",
        choices=("auto", "no", "fp16", "bf16"),
        same={"fp32": "no"},
    )
    card: str = setting(
        "any",
        "fit Stable Diffusion 2.1 at 512x512, or SDXL at 1024x1024, into this GPU memory (counted). 24gb recomputes "
        "activations; 16gb also keeps 8-bit moments; 12gb recomputes activations and trains only cross-attention of "
        "the UNet; 8gb trains adapters instead; 6gb trains adapters of the UNet alone. For SDXL, 80gb recomputes "
        "activations; 40gb also keeps 8-bit moments; 24gb recomputes activations and trains only cross-attention of "
        "the UNet; 16gb trains only its keys and values, with 8-bit moments; 12gb trains adapters instead",
        group="memory and speed",
        common=True,
        choices=tuple(CARDS),
    )
    allow_tf32: bool = setting(False, "allow TF32 in float32 products on the GPU", group="memory and speed")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower", group="memory and speed"
    )
    compile: str = setting(
        "no",
        "torch.compile: whole (also without a value) compiles the UNet as one graph; regional compiles its blocks and "
        "starts sooner",
        group="memory and speed",
        choices=("no", "regional", "whole"),
        bare="whole",
    )
    seed: int = setting(0, "seed of every random number", group="training", common=True, least=-MAX_SEED, most=MAX_SEED)
    deterministic: bool = setting(
        False, "use only GPU kernels that give the same bits on every run: slower", group="expert"
    )

    # Watching, saving, resuming
    log_steps: int = setting(10, "steps between two readings of the losses from the device", group="output", least=1)
    report_to: str = setting(
        "none",
        "also write the losses and previews for TensorBoard, which needs the package tensorboard",
        group="output",
        choices=("none", "tensorboard"),
    )
    img_log_steps: int = setting(200, "steps between previews; 0 for none", group="output")
    preview_inference_steps: int = setting(25, "denoising steps of a preview image", group="output", least=1)
    checkpointing_steps: int = setting(200, "steps between resumable checkpoints; 0 for none", group="output")
    checkpoints_total_limit: int = setting(
        1, "number of checkpoints to keep; the oldest is removed", group="output", least=1
    )
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint folder, or 'latest' for the newest in --output_dir", group="output", common=True
    )
    save_precision: str = setting(
        "fp32",
        "precision of the saved model; with --train lora or token the default is fp16",
        group="output",
        choices=("fp32", "fp16", "bf16"),
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.output_dir and self.instance_data_dir:
            scene = os.path.basename(os.path.abspath(self.instance_data_dir))
            object.__setattr__(self, "output_dir", os.path.join(RUNS, scene))
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise InputError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: --lr_scheduler constant has no warm-up; "
                "use constant_with_warmup"
            )
        if self.method in METHODS:
            differs = [name for name, value in PLAIN.items() if getattr(self, name) != value]
            if differs:
                raise InputError(f"--method {self.method} has no {', '.join(differs)} of its own: leave it out")

    @property
    def kind(self) -> Kind:
        """The row of `--train`."""
        return KINDS[self.train]

    @property
    def adapter_scale(self) -> float:
        """The factor of the adapters' change of a weight: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def reads_maps(self) -> bool:
        """Whether a step or a preview reads attention maps."""
        return self.lambda_attention > 0 or self.img_log_steps > 0

    @property
    def tuned(self) -> tuple[Part, ...]:
        """What phase 2 trains."""
        text = (self.kind.text,) if self.kind.text and self.train_text_encoder else ()
        return ("handles", *self.kind.weights, *text)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The training plan (paper, section 3): the handles first, then all weights. A baseline has one phase."""
        scale = self.train_batch_size * self.gradient_accumulation_steps if self.scale_lr else 1
        prior = self.with_prior_preservation
        if self.method in METHODS:
            row, steps = METHODS[self.method], self.phase1_train_steps + self.phase2_train_steps
            trains = self.tuned if row.trains is None else row.trains
            phase = Phase(self.method, steps, row.factor * getattr(self, row.rate) * scale, trains, prior and row.prior)
            return (phase,) if steps else ()
        # Phase 1 leaves the prior out: the class prompt holds no handle, so its gradient is exactly zero.
        plan = (
            Phase(
                "phase1",
                self.phase1_train_steps,
                self.initial_learning_rate * scale,
                ("handles",),
                prior and self.exact_phase1,
                clips=("embedding",) if self.exact_phase1 else (),
            ),
            Phase("phase2", self.phase2_train_steps, self.learning_rate * scale, self.tuned, prior),
        )
        return tuple(phase for phase in plan if phase.steps)

    @classmethod
    def resolve(
        cls,
        explicit: dict,
        model_row: dict | None = None,
        cards: dict[str, dict] = CARDS,
        file: dict | None = None,
    ) -> "TrainConfig":
        """Merge the layers of settings, later ones winning: defaults, bas.json, preset, card, method, explicit flags.

        The resulting optimizer adds its own defaults (OPTIMIZERS). So does the kind of training, whose defaults also
        replace those settings of bas.json that were made for another. Settings of a file count as flags, but for those
        that `beside_flags` leaves out. InputError for an unknown or wrong setting.
        """
        explicit = beside_flags(file or {}, explicit, model_row or {}, cards) | explicit
        if explicit.get("output_dir") == "":  # a shell variable that is not set
            raise InputError(f"--output_dir is empty: leave it out for {RUNS}/SCENE, or name a folder")
        preset = PRESETS.get(explicit.get("preset", ""), {})
        card = cards.get(explicit.get("card", ""), {})
        if explicit.get("card") in CARDS.keys() - cards.keys():
            raise InputError(f"--card {explicit['card']}: this version trains SDXL on cards from {[*cards][-1]} up")
        method = METHODS[explicit["method"]].brings if explicit.get("method") in METHODS else {}
        row = model_row or {}
        layers = {**preset, **card, **method, **explicit}
        own = row.get("train", "full")
        kind = layers.get("train", own)
        defaults = KINDS[kind].defaults if kind in KINDS else {}
        row = defaults | row if kind == own else row | defaults
        merged = row | layers
        merged = OPTIMIZERS.get(merged.get("optimizer", ""), {}) | merged
        chosen = merged.get("method")
        if kind != "full" and chosen in METHODS and METHODS[chosen].trains is not None and "train" in explicit:
            raise InputError(f"--method {chosen} decides what is trained: leave out --train {explicit['train']}")
        known = setting_rows(cls)
        for name in OF_ADAPTERS:
            changed = explicit.get(name, known[name].default) != known[name].default
            if changed and kind in KINDS and name not in KINDS[kind].reads:
                raise InputError(f"--{name} has no effect with --train {kind}: leave it out")
        for name in sorted(merged.keys() - known.keys()):
            raise InputError(f"unknown training setting {name}{did_you_mean(name, known)}")
        return cls(**merged)


def beside_flags(file: dict, flags: dict, model_row: dict, cards: dict[str, dict] = CARDS) -> dict:
    """Return the settings of a file that hold beside flags.

    Where flags lead to another preset, card, method, kind of training or optimizer than the file has, what that brings
    replaces the file's values, and what the file's own choice brought is left out.
    """
    rows: dict[str, dict[str, dict]] = {
        "preset": PRESETS,
        "card": cards,
        "method": {name: method.brings for name, method in METHODS.items()},
        "train": {name: kind.defaults for name, kind in KINDS.items()},
        "optimizer": OPTIMIZERS,
    }
    kept, before, after = dict(file), dict(model_row), dict(model_row)  # before, after: what the choices bring
    for name, choices in rows.items():
        old = file.get(name, before.get(name, ""))
        new = flags.get(name, kept.get(name, after.get(name, "")))
        left_out, brought = choices.get(old, {}), choices.get(new, {})
        before |= left_out
        after |= brought
        if new != old:
            kept = {k: v for k, v in kept.items() if k not in brought and (k, v) not in left_out.items()}
            if name == "train" and new in KINDS:
                kept = {k: v for k, v in kept.items() if k not in OF_ADAPTERS or k in KINDS[new].reads}
    return kept


# --- Sampling -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Settings of one sampling call. Names are those of diffusers' pipelines."""

    negative_prompt: str = setting("", "what the images should not show")
    num_inference_steps: int = setting(50, "denoising steps", least=1)
    guidance_scale: float | None = setting(
        None,
        f"strength of the prompt (classifier-free guidance); 1 or less: off (default: the model's own, or {GUIDANCE})",
    )
    sampler: str = setting(
        "ddim", "sampler", choices=("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_karras", "euler", "euler_a")
    )
    guidance_rescale: float = setting(
        0.0, "how far guided predictions return to the spread of unguided ones: 0.7 for zero terminal SNR", most=1
    )
    eta: float = setting(0.0, "noise added back by ddim: 0 is deterministic, 1 is like ddpm", most=1)
    steps_offset: int | None = setting(
        None, "shift of evenly spaced timesteps (default: the model's own; the official inference script has 0)"
    )
    num_images: int = setting(1, "images per prompt", least=1)
    seed: int = setting(
        0, "seed of the first image; each further image takes the next one", least=-MAX_SEED, most=MAX_SEED
    )
    height: int | None = setting(
        None, "image rows in pixels (default: what the model was trained for)", least=1, most=MAX_SIDE
    )
    width: int | None = setting(
        None, "image columns in pixels (default: what the model was trained for)", least=1, most=MAX_SIDE
    )
    batch_size: int = setting(4, "images denoised at once", least=1)
    separate: bool = setting(False, "keep the attention of the prompt's handles apart while denoising")
    layout: str | None = setting(
        None, 'JSON with the region of each handle: {"<asset0>": [left, top, right, bottom] or a mask file, ...}'
    )
    own_pixels: bool = setting(False, "with --layout, start from the concepts' own pixels in the scene of the run")


# Settings of images that are steered. Class images and evaluations are not.
STEERING = ("separate", "layout", "own_pixels")


@dataclass(frozen=True)
class VaryConfig(SampleConfig):
    """Settings of `bas vary`."""

    num_images: int = setting(9, "images, each from its own seed", least=1)


@dataclass(frozen=True)
class EditConfig(SampleConfig):
    """Settings of `bas edit`. Names are those of the Blended Latent Diffusion script, where it has them."""

    num_images: int = setting(1, "results, each from its own seed", least=1)
    height: int | None = setting(
        None, "rows of pixels to edit at (default: as the model was trained for)", least=1, most=MAX_SIDE
    )
    width: int | None = setting(
        None, "columns of pixels to edit at (default: as the model was trained for)", least=1, most=MAX_SIDE
    )
    blending_start_percentage: float = setting(
        0.25, "share of the denoising steps to skip, 0 to 1; a larger share keeps more of the image", below=1
    )
    composite: bool = setting(True, "put the original pixels back outside the mask", flag=("--no_composite",))


# --- Masks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProposalConfig(Settings):
    """Settings of `bas masks --auto`."""

    segmenter: str | None = setting(None, "the model: a folder or a hub id (default: a known one for each method)")
    points: tuple[str, ...] = setting((), "sam: x,y in pixels, one concept each; several points of one as x,y+x,y")
    boxes: tuple[str, ...] = setting((), "sam: x0,y0,x1,y1 in pixels, one concept each")
    words: tuple[str, ...] = setting(
        (), "clipseg: what to find, one concept each; the word is its handle's initial word"
    )
    threshold: float = setting(
        0.5, "least probability of a pixel in a mask; of a mask2former segment, its least score", above=0, below=1
    )
    smooth: float = setting(0.0, "radius in pixels over which outlines are rounded and specks removed", most=1000)
    grow: int = setting(0, "pixels by which masks grow, or shrink if negative", least=-1000, most=1000)
    max_concepts: int = setting(
        4, "number of concepts to keep, the largest ones, if the method searches the whole image", least=1
    )
    min_coverage: float = setting(0.01, "smallest share of the image that such a concept covers", above=0, below=1)


@dataclass(frozen=True)
class CocoConfig(Settings):
    """Settings of `bas coco`: the rules of the paper's data set (appendix)."""

    scenes: int = setting(50, "number of scenes", least=1)
    seed: int = setting(0, "seed of the choice", most=MAX_SEED)
    min_things: int = setting(2, "smallest number of concepts of a scene, of distinct classes", least=1)
    max_things: int = setting(4, "largest number of concepts of a scene; the largest segments are taken", least=1)
    min_share: float = setting(0.15, "smallest share of the square that each concept covers", above=0, below=1)
    dropped: tuple[str, ...] = setting(
        ("orange", "banana", "broccoli", "carrot", "zebra", "giraffe"),
        "classes that are not used as concepts",
        empty=True,
    )

    def __post_init__(self):
        super().__post_init__()
        check_int("--max_things", self.max_things, self.min_things, MAX_COUNT)


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Settings of `bas study`."""

    pages: int = setting(
        5, "number of pages, each with other images; several participants may answer one page", least=1, most=1000
    )
    questions: int = setting(
        30, "largest number of images on a page; each method has the same number", least=2, most=500
    )
    seed: int = setting(0, "seed of the choice of images and of their order", most=MAX_SEED)
