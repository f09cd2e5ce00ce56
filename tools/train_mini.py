"""Trains the miniature Stable Diffusion of `weights/mini` from nothing, on the world of `mini_world.py`.

Stages, each resumable and each skipped once its result stands in the run folder:

    world      draw the training scenes once
    tokenizer  byte-level BPE in CLIP's file format, one token for every word of the captions
    vae        pictures <-> latents: L1, L2, edges, a little KL (Rombach et al. 2022, section 3.1)
    clip       text and image towers by contrast (Radford et al. 2021, section 2.3)
    latents    the training scenes through the frozen encoder
    unet       denoising of latents by captions, text tower included
    decoder    the VAE's decoder alone once more: the latents stay what the UNet learnt
    towers     CLIP's image tower once more, towards the text tower that the UNet reads: from here on there is only one
    export     the diffusers folder

A stage lasts a fixed wall-clock time, and its learning rate reaches zero exactly then, however fast the machine.

    python tools/train_mini.py all --preset cpu --run_dir runs/mini --output_dir weights/mini
    python tools/train_mini.py all --run_dir runs/more --start_from weights/mini --output_dir runs/more/mini
"""

import argparse
import copy
import json
import math
import os
import pickle
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import mini_world
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from bas.checkpoint import load
from bas.models.config import UNetConfig, VAEConfig
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.schedulers import NoiseSchedule, add_noise, ddim_step, sampling_timesteps, training_target

SEED = 2305  # of every stage; scene i of the training set is drawn from (SEED, i)
TEXT_LENGTH = 77  # positions of the text tower, as in CLIP
SCHEDULE = NoiseSchedule(steps_offset=1, prediction_type="v_prediction")  # Stable Diffusion 2.1's


@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""

    minutes: float  # wall clock, over which the learning rate falls to zero as a cosine
    batch: int
    lr: float
    ema: float  # decay of the averaged weights, which are the ones kept
    workers: int = 1  # threads that each take a batch of their own; on a CPU better than one batch on many threads


@dataclass(frozen=True)
class Preset:
    """A size of the miniature; the stages read everything from here."""

    resolution: int  # pixels a side
    scenes: int  # of the training set
    vae: VAEConfig
    vae_recipe: Recipe
    text_width: int
    text_layers: int
    patch: int  # pixels a side, of CLIP's image tower
    clip_recipe: Recipe
    unet: UNetConfig
    unet_recipe: Recipe
    decoder_recipe: Recipe
    towers_recipe: Recipe
    attention_grid: int  # rows and columns of the maps that the method's attention loss reads


PRESETS = {
    "cpu": Preset(
        resolution=64,
        scenes=60_000,
        vae=VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16, sample_size=64),
        vae_recipe=Recipe(minutes=30, batch=4, lr=1.5e-3, ema=0.998, workers=2),
        text_width=128,
        text_layers=3,
        patch=8,
        clip_recipe=Recipe(minutes=10, batch=256, lr=1e-3, ema=0.99),
        unet=UNetConfig(
            sample_size=16,
            block_out_channels=(64, 96, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=128,
            norm_num_groups=16,
        ),
        unet_recipe=Recipe(minutes=80, batch=24, lr=1e-3, ema=0.997, workers=2),
        decoder_recipe=Recipe(minutes=8, batch=4, lr=5e-4, ema=0.99, workers=2),
        towers_recipe=Recipe(minutes=5, batch=256, lr=5e-4, ema=0.98),
        attention_grid=16,
    ),
    "gpu": Preset(
        resolution=256,
        scenes=60_000,
        vae=VAEConfig(block_out_channels=(32, 64, 96, 128), layers_per_block=1, norm_num_groups=16, sample_size=256),
        vae_recipe=Recipe(minutes=6, batch=32, lr=1e-3, ema=0.999),
        text_width=192,
        text_layers=4,
        patch=32,
        clip_recipe=Recipe(minutes=3, batch=512, lr=1e-3, ema=0.995),
        unet=UNetConfig(
            sample_size=32,
            block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=192,
            norm_num_groups=32,
        ),
        unet_recipe=Recipe(minutes=12, batch=256, lr=1e-3, ema=0.9995),
        decoder_recipe=Recipe(minutes=2, batch=32, lr=5e-4, ema=0.995),
        towers_recipe=Recipe(minutes=1, batch=512, lr=5e-4, ema=0.99),
        attention_grid=16,
    ),
}  # fmt: skip


# --- the training loop that all stages share --------------------------------------------------------------------------


def fit(stage: str, module: nn.Module, loss_of, recipe: Recipe, run: Path, preview=None, preview_minutes=2.0):
    """Train `module` for `recipe.minutes`, then leave its averaged weights in it and in run/<stage>.safetensors.

    `loss_of(module, draw)` returns the loss and a dict of numbers to log; all its randomness comes from `draw`, so a
    run that was interrupted goes on from its checkpoint (every two minutes) as if nothing had happened.
    """
    if recipe.workers > 1:
        torch.set_num_threads(1)
    workers = ThreadPoolExecutor(recipe.workers)
    twins = [module] + [twin_of(module) for _ in range(recipe.workers - 1)]
    parameters = trainable(module)
    optimizer = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    average = [p.detach().clone() for p in parameters]
    step, before, checkpoint = 0, 0.0, run / f"{stage}.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, before = state["average"], state["step"], state["seconds"]
    start, saved, shown, seconds = time.monotonic(), before, before, before
    while seconds < 60 * recipe.minutes:
        warm_up = min(1.0, (step + 1) / 100)
        lr = recipe.lr * warm_up * 0.5 * (1 + math.cos(math.pi * seconds / (60 * recipe.minutes)))
        optimizer.param_groups[0]["lr"] = lr

        def work(k, step=step):
            loss, parts = loss_of(twins[k], recipe.workers * step + k)
            (loss / recipe.workers).backward()
            return loss.item(), parts

        (loss, parts), *_ = workers.map(work, range(recipe.workers))
        for twin in twins[1:]:
            for p, q in zip(parameters, trainable(twin), strict=True):
                p.grad += q.grad
                q.grad = None
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        step += 1
        seconds = before + time.monotonic() - start
        if step == 1 or step % 25 == 0:
            line = {"step": step, "seconds": round(seconds, 1), "lr": lr, "loss": loss, **parts}
            with open(run / f"{stage}.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        if seconds - saved > 120:
            saved = seconds
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"average": average, "step": step, "seconds": seconds}, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
            plot_losses(run / f"{stage}.jsonl")
            if preview and seconds - shown >= 60 * preview_minutes:
                shown = seconds
                with torch.no_grad(), swapped(parameters, average):
                    preview(step)
    for p, mean in zip(parameters, average, strict=True):
        p.data.copy_(mean)
    save_weights(module, run / f"{stage}.safetensors")
    plot_losses(run / f"{stage}.jsonl")
    checkpoint.unlink(missing_ok=True)


def trainable(module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def twin_of(module):
    """A copy of the module that shares its weights, but not its gradients."""
    twin = copy.deepcopy(module)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        q.data = p.data
    return twin


class swapped:
    """Within the block, `parameters` hold the values of `others`."""

    def __init__(self, parameters, others):
        self.parameters, self.others = parameters, others

    def __enter__(self):
        self.kept = [p.detach().clone() for p in self.parameters]
        for p, other in zip(self.parameters, self.others, strict=True):
            p.data.copy_(other)

    def __exit__(self, *_):
        for p, kept in zip(self.parameters, self.kept, strict=True):
            p.data.copy_(kept)


def save_weights(module, path: Path, dtype=torch.float32) -> None:
    """The module's state dict as a safetensors file, floating-point tensors in `dtype`."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, f"{path}.part", metadata={"format": "pt"})
    os.replace(f"{path}.part", path)


def plot_losses(log: Path) -> None:
    """The loss over time from a jsonl log, smoothed, on a logarithmic axis, as <log>.png."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = np.log10([max(line["loss"], 1e-8) for line in lines])
    window = max(1, len(losses) // 60)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    if len(smooth) < 2:
        return
    low, high, width, height = smooth.min(), smooth.max() + 1e-6, 480, 240
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    xs = np.linspace(40, width - 10, len(smooth))
    ys = height - 20 - (smooth - low) / (high - low) * (height - 40)
    canvas.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=(30, 90, 180), width=2)
    canvas.text((2, 14), f"{10**high:.3g}", fill="black")
    canvas.text((2, height - 26), f"{10**low:.3g}", fill="black")
    canvas.text((width // 2, height - 14), f"{log.stem}: {lines[-1]['step']} steps", fill="black")
    image.save(log.with_suffix(".png"))


# --- world ------------------------------------------------------------------------------------------------------------


def draw_scene(job):
    index, size = job
    layout = mini_world.compose(np.random.default_rng((SEED, index)))
    return layout, mini_world.draw(layout, size)[0]


def make_world(preset: Preset, run: Path) -> None:
    """Draw the training scenes: run/images.npy (N, H, W, 3) uint8, and run/layouts.pkl for the captions."""
    if (run / "layouts.pkl").exists():
        return
    shape = (preset.scenes, preset.resolution, preset.resolution, 3)
    images = np.lib.format.open_memmap(run / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    layouts = []
    with Pool() as pool:
        jobs = ((i, preset.resolution) for i in range(preset.scenes))
        for i, (layout, image) in enumerate(pool.imap(draw_scene, jobs, chunksize=64)):
            images[i] = image
            layouts.append(layout)
    images.flush()
    (run / "layouts.pkl").write_bytes(pickle.dumps(layouts))


def load_world(run: Path):
    """Images (N, H, W, 3) uint8, mapped from disk, and their layouts."""
    return np.load(run / "images.npy", mmap_mode="r"), pickle.loads((run / "layouts.pkl").read_bytes())


def to_tensor(images: np.ndarray, device) -> Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> np.ndarray:
    """(b, 3, H, W) in [-1, 1] -> (b, H, W, 3) uint8"""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# --- vae --------------------------------------------------------------------------------------------------------------


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruct(preset: Preset, run: Path, device, recipe: Recipe):
    """The loss of a VAE as `fit` wants it, a preview of held-out scenes, and a function that measures their PSNR."""
    images, layouts = load_world(run)
    held_out = len(images) - 512

    def loss_of(vae, draw):
        rng, noise = np.random.default_rng((SEED, draw)), torch.Generator(device).manual_seed(draw)
        chosen = np.sort(rng.choice(held_out, recipe.batch, replace=False))
        x = to_tensor(images[chosen], device)
        covered = np.stack([mini_world.draw(layouts[i], preset.resolution)[1].sum(0) for i in chosen])
        weight = 1 + 3 * torch.from_numpy(covered)[:, None].to(device)  # backgrounds are learnt soon, objects are not
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = vae.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise, device=device))
        decoded = decoded.float()
        pixels = (weight * (decoded - x).abs()).mean()
        squares = (weight * (decoded - x).square()).mean()  # holds whole areas of a wrong colour dear
        outline = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(x), strict=True))
        psnr = -10 * math.log10((decoded - x).square().mean().item() / 4)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = pixels + 4 * squares + 0.5 * outline + 2e-4 * kl
        return loss, {"pixels": pixels.item(), "kl": kl.item(), "psnr": psnr}

    def preview(vae):
        x = to_tensor(images[held_out : held_out + 16], device)
        pictures = np.concatenate([images[held_out : held_out + 16], to_pictures(vae(x))])
        mini_world.contact_sheet(pictures, columns=16).save(run / "vae_preview.png")

    @torch.no_grad()
    def measure(vae):
        """PSNR in dB over the held-out scenes, and the deviation of their latents."""
        x = to_tensor(images[held_out:], device)
        means = torch.cat([vae.encode(batch).mean for batch in x.split(64)])
        decoded = torch.cat([vae.decode(batch) for batch in means.split(64)])
        error = (decoded.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)) / 4
        return (-10 * error.log10()).mean().item(), means.std().item()

    return loss_of, preview, measure


def train_vae(preset: Preset, run: Path, device) -> None:
    """Fit the autoencoder, then set its scaling factor so that latents have standard deviation 1."""
    if (run / "vae.json").exists():
        return
    torch.manual_seed(SEED)
    vae, recipe = VAE(preset.vae).to(device), preset.vae_recipe
    loss_of, preview, measure = reconstruct(preset, run, device, recipe)
    fit("vae", vae, loss_of, recipe, run, lambda step: preview(vae))
    psnr, deviation = measure(vae)
    config = replace(preset.vae, scaling_factor=round(1 / deviation, 5))
    print(f"vae: {psnr:.2f} dB on 512 held-out scenes, scaling {config.scaling_factor}")
    write_json(run / "vae.json", config.to_json())


def train_decoder(preset: Preset, run: Path, device) -> None:
    """Fit the decoder alone once more, as Stability AI did for Stable Diffusion: latents keep their meaning."""
    if (run / "decoder.safetensors").exists():
        return
    torch.manual_seed(SEED)
    vae, recipe = load_vae(preset, run, device), preset.decoder_recipe
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    loss_of, preview, measure = reconstruct(preset, run, device, recipe)
    before, _ = measure(vae)
    fit("decoder", vae, loss_of, recipe, run, lambda step: preview(vae))
    print(f"decoder: {before:.2f} dB before, {measure(vae)[0]:.2f} dB after on 512 held-out scenes")


# --- tokenizer --------------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """One printable character for each byte, in the order of GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: Counter) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016), most frequent first, until each of the words is one symbol."""
    spellings = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while any(len(symbols) > 1 for symbols in spellings.values()):
        pairs = Counter()
        for word, symbols in spellings.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, symbols in spellings.items():
            merged, i = [], 0
            while i < len(symbols):
                together = symbols[i : i + 2] == best
                merged.append("".join(best) if together else symbols[i])
                i += 2 if together else 1
            spellings[word] = tuple(merged)
    return merges


def make_tokenizer(preset: Preset, run: Path) -> None:
    """Write run/tokenizer in CLIP's format: every word of the captions is one token, any other text is bytes."""
    folder = run / "tokenizer"
    if (folder / "tokenizer_config.json").exists():
        return
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(SEED)
    captions = (mini_world.describe(mini_world.compose(rng), rng) for _ in range(20_000))
    merges = learn_merges(Counter(word for caption in captions for word in caption.lower().split()))
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "do_lower_case": True, **special}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenize(tokenizer, captions: list[str], length: int = TEXT_LENGTH) -> Tensor:
    """Captions -> (b, length) token ids, padded with <|endoftext|>."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


# --- clip -------------------------------------------------------------------------------------------------------------


def clip_config(preset: Preset, tokenizer) -> CLIPConfig:
    """Two towers of one width; the text tower has CLIP's 77 positions."""
    tower = {
        "hidden_size": preset.text_width,
        "intermediate_size": 4 * preset.text_width,
        "num_hidden_layers": preset.text_layers,
        "num_attention_heads": 4,
        "projection_dim": preset.text_width,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": preset.resolution, "patch_size": preset.patch}
    return CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=preset.text_width)


def train_clip(preset: Preset, run: Path, device) -> None:
    """Fit both towers so that a picture and its caption agree, and none of the other pairs of the batch."""
    if (run / "clip.safetensors").exists():
        return
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    fit_towers("clip", CLIPModel(clip_config(preset, tokenizer)).to(device), tokenizer, preset.clip_recipe, run)


def train_towers(preset: Preset, run: Path, device) -> None:
    """Put the text tower that the UNet reads into CLIP and fit the rest to it: one text tower, as in Stable Diffusion.

    The text tower stays as it is (the idea of Zhai et al. 2022, locked-image tuning, with the towers exchanged).
    """
    if (run / "towers.safetensors").exists():
        return
    torch.manual_seed(SEED)
    clip, tokenizer = load_clip(preset, run, device)
    clip.text_model.load_state_dict(part_of(load_file(run / "unet.safetensors"), "text_model."))
    clip.requires_grad_(True).text_model.requires_grad_(False)
    fit_towers("towers", clip, tokenizer, preset.towers_recipe, run)


def fit_towers(stage: str, clip: CLIPModel, tokenizer: CLIPTokenizer, recipe: Recipe, run: Path) -> None:
    """Train whatever of the two towers is not frozen, by contrast, and say how well held-out scenes are told apart."""
    images, layouts = load_world(run)
    held_out, device = len(images) - 512, clip.device

    def similarity(chosen, rng):
        """Cosines (b, b) of pictures against captions worded with `rng`, or complete without it."""
        x = to_tensor(images[chosen], device)
        captions = [mini_world.describe(layouts[i], rng) for i in chosen]
        ids = tokenize(tokenizer, captions, 40).to(device)  # causal: the tokens after the end change nothing
        with torch.autocast(device.type, torch.bfloat16):
            seen = clip.visual_projection(clip.vision_model(x).pooler_output)
            told = clip.text_projection(clip.text_model(ids).pooler_output)
        return F.normalize(seen.float(), dim=-1) @ F.normalize(told.float(), dim=-1).T

    def loss_of(clip, draw):
        rng = np.random.default_rng((SEED, draw))
        cosines = similarity(np.sort(rng.choice(held_out, recipe.batch, replace=False)), rng)
        logits = cosines * clip.logit_scale.exp().clamp(max=100)
        target = torch.arange(len(logits), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"matched": (logits.argmax(1) == target).float().mean().item()}

    fit(stage, clip, loss_of, recipe, run)
    with torch.no_grad():
        cosines = similarity(np.arange(held_out, len(images)), None)
    matched = (cosines.argmax(1).cpu() == torch.arange(512)).float().mean()
    print(f"{stage}: {100 * matched:.1f} % of 512 held-out scenes find their own complete caption among all 512")


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# --- latents and unet -------------------------------------------------------------------------------------------------


def load_vae(preset: Preset, run: Path, device) -> VAE:
    """The trained autoencoder, as it is by now, with its scaling factor."""
    scaling_factor = json.loads((run / "vae.json").read_text())["scaling_factor"]
    vae = VAE(replace(preset.vae, scaling_factor=scaling_factor))
    newest = next(path for path in (run / "decoder.safetensors", run / "vae.safetensors") if path.exists())
    vae.load_state_dict(load_file(newest))
    return vae.to(device).requires_grad_(False)


def adopt(preset: Preset, run: Path, folder: Path) -> None:
    """Start from a miniature in a diffusers folder: its tokenizer, VAE and towers stay, its UNet trains on."""
    shutil.copytree(folder / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    shutil.copy(folder / "vae/config.json", run / "vae.json")
    models = load(folder, "cpu")
    clip = CLIPModel.from_pretrained(folder / "clip")
    denoiser = Denoiser(UNet(preset.unet), clip.text_model)
    save_weights(models.vae, run / "vae.safetensors")
    save_weights(clip, run / "clip.safetensors")
    denoiser.unet.load_state_dict(models.unet.state_dict())
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    denoiser.text_model.load_state_dict(text_encoder.state_dict())
    save_weights(denoiser, run / "unet_start.safetensors")


def load_clip(preset: Preset, run: Path, device) -> tuple[CLIPModel, CLIPTokenizer]:
    """Both trained towers, as they are by now, and their tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    clip = CLIPModel(clip_config(preset, tokenizer))
    newest = next(path for path in (run / "towers.safetensors", run / "clip.safetensors") if path.exists())
    clip.load_state_dict(load_file(newest))
    return clip.to(device).requires_grad_(False), tokenizer


def object_cells(job) -> np.ndarray:
    """How much of each latent cell objects cover, (side, side) float16."""
    layout, side = job
    return mini_world.draw(layout, side)[1].sum(0).astype(np.float16)


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


class Denoiser(nn.Module):
    """The UNet and the text tower it reads: noisy latents, timesteps and token ids -> predicted noise."""

    def __init__(self, unet: UNet, text_model: nn.Module):
        super().__init__()
        self.unet, self.text_model = unet, text_model

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """z: (b, c, h, w), t: (b,), ids: (b, 77) -> (b, c, h, w)"""
        return self.unet(z, t, self.text_model(ids).last_hidden_state).sample


def train_unet(preset: Preset, run: Path, device) -> None:
    """Fit the UNet to predict v from latents, timestep and caption; one caption in ten is empty, for guidance.

    Three choices spend a small budget well. v rather than noise (Salimans and Ho 2022): noise asks next to nothing of
    the network where the picture is still to be decided, and shapes are decided there. Timesteps with little noise are
    drawn rarely (the idea of min-SNR weights, Hang et al. 2023, as a density). Cells with objects count three times.
    Unlike in Stable Diffusion the text tower trains along: after so short a contrastive training its features for two
    shapes differ four times less than for two colours, and shapes stay blobs.
    """
    if (run / "unet.safetensors").exists():
        return
    torch.manual_seed(SEED)
    _, layouts = load_world(run)
    latents = torch.load(run / "latents.pt", weights_only=True)
    objects = torch.load(run / "objects.pt", weights_only=True)
    vae, (clip, tokenizer) = load_vae(preset, run, device), load_clip(preset, run, device)
    denoiser = Denoiser(UNet(preset.unet), clip.text_model.requires_grad_(True)).to(device)
    if (run / "unet_start.safetensors").exists():
        denoiser.load_state_dict(load_file(run / "unet_start.safetensors"))
    schedule, recipe = SCHEDULE, preset.unet_recipe
    signal_to_noise = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    importance = (1 + signal_to_noise).clamp(max=5) / (1 + signal_to_noise)
    if device.type == "cuda":
        denoiser.unet.compile()

    def loss_of(denoiser, draw):
        rng, generator = np.random.default_rng((SEED, draw)), torch.Generator().manual_seed(draw)
        chosen = rng.integers(len(layouts), size=recipe.batch)
        captions = [mini_world.describe(layouts[i], rng) if rng.random() > 0.1 else "" for i in chosen]
        mean, deviation = latents[torch.from_numpy(chosen)].float().unbind(1)
        z0 = vae.config.scaling_factor * (mean + deviation * torch.randn(mean.shape, generator=generator))
        eps = torch.randn(z0.shape, generator=generator)
        t = torch.multinomial(importance, recipe.batch, replacement=True, generator=generator)
        z = add_noise(schedule, z0, eps, t)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = denoiser(z.to(device), t.to(device), tokenize(tokenizer, captions).to(device))
        error = (predicted.float() - training_target(schedule, z0, eps, t).to(device)).square().mean(dim=1)
        weight = 1 + 2 * objects[torch.from_numpy(chosen)].float().to(device)
        return (weight * error).sum() / weight.sum(), {"mse": error.mean().item()}

    def preview(step):
        pictures = sample(denoiser, vae, schedule, tokenize(tokenizer, ["", *PREVIEW_PROMPTS]).to(device))
        mini_world.contact_sheet(pictures).save(run / f"unet_{step:06d}.png")

    fit("unet", denoiser, loss_of, recipe, run, preview, preview_minutes=recipe.minutes / 10)


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
def sample(denoiser, vae, schedule, ids: Tensor, steps: int = 25, guidance: float = 4.0, seed: int = 0) -> np.ndarray:
    """Guided DDIM (Song et al. 2021; Ho and Salimans 2022): pictures (b, H, W, 3) uint8.

    ids: (1 + b, 77), token ids of the empty prompt and of b prompts.
    """
    b, side = len(ids) - 1, denoiser.unet.config.sample_size
    shape = (b, vae.config.latent_channels, side, side)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(ids.device)
    both = torch.cat([ids[:1].expand(b, -1), ids[1:]])
    timesteps = sampling_timesteps(schedule, steps)
    for t, prev_t in zip(timesteps, [*timesteps[1:], -1], strict=True):
        times = torch.full((2 * b,), t, device=z.device)
        with torch.autocast(z.device.type, torch.bfloat16):
            without, with_prompt = denoiser(torch.cat([z, z]), times, both).float().chunk(2)
        z = ddim_step(schedule, z, without + guidance * (with_prompt - without), t, prev_t)
    return to_pictures(vae.decode(z / vae.config.scaling_factor))


# --- export -----------------------------------------------------------------------------------------------------------


def export(preset: Preset, run: Path, folder: Path) -> None:
    """Write the diffusers folder and, beside it, both CLIP towers; of an unfinished UNet, its average so far."""
    vae, (clip, _) = load_vae(preset, run, "cpu"), load_clip(preset, run, "cpu")
    denoiser = Denoiser(UNet(preset.unet), copy.deepcopy(clip.text_model))
    if (run / "unet.safetensors").exists():
        denoiser.load_state_dict(load_file(run / "unet.safetensors"))
    else:
        average = torch.load(run / "unet.ckpt", weights_only=True)["average"]
        for p, mean in zip(denoiser.parameters(), average, strict=True):
            p.data.copy_(mean)
    save_weights(denoiser.unet, folder / "unet/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "unet/config.json", preset.unet.to_json())
    save_weights(vae, folder / "vae/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "vae/config.json", vae.config.to_json())
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULE.to_json())

    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(denoiser.text_model.state_dict())
    text_encoder.save_pretrained(folder / "text_encoder")
    clip.save_pretrained(folder / "clip")
    side, half = preset.vae.sample_size, [0.5] * 3  # pictures enter in [-1, 1]
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    prepare.save_pretrained(folder / "clip")
    for place in ("tokenizer", "clip"):
        shutil.copytree(run / "tokenizer", folder / place, dirs_exist_ok=True)
    modules = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    flags = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.20.0", "requires_safety_checker": False}
    write_json(folder / "model_index.json", flags | modules)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def fast_attention(device) -> None:
    """On a CPU the fused attention's backward pass takes most of a step; plain matrix products take a quarter of it."""
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)  # these two switches govern the CPU as well
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


STAGES = {
    "world": lambda preset, run, device: make_world(preset, run),
    "tokenizer": lambda preset, run, device: make_tokenizer(preset, run),
    "vae": train_vae,
    "clip": train_clip,
    "latents": encode_world,
    "unet": train_unet,
    "decoder": train_decoder,
    "towers": train_towers,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "export", "all"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/mini"), help="checkpoints, logs, previews")
    parser.add_argument("--output_dir", type=Path, default=Path("weights/mini"), help="where `export` writes")
    parser.add_argument(
        "--start_from", type=Path, help="a miniature whose VAE and towers stay and whose UNet trains on"
    )
    parser.add_argument("--minutes", type=float, help="length of this stage instead of the preset's")
    parser.add_argument("--lr", type=float, help="highest learning rate of this stage instead of the preset's")
    args = parser.parse_args()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[args.preset]
    changed = {name: value for name in ("minutes", "lr") if (value := getattr(args, name))}
    if changed and args.stage in ("vae", "clip", "unet", "decoder", "towers"):
        recipe = f"{args.stage}_recipe"
        preset = replace(preset, **{recipe: replace(getattr(preset, recipe), **changed)})
    if args.start_from:
        adopt(preset, args.run_dir, args.start_from)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_attention(device)
    for stage, run_stage in STAGES.items():
        if args.stage in (stage, "all"):
            run_stage(preset, args.run_dir, device)
    if args.stage in ("export", "all"):
        export(preset, args.run_dir, args.output_dir)


if __name__ == "__main__":
    main()
