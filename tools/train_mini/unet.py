"""The stage of the miniature's UNet, and the pictures that show how far it is."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bas.models.unet import UNet
from bas.schedulers import add_noise, ddim_step, sampling_timesteps, training_target
from tools.mini_world.captions import describe
from tools.mini_world.drawing import contact_sheet
from tools.train_mini.clip import load_clip
from tools.train_mini.fit import fit
from tools.train_mini.presets import SCHEDULE, SEED, Preset
from tools.train_mini.tokenizer import tokenize
from tools.train_mini.vae import load_vae
from tools.train_mini.world import load_world, to_pictures


def train_unet(preset: Preset, run: Path, device) -> None:
    """Fit the UNet to predict v from latents, timestep and caption; one caption in ten is empty, for guidance.

    Three choices spend a small budget well. v rather than noise (Salimans and Ho 2022): noise asks next to nothing of
    the network where the picture is still to be decided, and shapes are decided there. Timesteps with little noise are
    drawn rarely (the idea of min-SNR weights, Hang et al. 2023, as a density). Cells with objects count three times.
    The text tower is CLIP's and stays as it is, as in Stable Diffusion.
    """
    if (run / "unet.safetensors").exists():
        return
    torch.manual_seed(SEED)
    _, layouts = load_world(run)
    latents = torch.load(run / "latents.pt", weights_only=True)
    objects = torch.load(run / "objects.pt", weights_only=True)
    vae, (clip, tokenizer) = load_vae(preset, run, device), load_clip(preset, run, device)
    unet = UNet(preset.unet).to(device)
    if (run / "unet_start.safetensors").exists():
        unet.load_state_dict(load_file(run / "unet_start.safetensors"))
    schedule, recipe = SCHEDULE, preset.unet_recipe
    signal_to_noise = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    importance = (1 + signal_to_noise).clamp(max=5) / (1 + signal_to_noise)
    if device.type == "cuda":
        unet.compile()

    def encode(ids: Tensor) -> Tensor:
        """(b, 77) -> (b, 77, d)"""
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return clip.text_model(ids).last_hidden_state

    def draw(i):
        rng, generator = np.random.default_rng((SEED, i)), torch.Generator().manual_seed(i)
        chosen = rng.integers(len(layouts), size=recipe.batch)
        captions = [describe(layouts[k], rng) if rng.random() > 0.1 else "" for k in chosen]
        mean, deviation = latents[torch.from_numpy(chosen)].float().unbind(1)
        z0 = vae.config.scaling_factor * (mean + deviation * torch.randn(mean.shape, generator=generator))
        eps = torch.randn(z0.shape, generator=generator)
        t = torch.multinomial(importance, recipe.batch, replacement=True, generator=generator)
        weight = 1 + 2 * objects[torch.from_numpy(chosen)].float()
        target = training_target(schedule, z0, eps, t)
        return add_noise(schedule, z0, eps, t), t, tokenize(tokenizer, captions), target, weight

    def loss_of(unet, batch):
        z, t, ids, target, weight = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(z, t, encode(ids)).sample
        error = (predicted.float() - target).square().mean(dim=1)
        return (weight * error).sum() / weight.sum(), {"mse": error.mean().detach()}

    def preview(step):
        pictures = sample(unet, vae, schedule, encode(tokenize(tokenizer, ["", *PREVIEW_PROMPTS]).to(device)))
        contact_sheet(pictures).save(run / f"unet_{step:06d}.png")

    fit("unet", unet, draw, loss_of, recipe, run, preview, preview_minutes=recipe.minutes / 10)


PREVIEW_PROMPTS = [
    "a photo of a red star at the beach",
    "a photo of a blue mug on top of a wooden floor",
    "a photo of a green tree in the snow",
    "a photo of a yellow fish floating on top of water",
    "a photo of a pink heart in the jungle",
    "a photo of a white house with a mountain in the background",
    "a photo of an orange ball in the street",
    "a photo of a purple ring with a city in the background",
    "a photo of a black cross on top of a pink fabric",
    "a photo of a cyan bottle with the Eiffel tower in the background",
    "a photo of a yellow flower in front of a wall",
    "a photo of a red striped cube in the snow",
    "a photo of a blue star and a yellow mug at the beach",
    "a photo of a green dotted ball and a red heart in the street",
    "a photo of a star",
    "a photo in the jungle",
]


@torch.no_grad()
def sample(unet, vae, schedule, text: Tensor, steps: int = 25, guidance: float = 4.0, seed: int = 0) -> np.ndarray:
    """Guided DDIM (Song et al. 2021; Ho and Salimans 2022): pictures (b, H, W, 3) uint8.

    text: (1 + b, 77, d), of the empty prompt and of b prompts.
    """
    b, side = len(text) - 1, unet.config.sample_size
    shape = (b, vae.config.latent_channels, side, side)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(text.device)
    both = torch.cat([text[:1].expand(b, -1, -1), text[1:]])
    timesteps = sampling_timesteps(schedule, steps)
    for t, prev_t in zip(timesteps, [*timesteps[1:], -1], strict=True):
        times = torch.full((2 * b,), t, device=z.device)
        with torch.autocast(z.device.type, torch.bfloat16):
            without, with_prompt = unet(torch.cat([z, z]), times, both).sample.float().chunk(2)
        z = ddim_step(schedule, z, without + guidance * (with_prompt - without), t, prev_t)
    return to_pictures(vae.decode(z / vae.config.scaling_factor))
