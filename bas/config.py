"""Every setting of bas: training, sampling, masks, evaluation, and the presets as rows of data.

The settings are the single source of the command line: each field is a flag, its help the flag's help. The networks'
own configurations stand in bas/models/config.py.
"""

import os
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from bas.errors import MAX_SIDE, InputError, is_utf8

MAX_COUNT = 1_000_000  # steps, pictures, examples
MAX_SEED = 2**62


# --- Training -----------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, **extra) -> Any:
    """A dataclass field whose help becomes the flag's help; `extra` may hold `flag` (other names), `choices`
    and `bare`, the value of the flag alone."""
    return field(default=default, metadata={"help": help, **extra})


def flag_of(setting: Field) -> str:
    """How a setting is called on the command line: by its shorter flag, or the one that switches it off."""
    return setting.metadata.get("flag", [f"--{setting.name}"])[0]


def _in_range(settings: Any, name: str, least: int, most: int = MAX_COUNT) -> None:
    """InputError unless this setting is a whole number from `least` to `most`, or None."""
    value = getattr(settings, name)
    if value is not None and type(value) is not int:
        raise InputError(f"--{name} is {value!r}: expected a whole number")
    if value is not None and not least <= value <= most:
        expected = f"{least} or more" if value < least else f"{most} or less"
        raise InputError(f"--{name} is {value}: expected {expected}")


def _check_choices(settings: Any) -> None:
    """InputError for a setting that is none of its choices."""
    for f in fields(settings):
        value, choices = getattr(settings, f.name), f.metadata.get("choices")
        if choices and value not in choices:
            raise InputError(f"--{f.name} is {value!r}: expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Phase:
    """One row of the training plan."""

    name: str
    steps: int
    lr: float
    trains: tuple[Literal["handles", "embedding", "unet", "cross_attention", "cross_attention_kv", "text_encoder"], ...]
    prior: bool  # whether class images take part in each step


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of METHODS: a baseline of the paper (section 4.1), trained in one phase with the plain diffusion loss."""

    trains: tuple[str, ...]
    rate: str  # the setting that holds its learning rate
    prior: bool  # whether class images take part, as far as --no_prior_preservation lets them
    collection: bool  # whether it learns from concepts pasted on plain colours, or from the photograph as it is
    factor: float = 1.0  # of the rate


# `official` is the default of every field below; `paper` holds what the paper's text states instead.
PRESETS: dict[str, dict] = {
    "official": {},
    "paper": {
        "optimizer": "adam",
        "adam_beta2": 0.99,
        "with_prior_preservation": False,
    },
}

# Adam adds its decay to the gradient, where AdamW's 1e-2 would outweigh the clipped gradient itself: the paper's 1e-8.
OPTIMIZERS: dict[str, dict] = {"adam": {"adam_weight_decay": 1e-8}}

# The baselines. Each takes as many steps as both phases together, so that all see the same number of examples; their
# rates are those of the phase that trains the same, which by default are the usual ones of the methods: 5e-4 for
# Textual Inversion (Gal et al. 2022), 2e-6 for DreamBooth (Ruiz et al. 2023), 1e-5 for Custom Diffusion (Kumari et al.
# 2023), all as their diffusers examples have them.
EVERYTHING = ("handles", "embedding", "unet", "text_encoder")
METHODS: dict[str, Method] = {
    "ti-m": Method(trains=("handles",), rate="initial_learning_rate", prior=False, collection=True),
    "db-m": Method(trains=EVERYTHING, rate="learning_rate", prior=True, collection=True),
    "cd-m": Method(
        trains=("handles", "cross_attention_kv"), rate="learning_rate", factor=5.0, prior=True, collection=True
    ),
    "ti": Method(trains=("handles",), rate="initial_learning_rate", prior=False, collection=False),
    "db": Method(trains=EVERYTHING, rate="learning_rate", prior=True, collection=False),
}
PLAIN = {"apply_masked_loss": False, "lambda_attention": 0.0, "subset_sampling": "all", "exact_phase1": False}

# How the training of SD 2.1 at 512x512 fits a card, the least harm to the result first. What each gives up: time; the
# moments' precision; the training of the UNet outside its cross-attention, and with it some likeness.
LEAN = {"mixed_precision": "bf16", "gradient_checkpointing": True}
CARDS: dict[str, dict] = {
    "any": {},
    "24gb": LEAN,
    "16gb": LEAN | {"optimizer": "adamw8bit"},
    "12gb": LEAN | {"unet_layers": "cross_attention"},
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `bas train`. Those of the official train.py keep their names, and defaults that decide the result."""

    # What to learn from, and where to put it
    instance_data_dir: str = setting("", "the scene: a folder with img.* and mask0.png, mask1.png, ...")
    pretrained_model_name_or_path: str | None = setting(
        None,
        "base model: a folder, a single .safetensors file or a known name (default: the shipped miniature)",
        flag=["--weights"],
    )
    output_dir: str = setting("outputs", "the run folder to write")
    num_of_assets: int | None = setting(
        None, "number of concepts, checked against the masks (default: as many as masks)"
    )
    initializer_tokens: tuple[str, ...] = setting((), "one word per concept to start its handle from")
    placeholder_token: str = setting("<asset>", "pattern of the handles: <asset> gives <asset0>, <asset1>, ...")
    handles: tuple[str, ...] = setting(
        (), "the handles by name, e.g. toy bowl for <toy> <bowl> (default: made from --placeholder_token)"
    )
    background_handle: str | None = setting(
        None, "learn the background too, all that no mask covers: its handle, e.g. bg for <bg>"
    )
    close_ups: bool = setting(False, "learn from a close-up of each set of concepts as well: for small concepts")
    resolution: int | None = setting(
        None, "pixels of the picture's shorter side (default: what the model was trained for)"
    )
    center_crop: bool = setting(
        False, "crop to a square; otherwise keep the picture's shape, in steps the model can take"
    )

    # The method (paper, section 3); each part can be turned off
    method: str = setting(
        "bas",
        "Break-A-Scene, or a baseline: Textual Inversion, DreamBooth, Custom Diffusion; -m learns from masked concepts",
        choices=("bas", *METHODS),
    )
    collection_size: int = setting(30, "pictures that a -m method learns from: concepts pasted on plain colours")
    preset: str = setting(
        "official", "settings of the official code, or those the paper states", choices=tuple(PRESETS)
    )
    phase1_train_steps: int = setting(400, "steps that train the handles alone; 0 leaves phase 1 out")
    phase2_train_steps: int = setting(400, "steps that train the UNet and the text encoder as well")
    initial_learning_rate: float = setting(5e-4, "learning rate of phase 1")
    learning_rate: float = setting(2e-6, "learning rate of phase 2")
    train_text_encoder: bool = setting(
        True,
        "keep the text tower's layers fixed in phase 2 (all token embeddings still train)",
        flag=["--no_train_text_encoder"],
    )
    unet_layers: str = setting(
        "all",
        "what phase 2 trains of the UNet: everything, or its cross-attention alone",
        choices=("all", "cross_attention"),
    )
    apply_masked_loss: bool = setting(
        True, "take the reconstruction loss over the whole picture", flag=["--do_not_apply_masked_loss"]
    )
    normalize_masked_loss: bool = setting(
        False, "divide the masked loss by the masked area, so small objects weigh as much"
    )
    lambda_attention: float = setting(1e-2, "weight of the cross-attention loss; 0 turns it off")
    attention_loss: str = setting(
        "mse",
        "how maps are drawn onto masks: each scaled map by squared error, or the handles' shares by cross-entropy",
        choices=("mse", "cross_entropy"),
    )
    attention_grid: int | None = setting(
        None, "cells along the shorter side of the maps that the loss reads (default: a quarter of the latent's)"
    )
    subset_sampling: str = setting(
        "union",
        "concepts shown per step: a subset, its size drawn first; any subset, all equally likely; always one; all",
        choices=("union", "uniform", "single", "all"),
    )
    flip_probability: float = setting(0.5, "probability of mirroring image and masks")
    with_prior_preservation: bool = setting(True, "train without class images", flag=["--no_prior_preservation"])
    prior_loss_weight: float = setting(1.0, "weight of the prior preservation loss")
    exact_phase1: bool = setting(
        False, "phase 1 as the official code runs it: with the prior, clipping over the whole embedding"
    )

    # Class images for prior preservation
    class_prompt: tuple[str, ...] = setting(("a photo at the beach",), "prompt, or several, of the class images")
    num_class_images: int = setting(100, "how many class images to use")
    class_data_dir: str | None = setting(
        None, "folder of class images; missing ones are generated (default: a shared cache)"
    )
    sample_batch_size: int = setting(4, "class images generated at once")

    # Optimisation
    train_batch_size: int = setting(1, "examples per step, each with one class image beside it")
    gradient_accumulation_steps: int = setting(1, "batches per optimizer step")
    optimizer: str = setting(
        "adamw", "optimizer; adamw8bit keeps its moments in 8 bits, an extra", choices=("adamw", "adam", "adamw8bit")
    )
    adam_beta1: float = setting(0.9, "decay of the first moment")
    adam_beta2: float = setting(0.999, "decay of the second moment")
    adam_weight_decay: float = setting(1e-2, "weight decay; with --optimizer adam 1e-8 unless given")
    adam_epsilon: float = setting(1e-8, "epsilon of the optimizer")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0 turns it off")
    scale_lr: bool = setting(False, "multiply both learning rates by batch size x accumulation steps")
    lr_scheduler: str = setting(
        "constant",
        "course of the learning rate within each phase",
        choices=(
            "constant",
            "constant_with_warmup",
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
        ),
    )
    lr_warmup_steps: int = setting(0, "steps of linear warm-up in each phase")
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts")
    lr_power: float = setting(1.0, "power of the polynomial schedule")

    # Machine
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: cuda when there is one)")
    mixed_precision: str = setting(
        "auto",
        "arithmetic: no is float32; bf16 keeps float32 masters; auto is bf16 where the GPU has it, else fp16, and on "
        "a CPU no, or bf16 for large models where the processor has it",
        choices=("auto", "no", "fp16", "bf16"),
    )
    card: str = setting(
        "any",
        "settings with which Stable Diffusion 2.1 at 512x512 should fit, by counting: 24gb recomputes activations; "
        "16gb also keeps 8-bit moments (an extra); 12gb recomputes and trains only cross-attention of the UNet",
        choices=tuple(CARDS),
    )
    allow_tf32: bool = setting(False, "allow TF32 in float32 products on the GPU")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    compile: str = setting(
        "no",
        "torch.compile: the whole UNet (also if nothing follows), or regional for its repeated blocks alone, which "
        "starts sooner",
        choices=("no", "regional", "whole"),
        bare="whole",
    )
    seed: int = setting(0, "seed of every random draw")
    deterministic: bool = setting(False, "only GPU kernels that give the same bits on every run: slower")

    # Watching, saving, resuming
    log_steps: int = setting(10, "steps between two readings of the losses from the device")
    report_to: str = setting(
        "none", "also write the losses and previews for another viewer, an extra", choices=("none", "tensorboard")
    )
    img_log_steps: int = setting(200, "steps between previews; 0 for none")
    preview_inference_steps: int = setting(25, "denoising steps of a preview picture")
    checkpointing_steps: int = setting(200, "steps between resumable checkpoints; 0 for none")
    checkpoints_total_limit: int = setting(1, "checkpoints kept, newest first")
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint folder, or 'latest' for the newest in --output_dir"
    )
    save_precision: str = setting("fp32", "precision of the saved model", choices=("fp32", "fp16", "bf16"))

    def __post_init__(self):
        for name in (
            "phase1_train_steps",
            "phase2_train_steps",
            "lr_warmup_steps",
            "img_log_steps",
            "checkpointing_steps",
        ):
            _in_range(self, name, 0)
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_class_images",
            "sample_batch_size",
            "log_steps",
            "preview_inference_steps",
            "checkpoints_total_limit",
            "lr_num_cycles",
            "num_of_assets",
            "collection_size",
        ):
            _in_range(self, name, 1)
        for name in ("resolution", "attention_grid"):
            _in_range(self, name, 1, MAX_SIDE)
        _in_range(self, "seed", -MAX_SEED, MAX_SEED)
        for name in (
            "initial_learning_rate",
            "learning_rate",
            "lambda_attention",
            "prior_loss_weight",
            "max_grad_norm",
            "adam_weight_decay",
            "adam_epsilon",
            "lr_power",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"--{name} is {getattr(self, name)}: expected a finite number, 0 or more")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise InputError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: --lr_scheduler constant has none; use constant_with_warmup"
            )
        if not 0 <= self.flip_probability <= 1:
            raise InputError(f"--flip_probability is {self.flip_probability}: expected 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}: expected 0 or more, below 1")
        _check_choices(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, f.name, value)
            if isinstance(f.default, tuple) and not isinstance(value, tuple | list):
                raise InputError(f"{flag_of(f)} is {value!r}: expected several, as a tuple")
            if value == "" and f.default != "":  # a variable of the shell that is not set
                raise InputError(f"{flag_of(f)} is empty: leave it out, or say what it shall be")
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not is_utf8(text):  # as the files of a run are
                    raise InputError(f"{flag_of(f)} {text!r} is not UTF-8: rename it")
        if self.method in METHODS:
            differs = [name for name, value in PLAIN.items() if getattr(self, name) != value]
            if differs:
                raise InputError(f"--method {self.method} has no {', '.join(differs)} of its own: leave it out")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The training plan (paper, section 3): first the handles, then everything. A baseline has one phase."""
        scale = self.train_batch_size * self.gradient_accumulation_steps if self.scale_lr else 1
        layers = "unet" if self.unet_layers == "all" else "cross_attention"
        tuned = ("handles", "embedding", layers) + ("text_encoder",) * self.train_text_encoder
        prior = self.with_prior_preservation
        if self.method in METHODS:
            row, steps = METHODS[self.method], self.phase1_train_steps + self.phase2_train_steps
            named = (layers if name == "unet" else name for name in row.trains)
            trains = tuple(name for name in named if self.train_text_encoder or name != "text_encoder")
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
            ),
            Phase("phase2", self.phase2_train_steps, self.learning_rate * scale, tuned, prior),
        )
        return tuple(phase for phase in plan if phase.steps)

    @classmethod
    def resolve(cls, explicit: dict, model_row: dict | None = None) -> "TrainConfig":
        """Settings from layers, the later winning: defaults, model's own row, preset, card, method, explicit flags.

        The optimizer that comes out of them brings its own defaults (OPTIMIZERS).
        """
        preset = PRESETS.get(explicit.get("preset"), {})
        card = CARDS.get(explicit.get("card"), {})
        method = PLAIN if explicit.get("method") in METHODS else {}
        merged = {**(model_row or {}), **preset, **card, **method, **explicit}
        merged = OPTIMIZERS.get(merged.get("optimizer"), {}) | merged
        unknown = merged.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"unknown training settings: {', '.join(sorted(unknown))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()})


# --- Sampling -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig:
    """Settings of one sampling call. Names are those of diffusers' pipelines."""

    negative_prompt: str = setting("", "what the pictures should not show")
    num_inference_steps: int = setting(50, "denoising steps")
    guidance_scale: float = setting(7.5, "strength of the prompt (classifier-free guidance); 1 turns guidance off")
    sampler: str = setting("ddim", "sampler", choices=("ddim", "ddpm", "dpmpp_2m"))
    eta: float = setting(0.0, "noise added back by ddim: 0 is deterministic, 1 like ddpm")
    steps_offset: int | None = setting(
        None, "shift of evenly spaced timesteps (default: the model's own; the official inference script has 0)"
    )
    num_images: int = setting(1, "pictures per prompt")
    seed: int = setting(0, "seed of the first picture; each further picture takes the next one")
    height: int | None = setting(None, "picture rows in pixels (default: what the model was trained for)")
    width: int | None = setting(None, "picture columns in pixels (default: what the model was trained for)")
    batch_size: int = setting(4, "pictures denoised at once")

    def __post_init__(self):
        for name in ("num_inference_steps", "num_images", "batch_size"):
            _in_range(self, name, 1)
        for name in ("height", "width"):
            _in_range(self, name, 1, MAX_SIDE)
        _in_range(self, "seed", -MAX_SEED, MAX_SEED)
        _in_range(self, "steps_offset", 0)
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"--guidance_scale is {self.guidance_scale}: expected a finite number, 0 or more")
        if not 0 <= self.eta <= 1:
            raise InputError(f"--eta is {self.eta}: expected 0 to 1")
        _check_choices(self)


@dataclass(frozen=True)
class VaryConfig(SampleConfig):
    """Settings of `bas vary`."""

    num_images: int = setting(9, "pictures, each from its own seed")


@dataclass(frozen=True)
class EditConfig(SampleConfig):
    """Settings of `bas edit`. Names are those of the Blended Latent Diffusion script, where it has them."""

    num_images: int = setting(1, "results, each from its own seed")
    height: int | None = setting(None, "rows of pixels to edit at (default: as the model was trained for)")
    width: int | None = setting(None, "columns of pixels to edit at (default: as the model was trained for)")
    blending_start_percentage: float = setting(
        0.25, "share of the denoising steps to skip, 0 to 1: the more, the closer to what was there"
    )
    composite: bool = setting(
        True, "leave the pixels outside the mask as the model decodes them", flag=["--no_composite"]
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.blending_start_percentage < 1:
            raise InputError(
                f"--blending_start_percentage is {self.blending_start_percentage}: expected 0 or more, less than 1"
            )


# --- Masks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProposalConfig:
    """Settings of `bas masks --auto`."""

    segmenter: str | None = setting(None, "the model: a folder or a hub id (default: a known one for each method)")
    points: tuple[str, ...] = setting((), "sam: x,y in pixels, one concept each; several points of one as x,y+x,y")
    boxes: tuple[str, ...] = setting((), "sam: x0,y0,x1,y1 in pixels, one concept each")
    words: tuple[str, ...] = setting(
        (), "clipseg: what to find, one concept each; the word is its handle's initial word"
    )
    threshold: float = setting(0.5, "probability from which on a pixel is inside")
    smooth: float = setting(0.0, "radius in pixels over which outlines are rounded and specks removed")
    grow: int = setting(0, "pixels by which masks grow, or shrink if negative")
    max_concepts: int = setting(4, "how many of the largest things to keep, where the method finds things itself")
    min_coverage: float = setting(0.01, "smallest share of the picture such a thing may cover")

    def __post_init__(self):
        for name in ("threshold", "min_coverage"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}: expected more than 0 and less than 1")
        if not 0 <= self.smooth <= 1000:
            raise InputError(f"--smooth is {self.smooth}: expected 0 to 1000")
        if abs(self.grow) > 1000:
            raise InputError(f"--grow is {self.grow}: expected -1000 to 1000")
        _in_range(self, "max_concepts", 1)


@dataclass(frozen=True)
class CocoConfig:
    """Settings of `bas coco`: the rules of the paper's data set (appendix)."""

    scenes: int = setting(50, "how many scenes to choose")
    seed: int = setting(0, "seed of the choice")
    min_things: int = setting(2, "things of distinct classes that a scene has at least")
    max_things: int = setting(4, "of more, the largest so many are its concepts")
    min_share: float = setting(0.15, "smallest share of the square that each covers")
    dropped: tuple[str, ...] = setting(
        ("orange", "banana", "broccoli", "carrot", "zebra", "giraffe"), "classes that are no concepts"
    )

    def __post_init__(self):
        _in_range(self, "scenes", 1)
        _in_range(self, "seed", 0, MAX_SEED)
        _in_range(self, "min_things", 1)
        _in_range(self, "max_things", self.min_things)
        if not 0 < self.min_share < 1:
            raise InputError(f"--min_share is {self.min_share}: expected more than 0 and less than 1")


@dataclass(frozen=True)
class StudyConfig:
    """Settings of `bas study`."""

    pages: int = setting(5, "pages with different pictures, one for each participant, or for several")
    questions: int = setting(30, "pictures on a page, at most; each method has as many")
    seed: int = setting(0, "seed of what is shown, and in which order")

    def __post_init__(self):
        _in_range(self, "pages", 1, 1000)
        _in_range(self, "questions", 2, 500)
        _in_range(self, "seed", 0, MAX_SEED)
