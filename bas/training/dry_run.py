"""`bas train --dry_run`: what a training would do and take, without reading weights or writing anything.

One step of each phase runs on the meta device, where tensors have shapes but no values. That counts exactly which
parameters are trained, what a step keeps for its backward pass, and its floating-point operations (2 per multiply-add).
"""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bas.config import SampleConfig, TrainConfig
from bas.data.batches import EncodedImage, EncodedView, TrainingData, resize_masks, sample_batch
from bas.data.scene import Scene
from bas.errors import InputError
from bas.io.files import human_size
from bas.models.adapters import add_adapters
from bas.models.bundle import Models
from bas.models.text import add_handles, context_width, tokenize
from bas.models.vae import Posterior
from bas.presets import KINDS, Phase
from bas.pretrained.additions import Additions
from bas.pretrained.folder import build_networks, build_on_meta
from bas.pretrained.hub import find_spec, is_known_elsewhere
from bas.pretrained.loading import check_keys
from bas.runtime.device import DTYPES
from bas.runtime.progress import clock
from bas.training.checkpoints import find_checkpoint, newest_kept
from bas.training.class_images import count_missing
from bas.training.disk_space import WHILE_TRAINING, count_numbers, files_to_come, free_disk_space
from bas.training.loop import training_step
from bas.training.nonfinite import ANEW
from bas.training.optimizer import ADAM_BYTES
from bas.training.phase_state import trainable_parameters
from bas.training.run_folder import check_output_folder
from bas.training.setup import check_extras, check_input

CHECKED_WITHOUT_BASE = "scene, masks, handles, words, sizes, device, run folder"
CHECKED = f"{CHECKED_WITHOUT_BASE}; every weight's name and shape (no values)"
MEMORY_RULE = (
    "counting weights, master weights, gradients, optimizer and what a step keeps for its backward pass (at half "
    "size in fp16); on a GPU, the VAE counts only if Seg-Mix encodes images in each step; the allocator, work space of "
    "kernels and recomputed blocks are not counted"
)
TIME_RULE = (
    "a lower bound: all operations at {speed:.2g} TFLOP/s, the speed of a plain matrix product on this machine while "
    "it does nothing else; a step also waits for memory and takes longer; class images in the cache take no time"
)

TOO_LITTLE = "NOT ENOUGH"  # first words of the entry `disk` where space is missing


@dataclass(frozen=True)
class Cost:
    """What one phase takes."""

    trained: int  # parameters that are trained, counted one number at a time
    kept: int  # bytes that a step keeps for its backward pass, in the precision of the weights
    operations: int  # of one optimizer step; 0 where they were not counted


@dataclass(frozen=True)
class Plan:
    """A run laid out on the meta device: shapes without values."""

    models: Models
    image: Tensor
    data: TrainingData
    numbers: dict[str, int]  # weights by network
    costs: dict[Phase, Cost]
    memory: dict[Phase, dict[str, int]]  # bytes by what they are for

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(sum(parts.values()) for parts in self.memory.values())


def dry_run(config: TrainConfig, runs: int = 1) -> dict:
    """Return what a run would do and take, by name. Raises InputError where `train` would before it reads weights.

    A full disk and a missing extra are no errors here but entries, and the settings of a checkpoint are not compared.
    runs: how many such runs, one after another, the disk has to hold.
    """
    scene, base, device, precision = check_input(config, weights=False)
    check_output_folder(Path(config.output_dir), resuming=config.resume_from_checkpoint is not None)
    find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)
    plan = plan_run(config, scene, base, precision, device)
    speed = matrix_speed(device, DTYPES[precision])
    files, free = files_to_come(plan.numbers, config), free_disk_space(Path(config.output_dir))
    passing = files.get(WHILE_TRAINING, 0)
    needed = passing + runs * (sum(files.values()) - passing)
    verdict = "enough" if free >= needed else TOO_LITTLE
    seconds = {phase.name: phase.steps * cost.operations / speed for phase, cost in plan.costs.items()}
    if any(phase.prior for phase in config.phases):
        seconds = {
            "class images": class_image_operations(plan.models, plan.data, config) / speed,
            **seconds,
        }
    return {
        "scene": f"{config.instance_data_dir}, trained at {plan.image.shape[2]}x{plan.image.shape[1]} pixels",
        "handles": ", ".join(f"{h} from {w!r}" if w else h for h, w in zip(scene.handles, scene.words, strict=True)),
        "base": f"{base}, {plan.models.schedule.prediction_type}{_not_here(config)}",
        "device": f"{device}, mixed precision {precision}",
        "missing": _missing_extra(config),
        "steps": {
            p.name: f"{p.steps}, training {c.trained:,} parameters ({', '.join(p.trains)})"
            for p, c in plan.costs.items()
        },
        "memory": {phase.name: sum_of(parts) for phase, parts in plan.memory.items()},
        "estimated by": MEMORY_RULE,
        "warning": memory_warning(plan.peak, device, replace(config, mixed_precision=precision)),
        "time": {name: f"at least {clock(value)}" for name, value in seconds.items()},
        "counted by": TIME_RULE.format(speed=speed / 1e12),
        "files": {name: human_size(size) for name, size in files.items()},
        "disk": f"{verdict}: {human_size(needed)} of {human_size(free)} free",
        "checked": CHECKED if base.exists() else CHECKED_WITHOUT_BASE,
    }


def _not_here(config: TrainConfig) -> str:
    """Return a remark behind the base that is described without its files."""
    name = config.pretrained_model_name_or_path
    return f"; not here yet: bas download {name}" if is_known_elsewhere(name) else ""


def _missing_extra(config: TrainConfig) -> str | None:
    """Return what to install before the run itself, or None."""
    try:
        check_extras(config)
    except InputError as error:
        return str(error)
    return None


def plan_run(
    config: TrainConfig, scene: Scene, base: Path, precision: str, device: torch.device, count_operations: bool = True
) -> Plan:
    """Lay out the run of this scene on this base on the meta device, and count the cost of each phase.

    Memory alone takes a third of the time.
    """
    if is_known_elsewhere(config.pretrained_model_name_or_path):
        models = build_networks(find_spec(config.pretrained_model_name_or_path, config.prediction_type))
    else:
        models, tensors = build_on_meta(base, config.prediction_type, Additions.of_base(vars(config)))
        for component, network in models.networks.items():
            check_keys(network, tensors[component], f"{base} ({component})")
    models.unet.set_gradient_checkpointing(config.gradient_checkpointing)
    image, masks = scene.tensors(config.resolution or models.resolution, models.size_multiple, config.center_crop)
    add_adapters(models, config, len(scene.handles))
    numbers = count_numbers(models)
    add_handles(models.text_encoders, models.tokenizer, scene.handles, scene.words, config.seed)
    data = blank_data(models, scene, masks, config)
    if precision == "bf16":  # as `cast_weights` does
        for network in (models.unet, *models.text_encoders):
            network.bfloat16()
    costs = {phase: phase_cost(models, data, phase, config, count_operations) for phase in config.phases}
    weights = sum(p.nbytes for network in (models.unet, *models.text_encoders) for p in network.parameters())
    if device.type == "cpu" or config.seg_mix_probability:
        weights += sum(p.nbytes for p in models.vae.parameters())  # elsewhere it is moved off the device
    copied = sum(numbers[name] for name in ("unet", "text_encoder", "embedding"))
    memory = {phase: phase_memory(weights, cost, precision, config, copied) for phase, cost in costs.items()}
    return Plan(models, image, data, numbers, costs, memory)


SAVINGS = (  # what to try when memory runs out, the least harm to the result first
    ("--gradient_checkpointing", {"gradient_checkpointing": True}),
    ("--mixed_precision bf16", {"mixed_precision": "bf16"}),
    ("--optimizer adamw8bit", {"optimizer": "adamw8bit"}),
    ("--no_train_text_encoder", {"train_text_encoder": False}),
    ("--train cross_attention", {"train": "cross_attention"}),
    ("--train lora", {"train": "lora"}),
    ("--phase2_train_steps 0, handles alone", {"phase2_train_steps": 0}),
)
RESUMABLE = ("--gradient_checkpointing",)  # with these the run can be resumed; the others need a new one


OF_PHASES = {"train", "train_text_encoder", "phase2_train_steps"}  # settings that say what is trained


def savings(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return what each flag of SAVINGS makes of a run's settings, without flags that are refused or save nothing.

    Those are flags that leave no phase, that train the same, and kinds of training that take more.
    """
    found, kinds = {}, [*KINDS]
    for flag, changes in SAVINGS:
        changed = replace(config, **changes)
        before, after = ({phase.trains for phase in each.phases} for each in (config, changed))
        smaller = "train" not in changes or kinds.index(changed.train) > kinds.index(config.train)
        if changed != config and (changes.keys().isdisjoint(OF_PHASES) or (after and after != before and smaller)):
            found[flag] = changed
    return found


def memory_advice(config: TrainConfig, used: int | None) -> str:
    """Return one line for a run that ran out of memory: what it takes at least, and what each unused flag would save.

    used: the most bytes that it held, if known.
    """
    scene, base, device, precision = check_input(config)

    def peak(changed: TrainConfig) -> int:
        precise = precision if changed.mixed_precision == config.mixed_precision else changed.mixed_precision
        return plan_run(changed, scene, base, precise, device, count_operations=False).peak

    needed = peak(config)
    saved = {flag: needed - peak(changed) for flag, changed in savings(config).items()}
    options = {flag: f"{flag} (about {human_size(size)} less)" for flag, size in saved.items() if size > 0.01 * needed}
    resumed = [options.pop(flag) + ", --resume_from_checkpoint latest" for flag in RESUMABLE if flag in options]
    anew = f"{ANEW} {', '.join(options.values()) or 'a smaller --resolution'}"
    seen = f", {human_size(used)} of it used at most" if used else ""
    return (
        f"{device} is out of memory: the run takes at least {human_size(needed)}{seen}; "
        f"{newest_kept(Path(config.output_dir))}; try, in this order: {'; '.join([*resumed, anew])}"
    )


def blank_data(models: Models, scene: Scene, masks: Tensor, config: TrainConfig) -> TrainingData:
    """Training data of the right shapes without encoding: latents of zeros, the real masks and prompts."""
    factor, channels = models.vae.config.factor, models.vae.config.latent_channels
    h, w = (side // factor for side in masks.shape[-2:])
    empty = Posterior(torch.zeros(channels, h, w), torch.zeros(channels, h, w))
    view = EncodedView(*resize_masks(models, masks, config), empty)
    return TrainingData(
        images=(EncodedImage((view, view), tuple(range(len(scene.handles)))),),
        handle_ids=tuple(cast("list[int]", models.tokenizer.convert_tokens_to_ids(list(scene.handles)))),
        handles=scene.handles,
        class_posterior=Posterior(empty.mean[None], empty.logvar[None]),
        class_ids=tokenize(models.tokenizer, list(config.class_prompt[:1])),
        scaling_factor=models.vae.config.scaling_factor,
    )


def phase_cost(
    models: Models, data: TrainingData, phase: Phase, config: TrainConfig, count_operations: bool = True
) -> Cost:
    """Count one step on the meta device; what it keeps is known after its forward pass."""
    trained = trainable_parameters(models, phase)
    weights = {p.untyped_storage()._cdata for network in models.networks.values() for p in network.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        # Attention is spelt out on the meta device; the fused kernels of a real one keep no query x key matrix.
        if tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] > side:
            return tensor
        kept[tensor.untyped_storage()._cdata] = tensor  # holding it, so that no other takes its address
        return tensor

    batch = sample_batch(data, models, phase, config, torch.Generator().manual_seed(config.seed))
    side = max(batch.z0.shape[-2:])
    with FlopCounterMode(display=False) if count_operations else nullcontext() as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = training_step(models, batch.to(torch.device("meta")), config)
        if counter:
            loss.backward()
    bytes_kept = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    operations = counter.get_total_flops() * config.gradient_accumulation_steps if counter else 0
    return Cost(sum(p.numel() for p in trained.values()), bytes_kept, operations)


def phase_memory(weights: int, cost: Cost, precision: str, config: TrainConfig, copied: int) -> dict[str, int]:
    """Count bytes by their use. copied: how many weights autocast rounds, and keeps until the backward pass."""
    masters = {"master weights": 4 * cost.trained} if precision == "bf16" else {}
    copies = {"fp16 copies": 2 * copied} if precision == "fp16" and not config.gradient_checkpointing else {}
    adding = precision == "bf16" and config.gradient_accumulation_steps > 1  # one pass's own beside the masters' sum
    return {
        "weights": weights,
        **masters,
        **copies,
        "gradients": (6 if adding else 4) * cost.trained,
        "optimizer": ADAM_BYTES[config.optimizer] * cost.trained,
        "kept for backward": cost.kept // 2 if precision == "fp16" else cost.kept,
    }


def sum_of(parts: dict[str, int]) -> str:
    """Format sizes and their sum: 3.2 GB = 1.1 GB weights + ..."""
    summands = " + ".join(f"{human_size(size)} {name}" for name, size in parts.items())
    return f"{human_size(sum(parts.values()))} = {summands}"


def memory_warning(needed: int, device: torch.device, config: TrainConfig) -> str | None:
    """Return one line of advice where the device has less memory than the estimate, else None."""
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return None
    advice = f"try, in this order: {', '.join(savings(config)) or 'a smaller --resolution'}"
    return f"{device} has {human_size(held)}, less than the estimate: {advice}" if held < needed else None


def class_image_operations(models: Models, data: TrainingData, config: TrainConfig) -> int:
    """Count the operations of generating the class images that are missing: denoising, without the VAE."""
    passes = 2 if models.guidance_scale > 1 else 1  # with the prompt, and for the guidance without it
    images = count_missing(config)
    return passes * SampleConfig().num_inference_steps * images * unet_operations(models, data)


def unet_operations(models: Models, data: TrainingData) -> int:
    """Count the operations of the UNet's forward pass for one image of this size."""
    z = data.images[0].views[0].posterior.mean[None].to("meta", models.unet.conv_in.weight.dtype)
    tokens, width = models.tokenizer.model_max_length, context_width(models.text_encoders)
    context = torch.empty(1, tokens, width, dtype=z.dtype, device="meta")
    pooled = torch.empty(1, models.unet.config.pooled_dim, dtype=z.dtype, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.unet(z, torch.zeros(1, dtype=torch.long, device="meta"), context, pooled=pooled)
    return counter.get_total_flops()


def matrix_speed(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of a matrix product, as on an idle machine.

    On a CPU the time of one thread is counted, which other programs do not lengthen, and multiplied by the number of
    threads. A GPU reaches its speed in large products only, and with several of them between two waits; there the
    fastest of the rounds counts.
    """
    side, at_once = (8192, 8) if device.type == "cuda" else (512, 4)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    threads = torch.get_num_threads()
    a = torch.randn(side, side, device=device).to(dtype)
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(rounds + 1):  # the first one warms up
            began = clock()
            product = a
            for _ in range(at_once):
                product = a @ a
            product.sum().item()  # waits for the device
            seconds.append(clock() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * side**3 * at_once * (1 if device.type == "cuda" else threads) / max(min(seconds[1:]), 1e-9)
