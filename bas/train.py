"""The two-phase training of Break-A-Scene (paper, section 3), read top to bottom.

Phase 1 trains the new handles alone; phase 2 trains the UNet and the text encoder as well. Both run through the same
loop and the same `training_step`: a phase is a row of data (`TrainConfig.phases`).
"""

import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bas import __version__
from bas.base import Base
from bas.batches import Batch, Material, check_scene, draw_batch, prepare
from bas.capture import CapturedStep
from bas.checkpoint import glance, load, save_model, weights_hash
from bas.class_images import check_class_folder
from bas.compilation import choose_compilation, compile_unet
from bas.config import InputError, Phase, RunError, TrainConfig
from bas.config_file import CONFIG, to_toml
from bas.files import write_json, write_text
from bas.hub import find
from bas.interrupts import Interrupted, Interrupts
from bas.losses import ATTENTION_LOSSES, average_maps, masked_mse
from bas.machine import DTYPES, autocast, deterministic, pick_device, pick_precision
from bas.masters import Exact, Masters, lower, restore
from bas.methods import read_scene
from bas.models.text import add_handles, encode_ids
from bas.models.unet import UNet
from bas.optimizer import adamw8bit, build_optimizer, set_rate
from bas.parts import Models, cross_attention, keys_and_values
from bas.preview import write_preview, write_scene
from bas.progress import Progress
from bas.resuming import check_resumable, facts_of
from bas.room import require_room
from bas.run_folder import (
    CHECKPOINTS,
    METRICS,
    SETTINGS,
    MetricsLog,
    drop_later,
    find_checkpoint,
    load_checkpoint,
    locked,
    optimizer_tensors,
    prepare_folder,
    read_rows,
    restore_optimizer,
    save_checkpoint,
    save_concepts,
    what_is_kept,
)
from bas.scene import Scene
from bas.schedulers import add_noise, sampling_timesteps, training_target
from bas.tensorboard import EventLog, writer_class
from bas.times import Times

log = logging.getLogger(__name__)

ANEW = "begin anew, in another --output_dir, with"  # for what a checkpoint cannot make good
OVERFLOWS = 25  # steps in a row that fp16 may leave out; by then its loss scale has fallen by 2 ** 25
POLYNOMIAL_END = 1e-7  # the learning rate at which the polynomial course ends, in diffusers too


# --- One step -----------------------------------------------------------------------------------------------------


def training_step(models: Models, batch: Batch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch (paper, section 3), and its unweighted parts as 0-dim tensors.

    L = L_rec (eq. 1) + prior_loss_weight x L_prior + lambda_attention x L_attn (eq. 2)
    """
    instances = len(batch.union)
    context = encode_ids(models.text_encoder, batch.input_ids)
    z_t = add_noise(models.schedule, batch.z0, batch.eps, batch.t)
    target = training_target(models.schedule, batch.z0, batch.eps, batch.t)
    grid = tuple(batch.masks.shape[-2:]) if config.lambda_attention else False
    prediction, maps = models.unet(z_t, batch.t, context, return_maps=grid)

    mask = batch.union if config.apply_masked_loss else torch.ones_like(batch.union)
    loss = masked_mse(prediction[:instances], target[:instances], mask, config.normalize_masked_loss)
    parts = {"reconstruction": loss}
    if len(prediction) > instances:
        parts["prior"] = F.mse_loss(prediction[instances:].float(), target[instances:].float())
        loss = loss + config.prior_loss_weight * parts["prior"]
    if config.lambda_attention:
        average = average_maps([m._replace(probs=m.probs[:instances]) for m in maps])
        attention_loss = ATTENTION_LOSSES[config.attention_loss]
        parts["attention"] = attention_loss(average, batch.positions, batch.masks, batch.present)
        loss = loss + config.lambda_attention * parts["attention"]
    return loss, parts


def trainable_parameters(models: Models, phase: Phase) -> dict[str, nn.Parameter]:
    """Freeze everything but what this phase trains, and return that by name, in a fixed order."""
    embedding, text = models.text_encoder.get_input_embeddings(), models.text_encoder.named_parameters()
    groups = {
        "handles": {"handles": embedding.handles},
        "embedding": {"embedding": embedding.weight},
        "unet": {f"unet.{name}": p for name, p in models.unet.named_parameters()},
        "cross_attention": {f"unet.{name}": p for name, p in cross_attention(models.unet).items()},
        "cross_attention_kv": {f"unet.{name}": p for name, p in keys_and_values(models.unet).items()},
        "text_encoder": {f"text_encoder.{name}": p for name, p in text if "token_embedding" not in name},
    }
    for module in (models.unet, models.vae, models.text_encoder):
        module.requires_grad_(False)
    trained = {name: p for group in phase.trains for name, p in groups[group].items()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def optimizer_step(
    models: Models,
    batches: Iterable[Batch],
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clipped: Masters,
    precision: str,
) -> dict[str, Tensor]:
    """Accumulate the gradient of the batches, clip it, step. -> the losses' means and the norm before clipping

    `clipped` holds what gets a gradient: all that the optimizer steps, and in exact phase 1 the embedding as well.
    """
    share, sums = 1 / config.gradient_accumulation_steps, {}
    for batch in batches:
        with autocast(models.device, "fp16" if precision == "fp16" else "no"):  # bf16 weights are bf16 already
            loss, parts = training_step(models, batch, config)
        scaler.scale(loss * share).backward()
        clipped.gather()
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0) + value.detach() * share
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(clipped.parameters, config.max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    clipped.publish()
    clipped.release()
    return {**sums, "grad_norm": norm}


def learning_rate(config: TrainConfig, phase: Phase, step: int) -> float:
    """The learning rate at this step of a phase, counted from 0. The courses are those of diffusers' get_scheduler."""
    warmup, kind = config.lr_warmup_steps, config.lr_scheduler
    if kind != "constant" and step < warmup:
        return phase.lr * step / warmup
    done = (step - warmup) / max(1, phase.steps - warmup)
    if kind == "linear":
        return phase.lr * (1 - done)
    if kind == "polynomial":
        return (phase.lr - POLYNOMIAL_END) * (1 - done) ** config.lr_power + POLYNOMIAL_END
    if kind.startswith("cosine"):
        cycles = config.lr_num_cycles if kind == "cosine_with_restarts" else 1
        return phase.lr * 0.5 * (1 + math.cos(math.pi * (cycles * done % 1.0)))
    return phase.lr


# --- The run ------------------------------------------------------------------------------------------------------


def train(config: TrainConfig, base: Base | None = None) -> Path:
    """Learn the concepts of one scene and write the run folder; returns its path.

    `base` is the base model where it is in memory already. Raises InputError for anything wrong with the input, before
    weights are read; RunError when a number stops being finite, memory or disk run out; Interrupted after a signal,
    once all is saved.
    """
    with trained(config, base) as run:
        finish(run)
    return run.folder


@contextmanager
def trained(config: TrainConfig, base: Base | None = None) -> Iterator["Run"]:
    """Both phases of one scene. Within the block the run's models are the tuned ones, and its folder is held.

    A signal that comes while the block runs is noted in `run.interrupts`. Raises as `train` does.
    """
    times, checked = Times(), check_input(config)
    with locked(Path(config.output_dir)), deterministic(config.deterministic):
        run = start(config, *checked, base)
        times.note("preparation", run.folder, run.models.device)
        try:
            with Interrupts() as run.interrupts:
                begin = 0
                for phase in config.phases:
                    try:
                        train_phase(run, phase, begin)
                    except Interrupted:
                        times.note(phase.name, run.folder, run.models.device)  # as far as it came
                        raise
                    times.note(phase.name, run.folder, run.models.device)
                    begin += phase.steps
                yield run
                times.note("saving", run.folder, run.models.device)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"writing to {run.folder} failed: {reason}; {what_is_kept(run.folder)}: "
                "make room, then --resume_from_checkpoint latest"
            ) from error


@dataclass
class Run:
    """What a run holds from its start to its end."""

    config: TrainConfig
    folder: Path
    scene: Scene
    models: Models
    precision: str  # "no", "fp16" or "bf16"
    image: Tensor  # (3, H, W) in [-1, 1]
    masks: Tensor  # (N, H, W) in [0, 1]
    material: Material
    facts: dict  # settings, scene, hash of the base, version: what a resumed run must share
    generator: torch.Generator  # the source of every random draw of the steps
    metrics: MetricsLog
    done: int = 0  # steps that a checkpoint brings along
    saved: dict[str, Tensor] = field(default_factory=dict)  # its tensors
    scaler_state: dict = field(default_factory=dict)  # and its loss scale
    exact: Exact = field(default_factory=dict)  # float32 values of the weights that compute at 16 bits
    events: EventLog | None = None  # for TensorBoard, when asked for
    interrupts: Interrupts = field(default_factory=Interrupts)
    overflows: int = 0  # steps in a row that fp16 left out


def check_machine(config: TrainConfig) -> tuple[Path, torch.device, str]:
    """Base, device and precision: what is wrong with them, and with settings that no scene can make good."""
    if not config.phases:
        raise InputError("both phases have 0 steps: there is nothing to train")
    base, device = find(config.pretrained_model_name_or_path), pick_device(config.device)
    precision = pick_precision(config.mixed_precision, device, glance(base).unet)
    if config.exact_phase1 and precision == "fp16":
        raise InputError("--exact_phase1 clips by gradients that fp16 scales: use --mixed_precision no or bf16")
    if config.cuda_graphs and (device.type != "cuda" or precision == "fp16" or config.optimizer == "adamw8bit"):
        raise InputError("--cuda_graphs needs a CUDA device, --mixed_precision no or bf16, --optimizer adamw or adam")
    if config.fused_kernels and (device.type != "cuda" or config.compile != "no" or not find_spec("triton")):
        raise InputError("--fused_kernels needs a CUDA device, the package triton, and --compile no")
    if config.optimizer == "adamw8bit":
        adamw8bit()
    if config.report_to == "tensorboard":
        writer_class()
    return base, device, precision


def check_input(config: TrainConfig) -> tuple[Scene, Path, torch.device, str]:
    """Scene, base, device and precision of a run. What is wrong with them is found here, before weights are read."""
    scene = read_scene(config)
    base, device, precision = check_machine(config)
    models = glance(base)
    size = check_scene(models, scene, config)
    if any(phase.prior for phase in config.phases):
        check_class_folder(replace(config, mixed_precision=precision), models.schedule, size)
    if config.img_log_steps:
        sampling_timesteps(models.schedule, config.preview_inference_steps)
    return scene, base, device, precision


def start(
    config: TrainConfig, scene: Scene, path: Path, device: torch.device, precision: str, base: Base | None = None
) -> Run:
    """Load the base unless it is in memory, and compute what all steps share. The rest is what `check_input` found."""
    folder = Path(config.output_dir)
    prepare_folder(folder, resuming=config.resume_from_checkpoint is not None)
    checkpoint = find_checkpoint(folder, config.resume_from_checkpoint)
    require_room(folder, path, config)
    facts = {
        "config": asdict(config),
        **facts_of(scene),
        "base": base.hash if base else weights_hash(path),
        "precision": precision,
        "version": __version__,
    }
    saved, note = load_checkpoint(checkpoint) if checkpoint else ({}, {})
    if checkpoint:
        check_resumable(checkpoint, facts, note["facts"])

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if base is None:
        tell_of_miniature(config)
        base = Base(path, load(path, device=device))
    models = teach_names(base, scene, config)
    image, masks = scene.tensors(models.resolution, models.size_multiple, config.center_crop)
    exact = lower((models.unet, models.text_encoder), DTYPES[precision]) if precision == "bf16" else {}
    class_posterior, facts["schedule"], facts["class_images"] = None, models.schedule.to_json(), None
    if any(phase.prior for phase in config.phases):
        settings = replace(config, mixed_precision=precision)
        with (
            autocast(device, precision),
            torch.compiler.set_stance("force_eager"),
        ):  # an earlier scene may have compiled
            class_posterior, facts["class_images"] = base.class_images(settings, tuple(image.shape[-2:]))
    if checkpoint:
        check_resumable(checkpoint, facts, note["facts"])
    write_json(folder / SETTINGS, facts)
    write_text(folder / CONFIG, to_toml(asdict(config)))
    write_scene(folder, scene, image, masks)
    material = prepare(models, scene, image, masks, config, class_posterior)
    speed_up(models.unet, config, device)

    generator = torch.Generator().manual_seed(config.seed)
    if checkpoint:
        generator.set_state(saved["generator"])
        drop_later(folder, note["step"])
    done = note.get("step", 0)
    return Run(
        config=config,
        folder=folder,
        scene=scene,
        models=models,
        precision=precision,
        image=image,
        masks=masks,
        material=material,
        facts=facts,
        generator=generator,
        metrics=MetricsLog(folder / METRICS, note.get("metrics", 0)),
        done=done,
        saved=saved,
        scaler_state=note.get("scaler", {}),
        exact=exact,
        events=EventLog(folder, done) if config.report_to == "tensorboard" else None,
    )


def teach_names(base: Base, scene: Scene, config: TrainConfig) -> Models:
    """Fresh models of the base that have the scene's handles and draw at the size that they are trained at."""
    models = base.fresh()
    models.unet.set_gradient_checkpointing(config.gradient_checkpointing)
    if config.resolution:
        latent_side = config.resolution // models.vae.config.factor
        models.unet.config = replace(models.unet.config, sample_size=latent_side)
    add_handles(models.text_encoder, models.tokenizer, scene.handles, scene.words, config.seed)
    models.handles = scene.handles
    return models


def speed_up(unet: UNet, config: TrainConfig, device: torch.device) -> None:
    """Compile the UNet or give it fused kernels, as the settings ask."""
    compilation, reason = choose_compilation(config.compile, sum(phase.steps for phase in config.phases), device)
    if config.compile == "auto":
        log.info("compile auto: %s, %s", compilation, reason)
    compile_unet(unet, compilation)
    if config.fused_kernels:
        from bas.kernels import install  # imports triton, which not every machine has

        install(unet)


def tell_of_miniature(config: TrainConfig) -> None:
    """Say so where no base is named: nobody shall wait for a photograph's concepts in vain."""
    if config.pretrained_model_name_or_path is None:
        log.info(
            "the base is the miniature that ships, which knows no photographs; its bas.json sets what no flag does"
        )


def train_phase(run: Run, phase: Phase, begin: int) -> None:
    """Train one phase, which begins after `begin` steps of the run, from wherever the run stands."""
    config, models, end = run.config, run.models, begin + phase.steps
    weights = trainable_parameters(models, phase)
    watched = dict(weights)
    if phase.trains == ("handles",) and config.exact_phase1:
        watched["embedding"] = models.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    clipped = Masters(watched, run.exact)
    trained = {name: clipped.named[name] for name in weights}
    optimizer = build_optimizer(trained.values(), config)
    scaler = torch.amp.GradScaler(models.device.type, enabled=run.precision == "fp16")
    if run.done > begin:
        restore_parameters(trained, run.saved)
        clipped.publish()
    if begin < run.done < end:
        restore_optimizer(optimizer, run.saved)
        scaler.load_state_dict(run.scaler_state)

    def take_step(batches: Iterable[Batch]) -> dict[str, Tensor]:
        return optimizer_step(models, batches, config, optimizer, scaler, clipped, run.precision)

    if config.cuda_graphs:
        take_step = CapturedStep(take_step)
    bar = Progress(phase.name, phase.steps, max(0, run.done - begin))
    for step in range(max(begin, run.done) + 1, end + 1):  # counted from 1, over both phases
        lr = learning_rate(config, phase, step - begin - 1)
        set_rate(optimizer, lr)
        batches = (
            draw_batch(run.material, models, phase, config, run.generator).to(models.device)
            for _ in range(config.gradient_accumulation_steps)
        )
        values = take_step(batches)
        run.metrics.add(phase.name, step, lr, values)
        if (row := run.metrics.latest()) and not is_finite(row, run.precision):
            read_metrics(run)  # writes this row, and raises

        if step % config.log_steps == 0 or step == end or (models.device.type == "cpu" and bar.due()):
            bar.show(step - begin, read_metrics(run))
        asked = run.interrupts.asked
        if asked or (config.checkpointing_steps and step % config.checkpointing_steps == 0):
            save_state(run, step, trained, optimizer, scaler)
        if asked:
            where = f"after step {step} of {sum(p.steps for p in config.phases)}"
            raise Interrupted(f"stopped {where}, saved in {run.folder}; --resume_from_checkpoint latest goes on", asked)
        if config.img_log_steps and step % config.img_log_steps == 0:
            with autocast(models.device, run.precision):
                sheet = write_preview(run.folder, models, run.scene.handles, run.image, run.masks, config, step)
            if run.events:
                run.events.add_sheet(sheet, step)
    refuse_infinite(run, trained, f"at the end of {phase.name}")
    if run.precision == "fp16" and run.done < end:
        tell_overflows(run.folder, phase)


def tell_overflows(folder: Path, phase: Phase) -> None:
    """Warn of the steps of a phase that its gradient scaler left out, counted from the metrics of all its sessions."""
    norms = [row["grad_norm"] for row in read_rows(folder / METRICS) if row["phase"] == phase.name]
    if left_out := sum(not math.isfinite(norm) for norm in norms):
        log.warning("%s: fp16 overflowed in %d of %d steps, which changed nothing", phase.name, left_out, len(norms))


def read_metrics(run: Run) -> dict[str, float]:
    """Write the pending metrics and return the newest losses. Raises RunError if a number is not finite."""
    rows = run.metrics.flush()
    if run.events:
        run.events.add(rows)
    for row in rows:
        where = f"{row['phase']} step {row['step']}"
        if not is_finite(row, run.precision):
            wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            name = next((name for name in wrong if name not in ("loss", "grad_norm")), wrong[0])  # the cause, not a sum
            raise RunError(
                f"{where}: {name} is {row[name]}; {what_is_kept(run.folder)}; {ANEW} a lower learning rate "
                "or --mixed_precision no"
            )
        run.overflows = 0 if math.isfinite(row["grad_norm"]) else run.overflows + 1
        if run.overflows == OVERFLOWS:
            raise RunError(
                f"{where}: fp16 overflowed in {OVERFLOWS} steps in a row; {what_is_kept(run.folder)}; "
                f"{ANEW} --mixed_precision bf16 or no"
            )
    newest = rows[-1] if rows else {}
    return {name: value for name, value in newest.items() if name not in ("phase", "step", "lr", "grad_norm")}


def is_finite(row: dict, precision: str) -> bool:
    """Whether training can go on after this step. In fp16 the gradient may overflow: the scaler leaves the step out."""
    names = row.keys() - ({"phase", "grad_norm"} if precision == "fp16" else {"phase"})
    return all(math.isfinite(row[name]) for name in names)


def save_state(
    run: Run,
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Save all that a resumed run needs to go on as if nothing had happened."""
    read_metrics(run)
    refuse_infinite(run, trained, f"after step {step}")
    tensors = {f"trained.{name}": parameter for name, parameter in trained.items()}
    tensors |= optimizer_tensors(optimizer) | {"generator": run.generator.get_state()}
    note = {"step": step, "metrics": run.metrics.length, "scaler": scaler.state_dict(), "facts": run.facts}
    save_checkpoint(run.folder, step, tensors, note, run.config.checkpoints_total_limit)


def refuse_infinite(run: Run, trained: dict[str, nn.Parameter], when: str) -> None:
    """RunError naming a weight that is not finite: a finite loss and gradient can still step there."""
    finite = torch.stack([parameter.isfinite().all() for parameter in trained.values()]).tolist()
    if not all(finite):
        name = list(trained)[finite.index(False)]
        raise RunError(
            f"{when} {name} is not finite, so nothing is saved; {what_is_kept(run.folder)}; "
            f"{ANEW} a lower learning rate"
        )


def restore_parameters(trained: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy a checkpoint's values into the parameters a phase trains."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[f"trained.{name}"])


def finish(run: Run) -> None:
    """Write the tuned model, then the concepts file that marks the run as finished; drop the checkpoints."""
    restore(run.exact)
    save_model(run.models, run.folder, DTYPES[run.config.save_precision])
    rows = run.models.text_encoder.get_input_embeddings().handles
    save_concepts(run.folder, rows, run.masks, run.scene.handles, run.facts)
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    if run.events:
        run.events.close()
