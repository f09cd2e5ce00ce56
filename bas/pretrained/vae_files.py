"""A VAE in a file of its own, in place of the model's: `--vae FILE`, in the layout of diffusers or the original one."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bas.errors import InputError
from bas.io.json_files import read_json
from bas.io.tensors import read_tensors
from bas.models.config import VAEConfig
from bas.pretrained.ldm_keys import VAE, inverse, rename, vae_table
from bas.pretrained.loading import Parts, unwrap_keys

STEM = "diffusion_pytorch_model.safetensors"


def with_vae(parts: Parts, path: Path) -> Parts:
    """Put another VAE into the parts of a model.

    path: a folder with config.json and weights, or a .safetensors file, which has the configuration of the model's own
    VAE. InputError for one of other latents, and for a file that is no VAE.
    """
    config = VAEConfig.from_json(read_json(path / "config.json")) if path.is_dir() else parts.spec.vae
    own = parts.spec.vae
    if (config.latent_channels, config.factor) != (own.latent_channels, own.factor):
        raise InputError(f"--vae {path}: its latents are not those of {parts.spec.source}: take a VAE of its family")
    tensors = unwrap_keys(read_tensors(path / STEM if path.is_dir() else path)[0], str(path))
    if not any("decoder.conv_in." in name for name in tensors):
        raise InputError(f"--vae {path} holds no VAE: give the file or folder of one")
    return replace(
        parts, spec=replace(parts.spec, vae=config), tensors=parts.tensors | {"vae": own_names(tensors, config)}
    )


def own_names(tensors: dict[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """The weights of a VAE under the names of bas. Of a whole model in one file, those of its VAE alone."""
    inside = {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)} or tensors
    if any("mid_block." in name for name in inside):
        return inside
    table = inverse(vae_table(config))
    unused = ("loss.", "model_ema.", "ema.", "discriminator.")
    return {rename(name, table) or name: tensor for name, tensor in inside.items() if not name.startswith(unused)}
