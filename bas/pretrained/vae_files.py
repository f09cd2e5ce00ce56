"""A VAE in a file of its own, in place of the model's: `--vae FILE`, in the layout of diffusers or the original one."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bas.errors import InputError
from bas.io.json_files import read_json
from bas.io.tensors import read_tensors
from bas.models.config import VAEConfig
from bas.pretrained.component_files import STEMS, read_component
from bas.pretrained.ldm_keys import UNET, VAE, inverse, new_vae_name, rename, vae_table
from bas.pretrained.loading import Parts, unwrap_keys
from bas.pretrained.single_file import SDXL_SCALING, has_second_encoder
from bas.pretrained.unsupported import check_class


def with_vae(parts: Parts, path: Path) -> Parts:
    """Put another VAE into the parts of a model.

    path: a folder with config.json and weights, one of a whole model, or a .safetensors file, which has the
    configuration of the model's own VAE. InputError for one of other latents, and for a file that is no VAE.
    """
    if (path / "vae").is_dir():
        path = path / "vae"
    config = own = parts.spec.vae
    if path.is_dir():
        described = read_json(path / "config.json")
        if (name := described.get("_class_name")) is not None:
            check_class("vae", name, path)
        config = VAEConfig.from_json(described)
    if (config.latent_channels, config.factor) != (own.latent_channels, own.factor):
        raise InputError(
            f"--vae {path}: its latents are not those of {parts.spec.source}: take a VAE of the model's family"
        )
    found = read_component(path, STEMS["vae"]) if path.is_dir() else read_tensors(path)[0]
    tensors = unwrap_keys(found, str(path))
    if any(name.startswith(UNET) for name in tensors):  # of a whole model, which tells the family
        config = replace(
            config, scaling_factor=SDXL_SCALING if has_second_encoder(tensors) else VAEConfig().scaling_factor
        )
    if config.scaling_factor != own.scaling_factor:
        raise InputError(
            f"--vae {path}: its latents are scaled by {config.scaling_factor:g}, those of {parts.spec.source} by "
            f"{own.scaling_factor:g}: take a VAE of the model's family"
        )
    if not any("decoder.conv_in." in name for name in tensors):
        raise InputError(f"--vae {path} holds no VAE: give the file or folder of one")
    return replace(
        parts,
        spec=replace(parts.spec, vae=config),
        tensors=parts.tensors | {"vae": own_names(tensors, config)},
        sources=parts.sources | {"vae": path},
    )


def own_names(tensors: dict[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Return the weights of a VAE under the names of bas. Of a whole model in one file, those of its VAE alone."""
    inside = {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)} or tensors
    if any("mid_block." in name for name in inside):
        return {new_vae_name(name): tensor for name, tensor in inside.items()}
    table = inverse(vae_table(config))
    unused = ("loss.", "model_ema.", "ema.", "discriminator.")
    return {rename(name, table) or name: tensor for name, tensor in inside.items() if not name.startswith(unused)}
