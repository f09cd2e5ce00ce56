"""The configurations of the networks, as in a checkpoint's config.json; unknown settings are errors."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from bas.errors import InputError, check_bool, check_float, check_positive, shown

MAX_LAYERS = 16  # in one level; far above any model of this family
SIZES = 6  # numbers of SDXL's size conditioning: height and width of the original, crop's top and left, of the target
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}  # residual blocks in the middle, by type
UNET_EXTENSIONS = {  # fields that a config.json has only where a model needs them
    *("transformer_layers_per_block", "reverse_transformer_layers_per_block", "mid_block_type"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
}
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
    return {key: _frozen(value) for key, value in config.items() if key in known}


def _frozen(value: object) -> Any:
    """Return a value of a config.json with tuples for lists, at every depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_lists(config: dict) -> dict:
    """Return a config.json. Raises InputError for a field that should be a list of numbers or names and is not."""
    for name, kind in LISTS.items():
        value = config.get(name, [])
        if not isinstance(value, (list, tuple)) or not all(isinstance(entry, kind) for entry in value):
            raise InputError(f"{name} is {shown(value)}: expected a list of {'numbers' if kind is int else 'names'}")
    return config


def _with_one_value(config: dict, names: tuple[str, ...]) -> dict:
    """Return a config.json in which these fields have one value where they list the same for every level or side."""
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
    # Blocks in each transformer: one number for all, or one for each level, the finest first, or one for each of its
    # transformers. The way up reads them from the coarsest level, or has its own; the middle has the last.
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # UNetMidBlock2D: one residual block; None: no middle
    # SDXL: pooled text and the image's sizes, as features of so many numbers, are added to the time embedding.
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None  # width of the pooled text and all features together

    EACH = (  # fields that diffusers reads as one value, or as a list of one for each level or side
        *("sample_size", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block"),
        *("only_cross_attention",),
    )
    # Values with which fields that bas does not know change nothing.
    INERT = {
        "act_fn": ("silu", "swish"),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1, 1.0),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "dropout": (0.0,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "attention_type": ("default",),
        "addition_embed_type_num_heads": (64,),
        "center_input_sample": (False,),
    }

    @classmethod
    def from_json(cls, config: dict) -> "UNetConfig":
        """Check a config.json and keep what describes the network. Raises InputError for what bas does not support."""
        values = _read_fields(cls, _with_one_value(_check_lists(config), cls.EACH), cls.INERT)
        if values.get("upcast_attention", False) is None:  # in SDXL's file
            del values["upcast_attention"]
        return cls(**values)

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
        if self.mid_block_type not in MID_BLOCKS:
            raise InputError(f"unet mid_block_type is {self.mid_block_type!r}: expected one of {[*MID_BLOCKS]}")
        for name in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
            if isinstance(depths := getattr(self, name), tuple) and len(depths) != self.levels:
                raise InputError(f"unet {name} has {len(depths)} entries for {self.levels} levels")
        for level in range(self.levels):
            for depth in (*self.down_depths(level), *self.up_depths(level), *self.mid_depths):
                check_positive("unet transformer_layers_per_block", depth, MAX_LAYERS)
        self._check_added()

    def _check_added(self) -> None:
        """Raise InputError unless what is added to the time embedding is nothing, or as in SDXL."""
        dims = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type is None and dims == (None, None):
            return
        if self.addition_embed_type != "text_time":
            raise InputError(f"unet addition_embed_type is {self.addition_embed_type!r}: expected text_time, or none")
        check_positive("unet addition_time_embed_dim", dims[0])
        check_positive("unet projection_class_embeddings_input_dim", dims[1])
        if self.pooled_dim < 1:
            raise InputError(
                f"unet projection_class_embeddings_input_dim is {dims[1]}, which leaves nothing for the pooled text "
                f"beside {SIZES} features of {dims[0]}"
            )

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

    def down_depths(self, level: int) -> tuple[int, ...]:
        """Return how many blocks each transformer of this level's down block has; () without any.

        Level 0 is the finest.
        """
        depths = self.transformer_layers_per_block
        here = depths[level] if isinstance(depths, tuple) else depths
        return self._depths(here, self.layers_per_block) if self.down_block_types[level].startswith("Cross") else ()

    def up_depths(self, level: int) -> tuple[int, ...]:
        """Return the same of the up block on this level."""
        depths, place = self.transformer_layers_per_block, level
        if self.reverse_transformer_layers_per_block is not None:
            depths, place = self.reverse_transformer_layers_per_block, self.levels - 1 - level
        here = depths[place] if isinstance(depths, tuple) else depths
        attends = self.up_block_types[self.levels - 1 - level].startswith("Cross")
        return self._depths(here, self.layers_per_block + 1) if attends else ()

    @property
    def mid_depths(self) -> tuple[int, ...]:
        """The same of the middle block."""
        depths = self.transformer_layers_per_block
        here = depths[-1] if isinstance(depths, tuple) else depths
        return self._depths(here, 1) if self.mid_block_type == "UNetMidBlock2DCrossAttn" else ()

    def _depths(self, depths: int | tuple, count: int) -> tuple[int, ...]:
        """Return one depth for each of `count` transformers. InputError for a list of another length."""
        each = depths if isinstance(depths, tuple) else (depths,) * count
        if len(each) != count:
            raise InputError(f"unet transformer_layers_per_block has {shown(list(each))} for {count} transformers")
        return each

    @property
    def pooled_dim(self) -> int:
        """The width of the pooled text that is added to the time embedding; 0 where nothing is."""
        if self.addition_time_embed_dim is None or self.projection_class_embeddings_input_dim is None:
            return 0
        return self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim

    def to_json(self) -> dict:
        """Return the config.json that diffusers reads."""
        own = {f.name for f in fields(self) if f.name in UNET_EXTENSIONS and getattr(self, f.name) == f.default}
        config = {k: v for k, v in asdict(self).items() if k not in own | {"num_attention_heads"}}
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
    force_upcast: bool | None = None  # false: SDXL's VAE may compute in 16 bits; None: the file says nothing

    INERT = {
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
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
        if self.force_upcast is not None:
            check_bool("vae force_upcast", self.force_upcast)

    @property
    def factor(self) -> int:
        """Image pixels per latent cell on each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_json(self) -> dict:
        """Return the config.json that diffusers reads."""
        levels = len(self.block_out_channels)
        config = {name: value for name, value in asdict(self).items() if value is not None}
        return {
            "_class_name": "AutoencoderKL",
            **config,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        }
