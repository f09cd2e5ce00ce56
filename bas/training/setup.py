"""The setup of a run: the checks before weights are read, and all that its steps share."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bas import __version__
from bas.config import POLYNOMIAL_END, TrainConfig
from bas.data.batches import TrainingData, check_scene, prepare
from bas.data.collages import scene_for_method
from bas.data.scene import Scene
from bas.errors import InputError
from bas.io.files import write_text
from bas.io.json_files import write_json
from bas.io.run_files import METRICS, SETTINGS
from bas.io.settings_file import CONFIG, to_toml
from bas.models.adapters import add_adapters
from bas.models.bundle import Models, ModelSpec
from bas.models.compile import compile_unet
from bas.models.text import add_handles
from bas.pretrained.additions import Additions
from bas.pretrained.folder import build_on_meta
from bas.pretrained.hashes import base_hash
from bas.pretrained.hub import find, find_spec
from bas.pretrained.loading import check_savable
from bas.runtime.device import DTYPES, autocast, pick_device, pick_precision
from bas.runtime.signals import Interrupts
from bas.sampling.sampler import warn_of_weights
from bas.schedulers import sampling_timesteps
from bas.training.base_model import Base, home_of, rounded_at_once
from bas.training.checkpoints import Checkpoint, check_tensors, find_checkpoint, load_checkpoint, remove_later
from bas.training.class_images import check_class_folder
from bas.training.disk_space import require_disk_space, writing
from bas.training.master_weights import Float32Values, cast_weights
from bas.training.metrics import MetricsLog
from bas.training.optimizer import adamw8bit
from bas.training.phase_state import trainable_parameters, trained_weights
from bas.training.preview import write_scene
from bas.training.resume import check_progress, check_resumable, continued_schedule, scene_state
from bas.training.run_folder import prepare_folder
from bas.training.tensorboard import EventLog, writer_class

log = logging.getLogger(__name__)


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
    data: TrainingData
    metadata: dict  # settings, scene, hash of the base, version: what a resumed run must share
    generator: torch.Generator  # of all random numbers of the steps
    metrics: MetricsLog
    checkpoint: Checkpoint | None = None  # from which the run continues
    exact: Float32Values = field(default_factory=dict)  # float32 values of the weights that compute at 16 bits
    events: EventLog | None = None  # for TensorBoard, when asked for
    interrupts: Interrupts = field(default_factory=Interrupts)
    overflows: int = 0  # steps in a row that fp16 skipped

    @property
    def done(self) -> int:
        """Steps that the checkpoint brings along."""
        return self.checkpoint.step if self.checkpoint else 0


def check_machine(config: TrainConfig, weights: bool = True) -> tuple[ModelSpec, torch.device, str]:
    """Check base, device and precision, and the settings whose errors do not depend on a scene.

    Without `weights`, a known base need not be downloaded, and no extra need be installed.
    """
    if not config.phases:
        raise InputError("both phases have 0 steps: there is nothing to train")
    for phase in config.phases:
        if config.lr_warmup_steps >= phase.steps:
            log.warning(
                "--lr_warmup_steps %d: %s has %d steps, so it never reaches its learning rate",
                *(config.lr_warmup_steps, phase.name, phase.steps),
            )
        if config.lr_scheduler == "polynomial" and phase.lr <= POLYNOMIAL_END:
            raise InputError(
                f"--lr_scheduler polynomial ends at {POLYNOMIAL_END:g}, and {phase.name} begins at {phase.lr:g}: raise "
                "its learning rate"
            )
    name, device = config.pretrained_model_name_or_path, pick_device(config.device)
    if weights:
        find(name)
    spec = find_spec(name, config.prediction_type, Additions.of_base(vars(config)))
    if spec.adapted_tokens:
        raise InputError(
            f"{name} was trained with --train token and cannot be a base: train on its own base, and merge"
        )
    precision = pick_precision(config.mixed_precision, device, spec.unet_size)
    if config.exact_phase1 and precision == "fp16":
        raise InputError("--exact_phase1 clips by gradients that fp16 scales: use --mixed_precision no or bf16")
    if weights:
        check_extras(config)
    return spec, device, precision


def check_extras(config: TrainConfig) -> None:
    """Raise InputError where a package is missing that the settings need beyond those of bas."""
    if config.optimizer == "adamw8bit":
        adamw8bit()
    if config.report_to == "tensorboard":
        writer_class()


def check_input(config: TrainConfig, weights: bool = True) -> tuple[Scene, Path, torch.device, str]:
    """Check scene, base, device and precision of a run, and return them. No weights are read.

    Without `weights`, a known base need not be downloaded, and its path is then its name; no extra need be installed.
    """
    scene = scene_for_method(config)
    spec, device, precision = check_machine(config, weights)
    size = check_scene(spec, scene, config)
    if any(phase.prior for phase in config.phases):
        warn_of_weights(config.class_prompt)
        check_class_folder(replace(config, mixed_precision=precision), spec, size)
    if config.img_log_steps:
        sampling_timesteps(spec.schedule, config.preview_inference_steps)
    return scene, spec.source or Path(), device, precision


def setup_run(
    config: TrainConfig, scene: Scene, path: Path, device: torch.device, precision: str, base: Base | None = None
) -> Run:
    """Load the base unless it is in memory, and compute what all steps share.

    scene to precision: what `check_input` returned. The run folder must be held by `locked`. Raises InputError for a
    run folder, a disk or a checkpoint that the run cannot use, before weights are read and before anything but
    half-written files is removed.
    """
    folder = Path(config.output_dir)
    prepare_folder(folder, resuming=config.resume_from_checkpoint is not None)
    require_disk_space(folder, path, config, len(scene.handles))
    place, additions = find_checkpoint(folder, config.resume_from_checkpoint), Additions.of_base(vars(config))
    metadata = {
        "config": asdict(config),
        **scene_state(scene),
        "base": base.hash if base else base_hash(path, additions, remembered=place is None),
        "precision": precision,
        "version": __version__,
    }
    checkpoint = load_checkpoint(place) if place else None
    if checkpoint:
        check_resumable(checkpoint.folder, metadata, checkpoint.metadata)
        check_progress(checkpoint, folder, sum(phase.steps for phase in config.phases))
        check_parameters(checkpoint, path, scene, config, precision)

    if base is None:
        log_miniature(config)
        home, own = home_of(device, precision), rounded_at_once(config, precision)
        base = Base.open(path, home, metadata["base"], False, config.prediction_type, additions, own)
    models = fresh_models(base, scene, config)
    if config.kind.whole:
        check_savable(models, DTYPES[config.save_precision])
    image, masks = scene.tensors(models.resolution, models.size_multiple, config.center_crop)
    exact = {}
    if precision == "bf16":
        kept = None if config.kind.whole else {*trained_weights(models, config).values()}  # a small run saves no other
        exact = cast_weights((models.unet, *models.text_encoders), DTYPES[precision], kept, device)
    models.to(device)  # in bf16 what was not rounded: the VAE, and tables that are no weights
    schedule = continued_schedule(models.schedule, checkpoint.metadata) if checkpoint else models.schedule
    prior, metadata["schedule"], metadata["class_images"] = None, schedule.to_json(), None
    if any(phase.prior for phase in config.phases):
        settings = replace(config, mixed_precision=precision)
        # Uncompiled, though an earlier scene may have compiled the base's modules.
        with autocast(device, precision), torch.compiler.set_stance("force_eager"):
            size = image.shape[1], image.shape[2]
            prior, metadata["class_images"] = base.class_images(settings, size, schedule)
    if checkpoint:
        check_resumable(checkpoint.folder, metadata, checkpoint.metadata)
    data = prepare(models, scene, image, masks, config, prior)
    compile_unet(models.unet, config.compile)
    generator = torch.Generator().manual_seed(config.seed)
    if checkpoint:
        generator.set_state(checkpoint.tensors["generator"])
    with writing(folder):
        write_json(folder / SETTINGS, metadata)
        write_text(folder / CONFIG, to_toml(asdict(config)))
        write_scene(folder, scene, image, masks)
        if checkpoint:
            remove_later(folder, checkpoint.step)
        metrics = MetricsLog(folder / METRICS, checkpoint.metrics if checkpoint else 0)
    return Run(
        config=config,
        folder=folder,
        scene=scene,
        models=models,
        precision=precision,
        image=image,
        masks=masks,
        data=data,
        metadata=metadata,
        generator=generator,
        metrics=metrics,
        checkpoint=checkpoint,
        exact=exact,
        events=EventLog(folder, checkpoint.step if checkpoint else 0) if config.report_to == "tensorboard" else None,
        overflows=checkpoint.overflows if checkpoint else 0,
    )


def check_parameters(checkpoint: Checkpoint, base: Path, scene: Scene, config: TrainConfig, precision: str) -> None:
    """Check that a checkpoint's tensors are those of the phase that its step lies in. Reads no weight."""
    models, _ = build_on_meta(base, config.prediction_type, Additions.of_base(vars(config)))
    add_adapters(models, config, len(scene.handles))
    add_handles(models.text_encoders, models.tokenizer, scene.handles, scene.words, config.seed)
    left = checkpoint.step
    for phase in config.phases:
        if left <= phase.steps:
            adam = config.optimizer in ("adamw", "adam")
            check_tensors(checkpoint, trainable_parameters(models, phase), adam, left, precision)
            return
        left -= phase.steps


def fresh_models(base: Base, scene: Scene, config: TrainConfig) -> Models:
    """Fresh models of the base with the scene's handles, which generate images of the size they are trained at."""
    models = base.fresh()
    models.unet.set_gradient_checkpointing(config.gradient_checkpointing)
    if config.resolution:
        latent_side = config.resolution // models.vae.config.factor
        models.unet.config = replace(models.unet.config, sample_size=latent_side)
    add_adapters(models, config, len(scene.handles))
    add_handles(models.text_encoders, models.tokenizer, scene.handles, scene.words, config.seed)
    models.handles = scene.handles
    return models


def log_miniature(config: TrainConfig) -> None:
    """Log that the base model is the miniature, if none is named: it cannot learn from photographs."""
    if config.pretrained_model_name_or_path is None:
        log.info("the base model is the miniature, which knows no photographs; bas.json holds its settings")
