"""The two-phase training of Break-A-Scene (paper, section 3), read top to bottom.

Phase 1 trains the new handles alone; phase 2 trains the UNet and the text encoder as well. Both run through the same
loop and the same `training_step`: a phase is a row of data (`TrainConfig.phases`).
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bas.config import POLYNOMIAL_END, TrainConfig
from bas.data.batches import Batch, sample_batch
from bas.errors import NotFiniteError
from bas.io.run_files import save_concepts
from bas.losses import ATTENTION_LOSSES, average_maps, masked_mse
from bas.models.adapters import token_ranks
from bas.models.bundle import Models
from bas.models.text import encode_ids
from bas.presets import Phase
from bas.pretrained.folder import save_model
from bas.pretrained.small_runs import Tuned, save_tuned
from bas.runtime.device import DTYPES, autocast, deterministic, tf32
from bas.runtime.progress import Progress
from bas.runtime.signals import Interrupted, Interrupts
from bas.schedulers import add_noise, training_target
from bas.training.base_model import Base
from bas.training.checkpoints import checkpoint_folder, list_checkpoints, optimizer_tensors, remove_all, save_checkpoint
from bas.training.disk_space import writing
from bas.training.master_weights import restore_weights
from bas.training.nonfinite import check_weights, flush_and_check, is_finite, warn_of_overflows
from bas.training.optimizer import set_learning_rate
from bas.training.phase_state import PhaseState, build_phase_state, handle_embeddings, restore_phase, trained_weights
from bas.training.preview import sheet_path, write_preview
from bas.training.resume import is_finished
from bas.training.run_folder import clear_finished, has_leftovers, locked
from bas.training.setup import Run, check_input, setup_run
from bas.training.timing import Timing

log = logging.getLogger(__name__)


# --- One step -----------------------------------------------------------------------------------------------------


def training_step(models: Models, batch: Batch, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one batch (paper, section 3), and its unweighted parts as 0-dim tensors.

    L = L_rec (eq. 1) + prior_loss_weight x L_prior + lambda_attention x L_attn (eq. 2)
    """
    instances = len(batch.union)
    context = encode_ids(models.text_encoders, batch.input_ids)
    z_t = add_noise(models.schedule, batch.z0, batch.eps, batch.t)
    target = training_target(models.schedule, batch.z0, batch.eps, batch.t)
    grid = tuple(batch.masks.shape[-2:]) if config.lambda_attention else False
    prediction, maps = models.unet(z_t, batch.t, context.states, return_maps=grid, pooled=context.pooled)

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


def optimizer_step(
    models: Models, batches: Iterable[Batch], config: TrainConfig, state: PhaseState
) -> dict[str, Tensor]:
    """Accumulate the gradient of the batches, clip it, step. -> the losses' means and the norm before clipping"""
    share, sums = 1 / config.gradient_accumulation_steps, {}
    for batch in batches:
        with autocast(models.device, "fp16" if state.precision == "fp16" else "no"):  # bf16 weights are bf16 already
            loss, parts = training_step(models, batch, config)
        state.scaler.scale(loss * share).backward()
        state.weights.collect_gradients()
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0) + value.detach() * share
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.weights.master_params, config.max_grad_norm or math.inf)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.weights.copy_to_model()
    state.weights.zero_grad()
    return {**sums, "grad_norm": norm}


def learning_rate(config: TrainConfig, phase: Phase, step: int) -> float:
    """Return the learning rate at this step of a phase, counted from 0.

    The schedules are those of diffusers' get_scheduler.
    """
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

    base: the base model where it is in memory already. Resuming a run that was killed after its last step completes
    what is missing. Raises InputError for anything wrong with the input, before weights are read; RunError when a
    number stops being finite or the disk is full; Interrupted after a signal, once the state is saved.
    """
    folder = Path(config.output_dir)
    if config.resume_from_checkpoint and has_leftovers(folder) and is_finished(config):
        clear_finished(folder)
        return folder
    with trained(config, base) as run:
        finish(run)
    return run.folder


@contextmanager
def trained(config: TrainConfig, base: Base | None = None) -> Iterator[Run]:
    """Train both phases of one scene. Within the block the run's models are the tuned ones, and its folder is locked.

    A signal that comes while the block runs is kept in `run.interrupts`. Raises as `train` does.
    """
    folder = Path(config.output_dir)
    timing, checked = Timing(), check_input(config)
    with locked(folder), deterministic(config.deterministic), tf32(config.allow_tf32):
        run = setup_run(config, *checked, base)
        timing.note("preparation", folder, run.models.device)
        with Interrupts() as run.interrupts:
            begin = 0
            device = run.models.device if config.seg_mix_probability else torch.device("cpu")  # all else is encoded
            with moved(run.models.vae, device):
                for phase in config.phases:
                    try:
                        train_phase(run, phase, begin)
                    except Interrupted:
                        timing.note(phase.name, folder, run.models.device)  # the part of it that was trained
                        raise
                    timing.note(phase.name, folder, run.models.device)
                    begin += phase.steps
            yield run
            timing.note("saving", folder, run.models.device)


@contextmanager
def moved(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block a network is on another device, where it takes no memory of its own."""
    home = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(home)


def train_phase(run: Run, phase: Phase, begin: int) -> None:
    """Train one phase, which follows `begin` steps of the run, from wherever the run stands."""
    config, end = run.config, begin + phase.steps
    state = build_phase_state(run.models, phase, config, run.precision, run.exact)
    if run.checkpoint and run.done > begin:
        restore_phase(state, run.checkpoint, within=run.done <= end)
    bar = Progress(phase.name, phase.steps, max(0, run.done - begin))
    for step in range(max(begin, run.done), end + 1):  # steps of the run that are done
        if step > begin:
            do_rare_work(run, state, step)
        if step == end:
            break
        lr = learning_rate(config, phase, step - begin)
        set_learning_rate(state.optimizer, lr)
        values = optimizer_step(run.models, sample_batches(run, phase), config, state)
        run.metrics.add(phase.name, step + 1, lr, values)
        show_progress(run, bar, step + 1, step + 1 - begin)
    check_weights(run, state.weights.optimized, f"at the end of {phase.name}")
    if run.precision == "fp16" and run.done < end:
        warn_of_overflows(run.folder, phase)


def sample_batches(run: Run, phase: Phase) -> Iterator[Batch]:
    """Sample the batches of one optimizer step, each when it is asked for."""
    for _ in range(run.config.gradient_accumulation_steps):
        yield sample_batch(run.data, run.models, phase, run.config, run.generator).to(run.models.device)


def show_progress(run: Run, bar: Progress, step: int, done: int) -> None:
    """Check the numbers of a step, and every few steps write and show them. RunError if one is not finite.

    step: of the run; done: of the phase, whose last step is always shown.
    """
    if (row := run.metrics.latest()) and not is_finite(row, run.precision):
        flush_and_check(run)  # writes this row, and raises
    if step % run.config.log_steps == 0 or done == bar.total or (run.models.device.type == "cpu" and bar.due()):
        bar.show(done, flush_and_check(run))


def do_rare_work(run: Run, state: PhaseState, step: int) -> None:
    """Save a checkpoint, stop, write a preview, each if it is due after `step` steps.

    What was due at the step from which a run resumes exists already, unless the run was killed in between.
    """
    config, signal, resumed = run.config, run.interrupts.asked, step == run.done
    due = bool(config.checkpointing_steps) and step % config.checkpointing_steps == 0
    if (signal or due) and not (resumed and checkpoint_folder(run.folder, step) in list_checkpoints(run.folder)):
        save_state(run, step, state)
    if signal:
        where = f"after step {step} of {sum(phase.steps for phase in config.phases)}"
        raise Interrupted(f"stopped {where}, saved in {run.folder}", signal)
    due = bool(config.img_log_steps) and step % config.img_log_steps == 0
    if due and not (resumed and sheet_path(run.folder, step).exists()):
        try:
            device = run.models.device
            with writing(run.folder), autocast(device, run.precision), moved(run.models.vae, device):
                sheet = write_preview(run.folder, run.models, run.scene.handles, run.image, run.masks, config, step)
        except NotFiniteError as error:  # losses and weights have checks of their own
            log.warning("no preview after step %d: %s", step, error)
            return
        if run.events:
            run.events.add_sheet(sheet, step)


def save_state(run: Run, step: int, state: PhaseState) -> None:
    """Save a checkpoint: all that a resumed run needs to continue with the same bits."""
    flush_and_check(run)
    check_weights(run, state.weights.optimized, f"after step {step}")
    tensors = {f"trained.{name}": parameter for name, parameter in state.weights.optimized.items()}
    tensors |= optimizer_tensors(state.optimizer) | {"generator": run.generator.get_state()}
    entries = {
        "step": step,
        "metrics": run.metrics.length,
        "scaler": state.scaler.state_dict(),
        "overflows": run.overflows,
        "facts": run.metadata,
    }
    with writing(run.folder):
        save_checkpoint(run.folder, step, tensors, entries, run.config.checkpoints_total_limit)


def finish(run: Run) -> None:
    """Write what was trained, then the concepts file that marks the run as finished; remove the checkpoints."""
    restore_weights(run.exact)
    dtype = DTYPES[run.config.save_precision]
    with writing(run.folder):
        if run.config.kind.whole:
            save_model(run.models, run.folder, dtype)
        else:
            weights = trained_weights(run.models, run.config)
            save_tuned(Tuned(weights, run.config.adapter_scale, token_ranks(run.models.unet)), run.folder, dtype)
        rows = [embedding.handles for embedding in handle_embeddings(run.models)]
        save_concepts(run.folder, rows, run.masks, run.scene.handles, run.metadata)
        remove_all(run.folder)
    if run.events:
        run.events.close()
