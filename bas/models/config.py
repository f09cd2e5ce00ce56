"""The configurations of the networks, as in a checkpoint's config.json; unknown settings are errors."""

from dataclasses import asdict, dataclass, fields

from bas.errors import InputError, check_bool, check_float, check_positive, shown

MAX_LAYERS = 16  # in one level; far above any model of this family
LISTS = {"block_out_channels": int, "down_block_types": str, "up_block_types": str}  # fields and what they list


def _read_fields(kind: type, config: dict, inert: dict[str, tuple]) -> dict:
    """Take the fields of `kind`. Raises InputError for any other, unless it has one of its `inert` values."""
    known = {f.name for f in fields(kind)}
    unknown = [
        f"{key}={shown(value)}"
        for key, value in config.items()
        if key not in known and not key.startswith("_") and value not in inert.get(key, (None, False))
    ]
    if unknown:
        raise InputError(
            f"{kind.__name__.removesuffix('Config')} config has unsupported settings: {', '.join(unknown)}"
        )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in known}


def _check_lists(config: dict) -> dict:
    """Return a config.json. Raises InputError for a field that should be a list of numbers or names and is not."""
    for name, kind in LISTS.items():
        value = config.get(name, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, kind) for entry in value):
            raise InputError(f"{name} is {shown(value)}: expected a list of {'numbers' if kind is int else 'names'}")
    return config


def _with_one_value(config: dict, names: tuple[str, ...]) -> dict:
    """A config.json in which these fields have one value where they list the same for every level or side."""
    lists = {name: config[name] for name in names if isinstance(config.get(name), list)}
    return config | {name: values[0] for name, values in lists.items() if values and values == values[:1] * len(values)}


@dataclass(frozen=True)
class UNetConfig:
    """The UNet's config.json, by its own field names. The defaults are Stable Diffusion 1.x."""

    sample_size: int = 64  # latent rows and columns that the model was trained on
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads in spite of its name, per level or for all
    num_attention_heads: int | tuple[int, ...] | None = None  # the same under its right name, when a file has it
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    upcast_attention: bool = False  # accepted; softmax statistics are float32 here in any case

    EACH = (  # fields that diffusers reads as one value, or as a list of one for each level or side
        *("sample_size", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block"),
        *("only_cross_attention",),
    )
    # Values with which fields that bas does not know change nothing.
    INERT = {
        "act_fn": ("silu", "swish"),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1, 1.0),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "transformer_layers_per_block": (1,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dropout": (0.0,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "attention_type": ("default",),
        "projection_class_embeddings_input_dim": (None,),
        "addition_embed_type_num_heads": (64,),
        "center_input_sample": (False,),
    }

    @classmethod
    def from_json(cls, config: dict) -> "UNetConfig":
        """Check a config.json and keep what describes the network. Raises InputError for what bas does not support."""
        return cls(**_read_fields(cls, _with_one_value(_check_lists(config), cls.EACH), cls.INERT))

    def __post_init__(self):
        for name in ("sample_size", "in_channels", "out_channels", "cross_attention_dim"):
            check_positive(f"unet {name}", getattr(self, name))
        check_positive("unet layers_per_block", self.layers_per_block, MAX_LAYERS)
        for name in ("use_linear_projection", "flip_sin_to_cos", "upcast_attention"):
            check_bool(f"unet {name}", getattr(self, name))
        check_float("unet norm_eps", self.norm_eps, 0, 1)
        check_float("unet freq_shift", self.freq_shift)
        if self.in_channels != self.out_channels:
            raise InputError(
                f"the UNet has {self.in_channels} input channels: that is an inpainting or depth model; "
                "use the base model it was made from"
            )
        check_positive("unet block_out_channels' levels", self.levels, 8)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            check_positive("unet block_out_channels", channels)
            check_positive("unet attention_head_dim (the number of heads)", heads)
            if channels % check_positive("unet norm_num_groups", self.norm_num_groups) or channels % heads:
                raise InputError(
                    f"unet width {channels} is not divisible by {self.norm_num_groups} groups and {heads} heads"
                )
        kinds = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
        for name in ("down_block_types", "up_block_types"):
            types = getattr(self, name)
            if len(types) != self.levels or not kinds.issuperset(types):
                raise InputError(f"unet {name} is {types}: expected {self.levels} of {sorted(kinds)}")

    @property
    def levels(self) -> int:
        """The number of grids that the UNet works on."""
        return len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads on each level."""
        heads = self.attention_head_dim if self.num_attention_heads is None else self.num_attention_heads
        heads = heads if isinstance(heads, tuple) else (heads,) * self.levels
        if len(heads) != self.levels:
            raise InputError(f"unet attention_head_dim has {len(heads)} entries for {self.levels} levels")
        return heads

    def down_has_attention(self, level: int) -> bool:
        """Whether the down block on this level (0 is the finest) carries transformers."""
        return self.down_block_types[level] == "CrossAttnDownBlock2D"

    def up_has_attention(self, level: int) -> bool:
        """Whether the up block on this level (0 is the finest) carries transformers."""
        return self.up_block_types[self.levels - 1 - level] == "CrossAttnUpBlock2D"

    def to_json(self) -> dict:
        """The config.json that diffusers reads."""
        config = {k: v for k, v in asdict(self).items() if k != "num_attention_heads"}
        return {"_class_name": "UNet2DConditionModel", **config, "attention_head_dim": self.heads}


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's config.json, by its own field names. The defaults are Stable Diffusion 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512  # image rows and columns that the model was trained on
    scaling_factor: float = 0.18215  # latents are multiplied by this for the diffusion model

    INERT = {
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
        "force_upcast": (True, False),  # to run SDXL's VAE in float32
    }

    @classmethod
    def from_json(cls, config: dict) -> "VAEConfig":
        """Check a config.json and keep what describes the network. Raises InputError for what bas does not support."""
        levels = len(_check_lists(config).get("block_out_channels", ()))
        inert = {
            "down_block_types": (["DownEncoderBlock2D"] * levels,),
            "up_block_types": (["UpDecoderBlock2D"] * levels,),
        }
        return cls(**_read_fields(cls, _with_one_value(config, ("sample_size",)), cls.INERT | inert))

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "latent_channels", "sample_size"):
            check_positive(f"vae {name}", getattr(self, name))
        check_positive("vae layers_per_block", self.layers_per_block, MAX_LAYERS)
        check_positive("vae block_out_channels' levels", len(self.block_out_channels), 8)
        for channels in self.block_out_channels:
            if check_positive("vae block_out_channels", channels) % check_positive(
                "vae norm_num_groups", self.norm_num_groups
            ):
                raise InputError(f"vae width {channels} is not divisible by {self.norm_num_groups} groups")
        check_float("vae scaling_factor", self.scaling_factor, above=0, below=1000)

    @property
    def factor(self) -> int:
        """Image pixels per latent cell on each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_json(self) -> dict:
        """The config.json that diffusers reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **asdict(self),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        }
