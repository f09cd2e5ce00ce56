"""The official training loop (google/break-a-scene, train.py at commit b142cf2) on current PyTorch and diffusers.

What a user of the official code has today, for the bench to measure bas against: an explicit softmax in every
attention layer with its probabilities kept, a VAE encoding at every step, class images in both phases, one optimizer
and one gradient norm over the whole token embedding in phase 1, losses read from the device at every step; fp16
autocast over float32 weights on a GPU, float32 on a CPU. `tests/tools/test_official_loop.py` holds it to the official
code's recorded numbers. Left out is one defect: in fp16 the official phase 2 divides the handles' gradient by the loss
scale twice.

    python -m tools.bench.official_loop train SCENE --weights MODEL --class_data_dir IMAGES --output_dir RUN
    python -m tools.bench.official_loop sample RUN --prompt "a photo of <asset0>" --output IMAGE
"""

import argparse
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from bas.io.images import pixels, read_image, read_mask, to_floats

CLASS_PROMPT = "a photo at the beach"
CLASS_BATCH = 4  # class images generated at once
SCALING = 0.18215  # of the latents; the official code has the number, not the VAE's config
LARGEST_KEPT = 32**2  # queries: larger maps are not recorded (autograd keeps them all the same)
LAMBDA_ATTENTION = 1e-2
LEARNING_RATES = {1: 5e-4, 2: 2e-6}  # by phase


# --- Attention ----------------------------------------------------------------------------------------------------


@dataclass
class AttentionStore:
    """The instances' attention probabilities of one forward pass, by the part of the UNet and the kind of layer."""

    maps: dict[str, list[Tensor]] = field(default_factory=dict)

    def clear(self) -> None:
        self.maps = {f"{place}_{kind}": [] for place in ("down", "mid", "up") for kind in ("cross", "self")}

    def __post_init__(self):
        self.clear()


class StoringProcessor:
    """Attention by an explicit softmax; the second half of the batch, the instances, goes to the store."""

    def __init__(self, store: AttentionStore, place: str):
        self.store, self.place = store, place

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        """hidden_states: (b, n, c), encoder_hidden_states: (b, k, d) or None for self-attention -> (b, n, c)"""
        kind = "self" if encoder_hidden_states is None else "cross"
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(context))
        v = attn.head_to_batch_dim(attn.to_v(context))
        probs = attn.get_attention_scores(q, k)  # (b x heads, n, k)
        if probs.shape[1] <= LARGEST_KEPT:
            self.store.maps[f"{self.place}_{kind}"].append(probs[len(probs) // 2 :])
        out = attn.batch_to_head_dim(torch.bmm(probs, v))
        return attn.to_out[1](attn.to_out[0](out))


def aggregate(store: AttentionStore, rows: int, columns: int) -> Tensor:
    """Mean over layers and heads of the cross-attention of the down and up blocks on one grid. -> (rows, columns, k)

    The official code divides every recorded map, of all layers, by the number of passes, here 1.
    """
    averaged = {key: [probs / 1 for probs in maps] for key, maps in store.maps.items()}
    chosen = [p for key in ("up_cross", "down_cross") for p in averaged[key] if p.shape[1] == rows * columns]
    layers = torch.cat([p.reshape(-1, rows, columns, p.shape[-1]) for p in chosen])
    return layers.sum(0) / len(layers)


# --- The loop -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfficialScene:
    """The image, its masks and the class images, as the official data set holds them."""

    image: Tensor  # (3, H, W) in [-1, 1]
    masks: Tensor  # (N, 1, H, W) in [0, 1]
    class_images: tuple[Path, ...]  # read from disk at every step


@dataclass(frozen=True)
class Example:
    """One step's input: class image first, image second."""

    pixels: Tensor  # (2, 3, H, W)
    input_ids: Tensor  # (2, 77)
    masks: Tensor  # (n, 1, H, W) of the chosen concepts
    concepts: list[int]  # their numbers, in the order of the prompt


class OfficialLoop:
    """Models, optimizer and one step of the official training."""

    def __init__(self, weights: Path, words: list[str], device: str = "cpu", half: bool | None = None):
        """`half`: fp16 autocast and VAE; None is the official default, on a GPU and nowhere else."""
        transformers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()
        self.device = torch.device(device)
        self.half = self.device.type == "cuda" if half is None else half
        self.noise_scheduler = DDPMScheduler.from_pretrained(weights, subfolder="scheduler")
        self.tokenizer = CLIPTokenizer.from_pretrained(weights, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(weights, subfolder="text_encoder", dtype=torch.float32)
        self.vae = AutoencoderKL.from_pretrained(weights, subfolder="vae", torch_dtype=torch.float32)
        self.unet = UNet2DConditionModel.from_pretrained(weights, subfolder="unet", torch_dtype=torch.float32)
        self.handles = [f"<asset{i}>" for i in range(len(words))]
        self.handle_ids = self.add_handles(words)
        self.vae.to(self.device, torch.float16 if self.half else torch.float32).requires_grad_(False)
        self.text_encoder.to(self.device).train()
        self.unet.to(self.device).train()
        self.store = AttentionStore()
        self.unet.set_attn_processor(
            {name: StoringProcessor(self.store, name.split("_")[0]) for name in self.unet.attn_processors}
        )
        self.predict = self.unet  # or its compiled form
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)

    def add_handles(self, words: list[str]) -> list[int]:
        """New rows of the embedding, each a copy of the first piece of its word; returns their token ids."""
        self.tokenizer.add_tokens(self.handles)
        self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        ids, rows = self.tokenizer.convert_tokens_to_ids(self.handles), self.embedding.data
        for handle_id, word in zip(ids, words, strict=True):
            rows[handle_id] = rows[self.tokenizer.encode(word, add_special_tokens=False)[0]]
        return ids

    @property
    def embedding(self) -> nn.Parameter:
        """All rows of the token embedding, the handles last. (V+N, d)"""
        return self.text_encoder.get_input_embeddings().weight

    def compile(self) -> None:
        """The UNet's best compiled form: the stored probabilities become outputs of its graph."""
        self.predict = torch.compile(self.unet)

    def begin(self, phase: int) -> None:
        """Freeze what the phase does not train; a fresh optimizer over the rest, the whole embedding in phase 1."""
        self.phase = phase
        self.unet.requires_grad_(phase == 2)
        self.text_encoder.requires_grad_(phase == 2)
        self.embedding.requires_grad_(True)
        self.clipped = [*self.unet.parameters(), *self.text_encoder.parameters()]
        trained = [p for p in self.clipped if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATES[phase], (0.9, 0.999), 1e-8, 1e-2)
        self.first_rows = self.embedding.detach().clone()

    def autocast(self):
        """fp16 products around a network's forward pass, as accelerate wraps it."""
        return torch.autocast(self.device.type, torch.float16) if self.half else nullcontext()

    def draw(self, scene: OfficialScene, index: int) -> Example:
        """One row of the official data set: a random subset, a flip, the prompt; class image `index` from disk."""
        concepts = random.sample(range(len(self.handles)), k=random.randrange(1, len(self.handles) + 1))
        image, masks = scene.image, scene.masks[concepts]
        if random.random() > 0.5:
            image, masks = image.flip(-1), masks.flip(-1)
        prompt = "a photo of " + " and ".join(self.handles[i] for i in concepts)
        class_image = pixels(read_image(scene.class_images[index % len(scene.class_images)]))
        if class_image.shape != image.shape:
            class_image = F.interpolate(class_image[None], size=image.shape[1:], mode="area")[0]
        return Example(torch.stack([class_image, image]), self.tokenize([CLASS_PROMPT, prompt]), masks, concepts)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(b, 77) token ids"""
        length = self.tokenizer.model_max_length
        found = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids

    def encode(self, images: Tensor) -> Tensor:
        """A posterior sample of each image. (b, 3, H, W) -> (b, 4, h, w), scaled"""
        return self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.sample() * SCALING

    def losses(self, example: Example, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step, and its unweighted parts. latents, noise: (2, 4, h, w); t: (2,)"""
        ids, masks = example.input_ids.to(self.device), example.masks.to(self.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, t)
        with self.autocast():
            states = self.text_encoder(ids)[0]
        with self.autocast():
            prediction = self.predict(noisy, t, states.float()).sample
        if self.noise_scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = self.noise_scheduler.get_velocity(latents, noise, t)
        prior, instance = prediction.float().chunk(2)
        prior_target, target = target.float().chunk(2)
        h, w = latents.shape[-2:]
        union = F.interpolate(masks.amax(0, keepdim=True), size=(h, w))
        parts = {"reconstruction": F.mse_loss(instance * union, target * union)}
        parts["prior"] = F.mse_loss(prior, prior_target)

        grid = h // 4, w // 4
        small, average = F.interpolate(masks, size=grid), aggregate(self.store, *grid)
        parts["attention"] = torch.zeros((), device=self.device)
        for i, concept in enumerate(example.concepts):
            place = (ids[1] == self.handle_ids[concept]).nonzero().item()  # waits for the device
            column = average[..., place]
            parts["attention"] = parts["attention"] + F.mse_loss(small[i, 0], (column / column.max()).float())
        return parts["reconstruction"] + parts["prior"] + LAMBDA_ATTENTION * parts["attention"], parts

    def backward(self, loss: Tensor) -> Tensor:
        """Gradients, then one clipping over all networks. Returns the norm before it."""
        self.scaler.scale(loss).backward()
        self.store.clear()
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.clipped, 1.0)

    def update(self) -> None:
        """The optimizer's step; in phase 1 all rows but the handles are put back."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        if self.phase == 1:
            with torch.no_grad():
                self.embedding[: -len(self.handles)] = self.first_rows[: -len(self.handles)]

    def step(self, scene: OfficialScene, index: int) -> dict[str, float]:
        """One whole training step, from the files to the updated weights; the losses as numbers."""
        example = self.draw(scene, index)
        latents = self.encode(example.pixels)
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (2,), device=self.device)
        loss, parts = self.losses(example, latents, noise, t)
        logs = {"attention": parts["attention"].detach().item()}
        self.backward(loss)
        self.update()
        return logs | {"loss": loss.detach().item()}

    def stepper(self, scene: OfficialScene) -> Callable[[], dict[str, float]]:
        """`step` with the next class image at each call."""
        index = count()
        return lambda: self.step(scene, next(index))

    def save(self, weights: Path, folder: Path) -> None:
        """The whole model as a pipeline, as the official code ends."""
        tuned = {"unet": self.unet, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        pipeline = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None, **tuned)
        pipeline.save_pretrained(folder)


# --- The commands -------------------------------------------------------------------------------------------------


def open_pipeline(weights: Path, device: str) -> StableDiffusionPipeline:
    """diffusers' pipeline, quiet; half precision on a GPU."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(weights, torch_dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def class_images_in(folder: Path) -> tuple[Path, ...]:
    """The folder's images, by name."""
    return tuple(sorted(folder.glob("*.[jp]*g")))


def make_class_images(weights: Path, folder: Path, wanted: int, device: str) -> None:
    """Fill the folder up to `wanted` class images, four at once, as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    found = len(class_images_in(folder))
    if found >= wanted:
        return
    pipeline = open_pipeline(weights, device)
    names = (path for path in (folder / f"{i}.jpg" for i in count()) if not path.exists())
    for start in range(found, wanted, CLASS_BATCH):
        for image in pipeline([CLASS_PROMPT] * min(CLASS_BATCH, wanted - start)).images:
            image.save(next(names))


def read_scene(folder: Path, class_images: Path) -> OfficialScene:
    """img.* and mask0.png, mask1.png, ... of a folder, and all images of the folder of class images."""
    (image,) = folder.glob("img.*")
    masks = [to_floats(read_mask(path)) for path in sorted(folder.glob("mask*.png"))]
    layers = torch.stack([torch.as_tensor(mask)[None] for mask in masks])
    return OfficialScene(pixels(read_image(image)), layers, class_images_in(class_images))


def train(arguments: argparse.Namespace) -> None:
    """Class images, both phases, the saved pipeline."""
    make_class_images(arguments.weights, arguments.class_data_dir, arguments.num_class_images, arguments.device)
    scene = read_scene(arguments.scene, arguments.class_data_dir)
    loop = OfficialLoop(arguments.weights, arguments.initializer_tokens, arguments.device)
    for phase, steps in ((1, arguments.phase1_train_steps), (2, arguments.phase2_train_steps)):
        loop.begin(phase)
        for step in range(steps):
            loop.step(scene, step)
    loop.save(arguments.weights, arguments.output_dir)


def sample(arguments: argparse.Namespace) -> None:
    """One image of a trained model, with the scheduler of the official inference."""
    pipeline = open_pipeline(arguments.run, arguments.device)
    pipeline.scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    pipeline(arguments.prompt, num_inference_steps=arguments.num_inference_steps).images[0].save(arguments.output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.official_loop", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help=train.__doc__)
    training.set_defaults(run_command=train)
    training.add_argument("scene", type=Path)
    for name in ("--weights", "--class_data_dir", "--output_dir"):
        training.add_argument(name, type=Path, required=True)
    training.add_argument("--initializer_tokens", nargs="+", required=True)
    for name, default in (("phase1_train_steps", 400), ("phase2_train_steps", 400), ("num_class_images", 100)):
        training.add_argument(f"--{name}", type=int, default=default)
    sampling = commands.add_parser("sample", help=sample.__doc__)
    sampling.set_defaults(run_command=sample)
    sampling.add_argument("run", type=Path)
    sampling.add_argument("--prompt", required=True)
    sampling.add_argument("--output", type=Path, required=True)
    sampling.add_argument("--num_inference_steps", type=int, default=50)
    for command in (training, sampling):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.run_command(arguments)


if __name__ == "__main__":
    main()
