"""The stages of the miniature's VAE: the whole of it, the scenes through its encoder, its decoder once more."""

import json
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bas.io.files import write_json
from bas.models.vae import VAE
from tools.mini_world import drawing
from tools.train_mini.fit import fit
from tools.train_mini.presets import SEED, Preset, Recipe
from tools.train_mini.world import load_world, to_pictures, to_tensor


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruct(run: Path, device, recipe: Recipe):
    """Batches and the loss of a VAE as `fit` wants them, a preview of held-out scenes, and a measure of their PSNR."""
    images, _ = load_world(run)
    covers = np.load(run / "covers.npy", mmap_mode="r")
    held_out = len(images) - 512

    def draw(i):
        chosen = np.sort(np.random.default_rng((SEED, i)).choice(held_out, recipe.batch, replace=False))
        return images[chosen], torch.from_numpy(covers[chosen]), torch.Generator().manual_seed(i)

    def loss_of(vae, batch):
        pictures, covered, noise = batch
        x = to_tensor(pictures, device)
        weight = 1 + 3 * (covered.to(device)[:, None] / 255)  # backgrounds are learnt soon, objects are not
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise).to(device))
        decoded = decoded.float()
        pixels = (weight * (decoded - x).abs()).mean()
        squares = (weight * (decoded - x).square()).mean()  # holds whole areas of a wrong colour dear
        outline = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(x), strict=True))
        psnr = -10 * ((decoded - x).detach().square().mean() / 4).log10()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = pixels + 4 * squares + 0.5 * outline + 2e-4 * kl
        return loss, {"pixels": pixels.detach(), "kl": kl.detach(), "psnr": psnr}

    def preview(vae):
        x = to_tensor(images[held_out : held_out + 16], device)
        pictures = np.concatenate([images[held_out : held_out + 16], to_pictures(vae(x))])
        drawing.contact_sheet(pictures, columns=16).save(run / "vae_preview.png")

    @torch.no_grad()
    def measure(vae):
        """PSNR in dB over the held-out scenes, and the deviation of their latents."""
        x = to_tensor(images[held_out:], device)
        means = torch.cat([vae.encode(batch).mean for batch in x.split(64)])
        decoded = torch.cat([vae.decode(batch) for batch in means.split(64)])
        error = (decoded.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)) / 4
        return (-10 * error.log10()).mean().item(), means.std().item()

    return draw, loss_of, preview, measure


def train_vae(preset: Preset, run: Path, device) -> None:
    """Fit the autoencoder, then set its scaling factor so that latents have standard deviation 1."""
    if (run / "vae.json").exists():
        return
    torch.manual_seed(SEED)
    vae, recipe = VAE(preset.vae).to(device), preset.vae_recipe
    draw, loss_of, preview, measure = reconstruct(run, device, recipe)
    fit("vae", vae, draw, loss_of, recipe, run, lambda step: preview(vae))
    psnr, deviation = measure(vae)
    config = replace(preset.vae, scaling_factor=round(1 / deviation, 5))
    print(f"vae: {psnr:.2f} dB on 512 held-out scenes, scaling {config.scaling_factor}")
    write_json(run / "vae.json", config.to_json())


def load_vae(preset: Preset, run: Path, device) -> VAE:
    """The trained autoencoder, as it is by now, with its scaling factor."""
    scaling_factor = json.loads((run / "vae.json").read_text())["scaling_factor"]
    vae = VAE(replace(preset.vae, scaling_factor=scaling_factor))
    decoder = run / "decoder.safetensors"
    vae.load_state_dict(load_file(decoder if decoder.exists() else run / "vae.safetensors"))
    return vae.to(device).requires_grad_(False)


def object_cells(job) -> np.ndarray:
    """How much of each latent cell objects cover, (side, side) float16."""
    layout, side = job
    return drawing.draw(layout, side)[1].sum(0).astype(np.float16)


def encode_world(preset: Preset, run: Path, device) -> None:
    """Every training scene in latent cells: run/latents.pt, run/objects.pt.

    latents (N, 2, c, h, w) float16, the posterior's mean and deviation, unscaled; objects (N, h, w) float16 in 0..1.
    """
    if (run / "latents.pt").exists():
        return
    images, layouts = load_world(run)
    with Pool() as pool:
        cells = pool.map(object_cells, ((layout, preset.unet.sample_size) for layout in layouts), chunksize=256)
    torch.save(torch.from_numpy(np.stack(cells)), run / "objects.pt")
    vae, rows = load_vae(preset, run, device), []
    for start in range(0, len(images), 128):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            mean, logvar = vae.encode(to_tensor(images[start : start + 128], device))
        rows.append(torch.stack([mean.float(), (0.5 * logvar.float()).exp()], dim=1).half().cpu())
    torch.save(torch.cat(rows), run / "latents.pt")


def train_decoder(preset: Preset, run: Path, device) -> None:
    """Fit the decoder alone once more, as Stability AI did for Stable Diffusion: latents keep their meaning."""
    if (run / "decoder.safetensors").exists():
        return
    torch.manual_seed(SEED)
    vae, recipe = load_vae(preset, run, device), preset.decoder_recipe
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    draw, loss_of, preview, measure = reconstruct(run, device, recipe)
    before, _ = measure(vae)
    fit("decoder", vae, draw, loss_of, recipe, run, lambda step: preview(vae))
    print(f"decoder: {before:.2f} dB before, {measure(vae)[0]:.2f} dB after on 512 held-out scenes")
