"""The two-phase training of Break-A-Scene (paper, section 3), read top to bottom.

Phase 1 trains the new handles alone; phase 2 trains the UNet and the text encoder as well. Both run through the same
loop and the same `training_step`: a phase is a row of data (`TrainConfig.phases`).
"""

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bas.config import Phase, TrainConfig
from bas.data.batches import Batch, sample_batch
from bas.errors import RunError
from bas.io.run_files import CHECKPOINTS, save_concepts
from bas.losses import ATTENTION_LOSSES, average_maps, masked_mse
from bas.models.bundle import Models, cross_attention, keys_and_values
from bas.models.text import encode_ids
from bas.pretrained.folder import save_model
from bas.runtime.device import DTYPES, autocast, deterministic
from bas.runtime.progress import Progress
from bas.runtime.signals import Interrupted, Interrupts
from bas.schedulers import add_noise, training_target
from bas.training.base_model import Base
from bas.training.master_weights import MasterWeights, restore_weights
from bas.training.nonfinite import check_weights, flush_and_check, is_finite, warn_of_overflows
from bas.training.optimizer import build_optimizer, set_rate
from bas.training.preview import write_preview
from bas.training.run_folder import locked, newest_kept, optimizer_tensors, restore_optimizer, save_checkpoint
from bas.training.setup import Run, check_input, setup_run
from bas.training.timing import Timing

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
    clipped: MasterWeights,
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
        clipped.collect_gradients()
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0) + value.detach() * share
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(clipped.parameters, config.max_grad_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    clipped.copy_to_model()
    clipped.zero_grad()
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
def trained(config: TrainConfig, base: Base | None = None) -> Iterator[Run]:
    """Both phases of one scene. Within the block the run's models are the tuned ones, and its folder is held.

    A signal that comes while the block runs is noted in `run.interrupts`. Raises as `train` does.
    """
    times, checked = Timing(), check_input(config)
    with locked(Path(config.output_dir)), deterministic(config.deterministic):
        run = setup_run(config, *checked, base)
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
                f"writing to {run.folder} failed: {reason}; {newest_kept(run.folder)}: "
                "make room, then --resume_from_checkpoint latest"
            ) from error


def train_phase(run: Run, phase: Phase, begin: int) -> None:
    """Train one phase, which begins after `begin` steps of the run, from wherever the run stands."""
    config, models, end = run.config, run.models, begin + phase.steps
    weights = trainable_parameters(models, phase)
    watched = dict(weights)
    if phase.trains == ("handles",) and config.exact_phase1:
        watched["embedding"] = models.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    clipped = MasterWeights(watched, run.exact)
    trained = {name: clipped.named[name] for name in weights}
    optimizer = build_optimizer(trained.values(), config)
    scaler = torch.amp.GradScaler(models.device.type, enabled=run.precision == "fp16")
    if run.done > begin:
        restore_parameters(trained, run.saved)
        clipped.copy_to_model()
    if begin < run.done < end:
        restore_optimizer(optimizer, run.saved)
        scaler.load_state_dict(run.scaler_state)

    def take_step(batches: Iterable[Batch]) -> dict[str, Tensor]:
        return optimizer_step(models, batches, config, optimizer, scaler, clipped, run.precision)

    bar = Progress(phase.name, phase.steps, max(0, run.done - begin))
    for step in range(max(begin, run.done) + 1, end + 1):  # counted from 1, over both phases
        lr = learning_rate(config, phase, step - begin - 1)
        set_rate(optimizer, lr)
        batches = (
            sample_batch(run.data, models, phase, config, run.generator).to(models.device)
            for _ in range(config.gradient_accumulation_steps)
        )
        values = take_step(batches)
        run.metrics.add(phase.name, step, lr, values)
        if (row := run.metrics.latest()) and not is_finite(row, run.precision):
            flush_and_check(run)  # writes this row, and raises

        if step % config.log_steps == 0 or step == end or (models.device.type == "cpu" and bar.due()):
            bar.show(step - begin, flush_and_check(run))
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
    check_weights(run, trained, f"at the end of {phase.name}")
    if run.precision == "fp16" and run.done < end:
        warn_of_overflows(run.folder, phase)


def save_state(
    run: Run,
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Save all that a resumed run needs to go on as if nothing had happened."""
    flush_and_check(run)
    check_weights(run, trained, f"after step {step}")
    tensors = {f"trained.{name}": parameter for name, parameter in trained.items()}
    tensors |= optimizer_tensors(optimizer) | {"generator": run.generator.get_state()}
    note = {"step": step, "metrics": run.metrics.length, "scaler": scaler.state_dict(), "facts": run.facts}
    save_checkpoint(run.folder, step, tensors, note, run.config.checkpoints_total_limit)


def restore_parameters(trained: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Copy a checkpoint's values into the parameters a phase trains."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[f"trained.{name}"])


def finish(run: Run) -> None:
    """Write the tuned model, then the concepts file that marks the run as finished; drop the checkpoints."""
    restore_weights(run.exact)
    save_model(run.models, run.folder, DTYPES[run.config.save_precision])
    rows = run.models.text_encoder.get_input_embeddings().handles
    save_concepts(run.folder, rows, run.masks, run.scene.handles, run.facts)
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
    if run.events:
        run.events.close()
