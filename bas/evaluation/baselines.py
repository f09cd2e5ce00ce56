"""The variants that the evaluation compares: the paper's method, baselines and ablations (section 4.1), and options.

Each variant is trained by the same loop with the same seed. It differs from `bas train` in the settings named here.
"""

from dataclasses import dataclass

from bas.config import TrainConfig
from bas.errors import InputError
from bas.presets import METHODS, PLAIN


@dataclass(frozen=True)
class Variant:
    """One row of the comparison."""

    help: str
    kind: str  # "method", "ablation" or "option"
    settings: dict  # of TrainConfig


VARIANTS: dict[str, Variant] = {
    "bas": Variant("Break-A-Scene", "method", {}),
    "ti-m": Variant("Textual Inversion on masked concepts", "method", {"method": "ti-m"}),
    "db-m": Variant("DreamBooth on masked concepts", "method", {"method": "db-m"}),
    "cd-m": Variant("Custom Diffusion on masked concepts", "method", {"method": "cd-m"}),
    "ti": Variant("Textual Inversion, naive", "method", {"method": "ti"}),
    "db": Variant("DreamBooth, naive", "method", {"method": "db"}),
    "no-phase1": Variant("without phase 1", "ablation", {"phase1_train_steps": 0}),
    "no-mask": Variant("without the masked loss", "ablation", {"apply_masked_loss": False}),
    "no-attention": Variant("without the attention loss", "ablation", {"lambda_attention": 0.0}),
    "single": Variant("one concept at a time, no union sampling", "ablation", {"subset_sampling": "single"}),
    "cross-entropy": Variant("attention loss as cross-entropy", "option", {"attention_loss": "cross_entropy"}),
    "normalized": Variant("masked loss per masked area", "option", {"normalize_masked_loss": True}),
    "not-normalized": Variant(
        "masked loss over the whole image, the official way", "option", {"normalize_masked_loss": False}
    ),
    "close-ups": Variant("close-ups as extra images", "option", {"close_ups": True}),
    "no-close-ups": Variant("the image alone, the official way", "option", {"close_ups": False}),
    "seg-mix": Variant(
        "concepts pasted onto class images", "option", {"seg_mix_probability": 1.0, "seg_mix_move": 0.0}
    ),
    "no-seg-mix": Variant("concepts in their image alone, the official way", "option", {"seg_mix_probability": 0.0}),
    "uniform": Variant("every subset equally likely", "option", {"subset_sampling": "uniform"}),
    "cross-attention": Variant("phase 2 trains cross-attention of the UNet", "option", {"train": "cross_attention"}),
    "kv": Variant("phase 2 trains keys and values", "option", {"train": "kv"}),
    "v": Variant("phase 2 trains values", "option", {"train": "v"}),
    "lora": Variant("phase 2 trains adapters", "option", {"train": "lora"}),
    "token": Variant("phase 2 trains adapters of the handles' tokens", "option", {"train": "token"}),
}
PAPER = tuple(name for name, row in VARIANTS.items() if row.kind != "option")


def training_of(name: str, explicit: dict, model_row: dict | None) -> TrainConfig:
    """Return the settings of one variant: its own come first, then `explicit`, then the model's.

    A baseline has no masked loss, attention loss or subsets, so what `explicit` says of them is left out. Raises
    InputError for an unknown variant.
    """
    if name not in VARIANTS:
        raise InputError(f"--methods {name}: expected some of {', '.join(VARIANTS)}")
    own = VARIANTS[name].settings
    left_out = set(PLAIN) if own.get("method") in METHODS else set()
    kept = {key: value for key, value in explicit.items() if key not in left_out}
    return TrainConfig.resolve({**kept, **own}, model_row)
