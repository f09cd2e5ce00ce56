"""What can be trained, and which settings suit it: kinds, baselines, presets and cards, each as a row of data.

`TrainConfig.resolve` in bas/config.py reads them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

# What a phase can train.
Part = Literal[
    "handles",
    "embedding",
    "unet",
    "cross_attention",
    "cross_attention_kv",
    "cross_attention_v",
    "unet_lora",
    "unet_token",
    "text_encoder",
    "text_encoder_lora",
]


@dataclass(frozen=True)
class Phase:
    """One row of the training plan."""

    name: str
    steps: int
    lr: float
    trains: tuple[Part, ...]
    prior: bool  # whether class images take part in each step
    clips: tuple[Literal["embedding"], ...] = ()  # further groups whose gradient counts in the clipped norm


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row of KINDS: what `--train` trains in phase 2 beside the handles, and what the run keeps of it."""

    about: str  # what that is, in words
    weights: tuple[Part, ...]
    text: Part | None = None  # what trains of the text encoder, unless --no_train_text_encoder
    whole: bool = False  # whether the run keeps a whole model, or only what was trained
    defaults: dict[str, Any] = field(default_factory=dict)  # settings that differ from those of a whole model
    reads: tuple[str, ...] = ()  # settings of adapters that mean something
    own_tokens: bool = False  # whether its adapters act at the handles' own tokens alone


# The learning rates of `kv` and `v` are Custom Diffusion's (Kumari et al. 2023), that of `lora` is usual for LoRA.
# Whole weights are saved in fp32, because fp16 would round away small changes; adapters hold nothing but the changes.
OF_SMALL_ADAPTERS = {"learning_rate": 1e-4, "save_precision": "fp16"}
KINDS: dict[str, Kind] = {
    "full": Kind(about="the whole model", weights=("embedding", "unet"), text="text_encoder", whole=True),
    "cross_attention": Kind(
        about="the UNet's cross-attention", weights=("embedding", "cross_attention"), text="text_encoder", whole=True
    ),
    "kv": Kind(
        about="the keys and values of cross-attention",
        weights=("cross_attention_kv",),
        defaults={"learning_rate": 1e-5},
    ),
    "v": Kind(about="the values of cross-attention", weights=("cross_attention_v",), defaults={"learning_rate": 1e-5}),
    "lora": Kind(
        about="small adapters beside the layers",
        weights=("unet_lora",),
        text="text_encoder_lora",
        defaults=OF_SMALL_ADAPTERS,
        reads=("rank", "alpha", "lora_targets", "conv_rank"),
    ),
    "token": Kind(
        about="small adapters at the handles' own tokens",
        weights=("unet_token",),
        defaults=OF_SMALL_ADAPTERS,
        reads=("rank", "alpha"),
        own_tokens=True,
    ),
}

OF_ADAPTERS = KINDS["lora"].reads  # all settings of adapters

# The layers that a LoRA adapts: of the UNet, and of the text encoder. Names are regular expressions over module names.
LORA_TARGETS: dict[str, tuple[str, str]] = {
    "kv": (r"attn2\.to_[kv]", r"self_attn\.(q|k|v|out)_proj"),
    "attention": (r"attn[12]\.(to_[qkv]|to_out\.0)", r"self_attn\.(q|k|v|out)_proj"),
    "transformer": (
        r"attentions\.\d+\.(proj_in|proj_out)|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)",
        r"self_attn\.(q|k|v|out)_proj|mlp\.fc[12]",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of METHODS: a baseline of the paper (section 4.1), trained in one phase with the plain diffusion loss."""

    trains: tuple[Part, ...] | None  # None: the handles and what --train says
    rate: str  # the setting that holds its learning rate
    prior: bool  # whether class images take part, unless --no_prior_preservation
    collection: bool  # whether it learns from concepts pasted on plain colours instead of the image itself
    factor: float = 1.0  # by which the rate is multiplied

    @property
    def brings(self) -> dict[str, Any]:
        """The settings that it decides: those of the plain loss, and --train where it says itself what is trained."""
        return PLAIN if self.trains is None else PLAIN | {"train": "full"}


# `official` has the defaults below; `paper` has what the paper's text states instead.
PRESETS: dict[str, dict] = {
    "official": {},
    "paper": {
        "optimizer": "adam",
        "adam_beta2": 0.99,
        "with_prior_preservation": False,
    },
}

# Adam adds its decay to the gradient, which AdamW's 1e-2 would outweigh. It gets the paper's 1e-8.
OPTIMIZERS: dict[str, dict] = {"adam": {"adam_weight_decay": 1e-8}}

# The baselines. Each takes as many steps as both phases together, so that all see the same number of examples. Each
# has the learning rate of the phase that trains the same weights. By default these are the rates of the methods'
# diffusers examples: 5e-4 for Textual Inversion (Gal et al. 2022), 2e-6 for DreamBooth (Ruiz et al. 2023), 1e-5 for
# Custom Diffusion (Kumari et al. 2023).
METHODS: dict[str, Method] = {
    "ti-m": Method(trains=("handles",), rate="initial_learning_rate", prior=False, collection=True),
    "db-m": Method(trains=None, rate="learning_rate", prior=True, collection=True),
    "cd-m": Method(
        trains=("handles", "cross_attention_kv"), rate="learning_rate", factor=5.0, prior=True, collection=True
    ),
    "ti": Method(trains=("handles",), rate="initial_learning_rate", prior=False, collection=False),
    "db": Method(trains=None, rate="learning_rate", prior=True, collection=False),
}
PLAIN = {
    **{"apply_masked_loss": False, "lambda_attention": 0.0, "subset_sampling": "all", "exact_phase1": False},
    "seg_mix_probability": 0.0,
}

# What the bas.json of a model may set: how the model is trained. Which files are read or written, on which device and
# from which checkpoint is for the user alone to say: a model may come from anywhere.
OF_A_MODEL = (
    *("resolution", "center_crop", "close_ups", "attention_grid", "phase1_train_steps", "phase2_train_steps"),
    *("initial_learning_rate", "learning_rate", "scale_lr", "train_text_encoder", "train", "apply_masked_loss"),
    *("rank", "alpha", "lora_targets", "conv_rank"),
    *("normalize_masked_loss", "lambda_attention", "attention_loss", "subset_sampling", "flip_probability"),
    *("seg_mix_probability", "seg_mix_move", "seg_mix_cells"),
    *("with_prior_preservation", "prior_loss_weight", "class_prompt", "num_class_images", "train_batch_size"),
    *("gradient_accumulation_steps", "optimizer", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "preview_inference_steps"),
)
SAMPLING_OF_A_MODEL = ("guidance_scale",)
GUIDANCE = 7.5  # of models that set none of their own, as in diffusers

# What suits SDXL, at 1024x1024. Its text encoders forget first, at rates that the UNet bears. A class image costs twice
# 50 forward passes there, so 100 of them would cost three times the training; 30 cost about as much as it does.
OF_SDXL: dict[str, Any] = {"train_text_encoder": False, "num_class_images": 30}

# Settings with which SD 2.1 at 512x512 fits a card. 24gb costs time, 16gb also precision of the moments, 12gb the
# training of the UNet outside its cross-attention, and with it some likeness. 8gb and 6gb train adapters.
LEAN = {"mixed_precision": "bf16", "gradient_checkpointing": True}
CARDS: dict[str, dict] = {
    "any": {},
    "80gb": {},
    "40gb": {},
    "24gb": LEAN,
    "16gb": LEAN | {"optimizer": "adamw8bit"},
    "12gb": LEAN | {"train": "cross_attention"},
    "8gb": LEAN | {"train": "lora", "sample_batch_size": 1},
    "6gb": LEAN | {"train": "lora", "sample_batch_size": 1, "train_text_encoder": False},
}
# The same for SDXL at 1024x1024, whose text encoders are left alone. Smaller cards do not hold its weights and a step.
CARDS_XL: dict[str, dict] = {
    "any": {},
    "80gb": LEAN | {"sample_batch_size": 2},
    "40gb": LEAN | {"sample_batch_size": 2, "optimizer": "adamw8bit"},
    "24gb": LEAN | {"sample_batch_size": 1, "train": "cross_attention"},
    "16gb": LEAN | {"sample_batch_size": 1, "train": "kv", "optimizer": "adamw8bit"},
    "12gb": LEAN | {"sample_batch_size": 1, "train": "lora"},
}
