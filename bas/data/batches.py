"""The batches of training: what all steps share is computed once, and each step samples from it.

The image never changes, so its VAE posterior is cached for both flips and sampled in each step. All random numbers
come from one CPU generator: a seed means the same on every device, and a resumed run needs nothing but its state.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from bas.config import TrainConfig
from bas.data.scene import LARGE_OVERLAP, Scene, overlaps, sample_subset, size_to_cover, subset_prompt
from bas.data.seg_mix import SegMix, place_named
from bas.errors import InputError
from bas.io.images import to_images
from bas.losses import resize_mask
from bas.models.bundle import Models, ModelSpec
from bas.models.text import check_handles, tokenize, word_pieces
from bas.models.vae import Posterior
from bas.presets import Phase

log = logging.getLogger(__name__)

TOGETHER = 512 * 512  # pixels of the new images of a batch that are encoded at once


@dataclass(frozen=True)
class Batch:
    """One step's tensors: B instance rows first, then P class rows. N is the number of concepts of the scene."""

    z0: Tensor  # (B+P, c, h, w) clean latents, scaled
    eps: Tensor  # (B+P, c, h, w) the noise to add
    t: Tensor  # (B+P,) timesteps
    input_ids: Tensor  # (B+P, 77) prompts
    union: Tensor  # (B, 1, h, w) union of the chosen masks on the latent grid
    masks: Tensor  # (B, N, gh, gw) the chosen handles' masks on the attention grid
    positions: Tensor  # (B, N) where the chosen handles stand in the prompt
    present: Tensor  # (B, N) 1 for a chosen handle, 0 for padding up to N

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; from pinned memory the copy does not wait."""
        pin = device.type == "cuda"
        return Batch(*((t.pin_memory() if pin else t).to(device, non_blocking=True) for t in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of them, in the order above."""
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class View:
    """The masks of an image, as it is or mirrored, on the grids of the losses. All on the CPU."""

    latent_masks: Tensor  # (N, h, w)
    attention_masks: Tensor  # (N, gh, gw)


@dataclass(frozen=True)
class EncodedView(View):
    """A view that every step may sample."""

    posterior: Posterior  # (c, h, w) each


@dataclass(frozen=True)
class NewView(View):
    """A view that a single step makes. It is encoded together with the others of its batch."""

    pixels: Tensor  # (3, H, W) in [-1, 1]


@dataclass(frozen=True)
class EncodedImage:
    """An image in both views, and the concepts that it shows."""

    views: tuple[EncodedView, EncodedView]  # as it is, mirrored
    shown: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """What one row of a batch shows, and which of its concepts the prompt names."""

    view: EncodedView | NewView
    chosen: list[int]
    place: str = ""  # where the concepts are, as the prompt says it after the handles
    whole: bool = False  # the reconstruction counts outside the masks too


@dataclass(frozen=True)
class ClassImages:
    """The class images of the prior loss and of Seg-Mix."""

    posterior: Posterior  # (M, c, h, w) each
    prompts: tuple[int, ...]  # M numbers: image i shows the class prompt prompts[i], counted in turns


@dataclass(frozen=True)
class TrainingData:
    """Everything that the steps of a run sample from."""

    images: tuple[EncodedImage, ...]  # the first shows all concepts
    handle_ids: tuple[int, ...]  # N token ids
    handles: tuple[str, ...]  # N names
    class_posterior: Posterior | None  # (M, c, h, w) each: the class images
    class_ids: Tensor | None  # (M, 77): their prompts
    scaling_factor: float  # of the VAE
    seg_mix: SegMix | None = None
    # by subset and place
    prompts: dict[tuple[tuple[int, ...], str], tuple[Tensor, list[int]]] = field(default_factory=dict, init=False)


def attention_grid(spec: ModelSpec, latent: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Return the (rows, columns) on which the attention loss reads maps: a quarter of the latent grid, or as asked.

    side: cells along the shorter side. Raises InputError when the UNet has no cross-attention outside its middle on
    that grid.
    """
    config = spec.unet
    grids = [
        grid for level, grid in enumerate(spec.grids(*latent)) if config.down_depths(level) or config.up_depths(level)
    ]
    wanted = side or -(-min(latent) // 4)
    grid = next((grid for grid in grids if min(grid) == wanted), None)
    if grid is None:
        known = " or ".join(str(min(known)) for known in grids)
        pixels = min(latent) * spec.vae.factor
        other = f"; or name another model: this one was trained at {spec.resolution} pixels, not at {pixels}"
        raise InputError(
            f"no cross-attention on {wanted} cells along the shorter side: use --attention_grid {known}"
            + (other if pixels != spec.resolution else "")
        )
    return grid


def training_grid(spec: ModelSpec, latent: tuple[int, int], config: TrainConfig) -> tuple[int, int]:
    """Return the (rows, columns) of a training's maps; if it reads none and none are asked for, the latent's own."""
    if config.attention_grid is None and not config.reads_maps:
        return latent
    return attention_grid(spec, latent, config.attention_grid)


@torch.inference_mode()
def encode_images(models: Models, images: Tensor, at_once: int = 1) -> Posterior:
    """Return the VAE posterior of images (b, 3, H, W) in [-1, 1], one at a time to save memory. -> on the CPU, float32

    at_once: images that are encoded together; small ones are so encoded faster, to other last bits.
    """
    vae = models.vae
    dtype, device = vae.post_quant_conv.weight.dtype, models.device
    with models.vae_arithmetic():
        parts = [vae.encode(some.to(device, dtype)) for some in images.split(at_once)]
    return Posterior(*(torch.cat([p[i].float().cpu() for p in parts]) for i in range(2)))


@torch.inference_mode()
def decode_means(models: Models, means: Tensor) -> list[Image.Image]:
    """Return the images of posterior means (b, c, h, w), one at a time to keep memory flat."""
    dtype = models.vae.post_quant_conv.weight.dtype
    with models.vae_arithmetic():
        parts = [models.vae.decode(mean[None].to(models.device, dtype)).float().cpu() for mean in means]
    return to_images((torch.cat(parts) / 2 + 0.5).clamp(0, 1))


def encode_image(
    models: Models, image: Tensor, masks: Tensor, shown: Iterable[int], config: TrainConfig
) -> EncodedImage:
    """Encode both views of an image. Neither the encoder nor nearest resizing commutes with flipping.

    image: (3, H, W) in [-1, 1]; masks: (N, H, W) in [0, 1]; shown: the concepts that the image shows.
    """
    views = [encode_view(models, *sides, config) for sides in ((image, masks), (image.flip(-1), masks.flip(-1)))]
    return EncodedImage((views[0], views[1]), tuple(shown))


def encode_view(models: Models, image: Tensor, masks: Tensor, config: TrainConfig) -> EncodedView:
    """Encode an image (3, H, W) in [-1, 1], and resize its masks (N, H, W) in [0, 1]."""
    posterior = encode_images(models, image[None])
    return EncodedView(*resize_masks(models, masks, config), Posterior(*(p[0] for p in posterior)))


def resize_masks(models: Models, masks: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Resize masks (N, H, W) in [0, 1]. -> on the latent grid, (N, h, w), and on that of the attention, (N, gh, gw)"""
    h, w = (side // models.vae.config.factor for side in masks.shape[-2:])
    grid = training_grid(models.spec, (h, w), config)
    return resize_mask(masks, h, w), resize_mask(masks, *grid)


def check_scene(spec: ModelSpec, scene: Scene, config: TrainConfig, warn: bool = True) -> tuple[int, int]:
    """Check a scene against a model, without its weights. -> (rows, columns) of pixels that the scene is trained at

    Raises InputError for a size, a grid, a handle, a word or a class prompt that the model cannot take, for more
    handles than fit a prompt, and for a mask that is empty on the latent grid. With `warn`, logs a warning about masks
    that are empty on the attention grid and about masks that overlap.
    """
    if len(scene) > (most := most_handles(spec)):
        raise InputError(f"{len(scene)} concepts: a prompt of this model has room for {most} handles: use fewer masks")
    side = config.resolution or spec.resolution
    spec.check_side("--resolution", side)
    image, masks = scene.tensors(side, spec.size_multiple, config.center_crop)
    check_handles(spec.tokenizer, scene.handles)
    for word in filter(None, scene.words):
        word_pieces(spec.tokenizer, word)
    if any(phase.prior for phase in config.phases):
        tokenize(spec.tokenizer, list(config.class_prompt))
    check_crop(masks, scene.image.size, dict(enumerate(scene.handles)), config)
    check_grids(spec, masks, dict(enumerate(scene.handles)), config, warn)
    for i, handle in enumerate(scene.handles if warn else ()):
        for j, share in overlaps(masks.numpy(), i).items():
            if share >= LARGE_OVERLAP:
                log.warning("%s", overlap_message(handle, scene.handles[j], share))
    height, width = image.shape[1:]
    for extra in scene.extra_images:
        names = {i: f"{scene.handles[i]} in extra image {extra.name}" for i in sorted(extra.masks)}
        layers = extra.tensors(height, width, len(scene))[1]
        check_crop(layers, extra.image.size, names, config, extra=True)
        check_grids(spec, layers, names, config, warn)
    return height, width


def overlap_message(handle: str, other: str, share: float) -> str:
    """Return the warning about a mask of which this share lies in another."""
    shared = "their handles will share what is there"
    return f"{100 * share:.0f} % of the mask of {handle} lies in the mask of {other}: {shared}"


def vanishing_message(handle: str, grid: str, h: int, w: int) -> str:
    """Return the message about a mask that is empty on a grid of h rows and w columns."""
    return f"the mask of {handle} vanishes on the {grid} of {w}x{h} cells: make it larger, or raise --resolution"


def crop_message(
    mask: Tensor, size: tuple[int, int], handle: str, config: TrainConfig, extra: bool = False
) -> str | None:
    """Return the message about a mask of which nothing is left after its image was cropped, None for another mask.

    mask: (H, W), cropped; size: (W, H) of the image before it was resized; extra: it is not the scene's first image.
    """
    height, width = mask.shape
    if mask.any() or size_to_cover(size, (width, height)) == (width, height):
        return None
    ways = [
        *(["leave out --center_crop"] if config.center_crop else []),
        "crop the image around the concept",
        *(["move its folder away"] if extra else []),
    ]
    advice = " or ".join([", ".join(ways[:-1]), ways[-1]]) if len(ways) > 1 else ways[0]
    return f"the mask of {handle} lies outside the crop of {width}x{height} pixels: {advice}"


def most_handles(spec: ModelSpec) -> int:
    """Return how many handles a training prompt can name within the tokens that the model reads."""
    one, two = (len(spec.tokenizer(subset_prompt([""] * count)).input_ids) + count for count in (1, 2))
    return 1 + (spec.tokenizer.model_max_length - one) // (two - one)


def check_crop(
    masks: Tensor, size: tuple[int, int], handles: dict[int, str], config: TrainConfig, extra: bool = False
) -> None:
    """Raise InputError, as `crop_message` says it, for a mask that the crop leaves out. masks: (N, H, W)"""
    for i, handle in handles.items():
        if message := crop_message(masks[i], size, handle, config, extra):
            raise InputError(message)


def check_grids(spec: ModelSpec, masks: Tensor, handles: dict[int, str], config: TrainConfig, warn: bool) -> None:
    """Raise InputError for a mask that is empty on the latent grid, as it is or mirrored. masks: (N, H, W)

    With `warn`, logs a warning about a mask that is empty on the attention grid. handles: names by concept.
    """
    height, width = masks.shape[-2:]
    latent = height // spec.vae.factor, width // spec.vae.factor
    grid = training_grid(spec, latent, config)
    for i, handle in handles.items():
        flips = torch.stack([masks[i], masks[i].flip(-1)])
        if (resize_mask(flips, *latent).amax(dim=(1, 2)) == 0).any():
            raise InputError(vanishing_message(handle, "loss grid", *latent))
        if warn and config.lambda_attention and (resize_mask(flips, *grid).amax(dim=(1, 2)) == 0).any():
            log.warning("%s", vanishing_message(handle, "attention grid", *grid))


def prepare(
    models: Models,
    scene: Scene,
    image: Tensor,
    masks: Tensor,
    config: TrainConfig,
    class_images: ClassImages | None,
) -> TrainingData:
    """Encode and tokenize what all steps share.

    image: (3, H, W) in [-1, 1]; masks: (N, H, W)
    """
    class_ids = None
    if class_images:
        prompts = tokenize(models.tokenizer, list(config.class_prompt))
        class_ids = prompts[torch.tensor(class_images.prompts) % len(prompts)]
    encoded = [encode_image(models, image, masks, range(len(scene)), config)]
    height, width = image.shape[1:]
    for extra in scene.extra_images:
        pixels, layers = extra.tensors(height, width, len(scene))
        encoded.append(encode_image(models, pixels, layers, sorted(extra.masks), config))
    return TrainingData(
        images=tuple(encoded),
        handle_ids=tuple(cast("list[int]", models.tokenizer.convert_tokens_to_ids(list(scene.handles)))),
        handles=scene.handles,
        class_posterior=class_images.posterior if class_images else None,
        class_ids=class_ids,
        scaling_factor=models.vae.config.scaling_factor,
        seg_mix=prepare_seg_mix(models, scene, image, config, class_images) if config.seg_mix_probability else None,
    )


def prepare_seg_mix(
    models: Models, scene: Scene, image: Tensor, config: TrainConfig, class_images: ClassImages | None
) -> SegMix | None:
    """Cut out the concepts, and decode the class images whose prompts name a place. None: no concept can move.

    image: (3, H, W), the scene's. On a class image the prompt of the concepts names the same place. There the
    reconstruction outside the masks counts too, so the concepts' outlines are learnt.
    """
    places = [place_named(prompt) for prompt in config.class_prompt]
    backgrounds: list[tuple[Image.Image, str]] = []
    if class_images is not None:
        shown = [places[i % len(places)] for i in class_images.prompts]
        named = [i for i, place in enumerate(shown) if place]
        decoded = decode_means(models, class_images.posterior.mean[named]) if named else []
        backgrounds = [(image, shown[i]) for i, image in zip(named, decoded, strict=True)]
    size, cell = (image.shape[2], image.shape[1]), models.size_multiple if config.seg_mix_cells else 0
    seg_mix = SegMix(scene, size, backgrounds, config.seg_mix_move, config.subset_sampling, cell)
    return seg_mix if seg_mix.movable else None


def handle_positions(ids: Tensor, handle_ids: list[int]) -> list[int]:
    """Return the positions of these handles in one prompt. ids: (77,). InputError unless each stands there once."""
    places = []
    for handle_id in handle_ids:
        found = (ids == handle_id).nonzero().flatten().tolist()
        if len(found) != 1:
            raise InputError(f"a training prompt holds a handle {len(found)} times: each must stand there once")
        places += found
    return places


def sample_example(data: TrainingData, models: Models, config: TrainConfig, generator: torch.Generator) -> Example:
    """Sample an image, all equally likely, then a subset of the concepts that it shows, then whether it is mirrored.

    A single image takes no random number. With `seg_mix_probability` it may be an image of Seg-Mix instead. That
    probability is multiplied by the share of concepts that can be cut out: only the images show the others.
    """
    if data.seg_mix and torch.rand((), generator=generator) < config.seg_mix_probability * data.seg_mix.share:
        example = sample_mixed(data.seg_mix, data, models, config, generator)
        if example.chosen:
            return example
    image = data.images[int(torch.randint(len(data.images), (), generator=generator)) if len(data.images) > 1 else 0]
    subset = sample_subset(len(image.shown), config.subset_sampling, generator)
    view = image.views[int(torch.rand((), generator=generator) < config.flip_probability)]
    return Example(view, [image.shown[i] for i in subset])


def sample_mixed(
    seg_mix: SegMix, data: TrainingData, models: Models, config: TrainConfig, generator: torch.Generator
) -> Example:
    """Make an image of Seg-Mix.

    On a class image the prompt names all that it shows, as the whole of it is reconstructed. A concept that vanishes on
    the latent grid is not named.
    """
    extra, place = seg_mix.sample(generator)
    pixels, layers = extra.tensors(seg_mix.size[1], seg_mix.size[0], len(data.handles))
    if torch.rand((), generator=generator) < config.flip_probability:
        pixels, layers = pixels.flip(-1), layers.flip(-1)
    view = NewView(*resize_masks(models, layers, config), pixels)
    shown = [i for i in sorted(extra.masks) if view.latent_masks[i].any()]
    return Example(view, shown, place, whole=bool(place))


def posteriors_of(models: Models, views: Iterable[EncodedView | NewView]) -> list[Posterior]:
    """Return the posterior of each view, (c, h, w) each. New ones are encoded, together up to TOGETHER pixels."""
    views, encoded = list(views), iter(())
    if new := [view.pixels for view in views if isinstance(view, NewView)]:
        at_once = max(1, TOGETHER // new[0][0].numel())
        encoded = iter(zip(*encode_images(models, torch.stack(new), at_once), strict=True))
    return [view.posterior if isinstance(view, EncodedView) else Posterior(*next(encoded)) for view in views]


def subset_tokens(data: TrainingData, models: Models, chosen: list[int], place: str = "") -> tuple[Tensor, list[int]]:
    """Return the prompt of these concepts in this place, (77,) ids, and the places of their handles, from a cache."""
    key = tuple(chosen), place
    if key not in data.prompts:
        ids = tokenize(models.tokenizer, [f"{subset_prompt([data.handles[i] for i in chosen])} {place}".strip()])[0]
        data.prompts[key] = ids, handle_positions(ids, [data.handle_ids[i] for i in chosen])
    return data.prompts[key]


def sample_batch(
    data: TrainingData, models: Models, phase: Phase, config: TrainConfig, generator: torch.Generator
) -> Batch:
    """Sample one batch (paper, section 3): for each row a subset, a flip, a latent, a timestep and noise."""
    count = len(data.handles)
    means, deviations, ids, unions, masks, positions, present = [], [], [], [], [], [], []
    examples = [sample_example(data, models, config, generator) for _ in range(config.train_batch_size)]
    for example, posterior in zip(examples, posteriors_of(models, [e.view for e in examples]), strict=True):
        view, chosen = example.view, example.chosen
        means.append(posterior.mean)
        deviations.append(posterior.deviation)
        row, places = subset_tokens(data, models, chosen, example.place)
        ids.append(row)
        unions.append(view.latent_masks[chosen].amax(dim=0, keepdim=True).clamp(min=float(example.whole)))
        padded = chosen + [i for i in range(count) if i not in chosen]
        masks.append(view.attention_masks[padded])
        positions.append(torch.tensor(places + [0] * (count - len(chosen))))
        present.append(torch.tensor([1.0] * len(chosen) + [0.0] * (count - len(chosen))))
    if phase.prior and data.class_posterior is not None and data.class_ids is not None:
        index = torch.randint(len(data.class_ids), (config.train_batch_size,), generator=generator)
        posterior = Posterior(*(part[index] for part in data.class_posterior))
        means += posterior.mean
        deviations += posterior.deviation
        ids += data.class_ids[index]
    mean, deviation = torch.stack(means), torch.stack(deviations)
    return Batch(
        z0=(mean + deviation * torch.randn(mean.shape, generator=generator)) * data.scaling_factor,
        eps=torch.randn(mean.shape, generator=generator),
        t=torch.randint(models.schedule.num_train_timesteps, (len(mean),), generator=generator),
        input_ids=torch.stack(ids),
        union=torch.stack(unions),
        masks=torch.stack(masks),
        positions=torch.stack(positions),
        present=torch.stack(present),
    )
