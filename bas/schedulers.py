"""The noise schedule and the sampling steps, as plain functions of tensors.

Notation of the papers: a_t is the cumulative product of the alphas, z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps.
In the sampling steps t and prev_t are numbers; prev_t < 0 is the end, beyond timestep 0. They are whole numbers, except
that Karras' spacing and Euler's "linspace" have steps between the timesteps.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bas.errors import InputError, check_bool, check_choice, check_float, check_int, check_positive, shown

log = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")
FINAL_SIGMAS = ("zero", "sigma_min")
FEW_STEPS = 15  # with fewer, the last step of DPM-Solver++ is of first order, as in diffusers
SPACINGS = ("leading", "trailing", "linspace")
# The schedulers of diffusers that Stable Diffusion models name. Others (flow matching, consistency models) belong to
# networks that predict something else.
SCHEDULERS = {
    *("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    *("PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepInverseScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler"),
    *("UniPCMultistepScheduler", "SASolverScheduler"),
}
CLASS_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # of each of these classes
# But those of KDPM2 and Heun have Stable Diffusion's range.
CLASS_BETAS = {
    name: {"beta_start": 0.00085, "beta_end": 0.012}
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
}
OTHER_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
OTHER_SOLVERS = {"algorithm_type": "dpmsolver++", "solver_order": 2}  # settings of multistep solvers, and bas's own
KARRAS, KARRAS_RHO = "dpmpp_2m_karras", 7.0  # DPM-Solver++(2M) with the spacing of Karras et al. 2022
# Euler's samplers: the eta with which a DDIM step from each timestep to the next, and at last to a = 1, is their step
# (Karras et al. 2022, algorithm 1; ancestral: as k-diffusion has it).
EULER = {"euler": 0.0, "euler_a": 1.0}
LEAST_ALPHA = 2.0**-24  # stands for a_t = 0 where its logarithm is needed, as in diffusers


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise of each timestep, and the spacing of the timesteps in sampling. The defaults are Stable Diffusion's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 0
    timestep_spacing: str | None = None  # None: "leading" for DDIM and DDPM, else "linspace", as in diffusers
    set_alpha_to_one: bool = False  # True: DDIM ends at a = 1; False: at a of timestep 0, as Stable Diffusion does
    final_sigmas_type: str = "zero"  # DPM-Solver++ and Euler end without noise, or ("sigma_min") at that of timestep 0
    rescale_betas_zero_snr: bool = False  # no signal at all in the last timestep (Lin et al. 2024, algorithm 1)
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)  # (T,) float32, from the betas

    def __post_init__(self):
        check_positive("scheduler num_train_timesteps", self.num_train_timesteps, 100_000)
        check_int("scheduler steps_offset", self.steps_offset, 0, self.num_train_timesteps)
        check_bool("scheduler set_alpha_to_one", self.set_alpha_to_one)
        check_bool("scheduler rescale_betas_zero_snr", self.rescale_betas_zero_snr)
        check_choice("scheduler final_sigmas_type", self.final_sigmas_type, FINAL_SIGMAS)
        check_float("scheduler beta_end", self.beta_end, above=0, below=1)
        check_float("scheduler beta_start", self.beta_start, above=0, most=self.beta_end)
        check_choice("scheduler beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("scheduler prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            check_choice("scheduler timestep_spacing", self.timestep_spacing, SPACINGS)
        root = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
        betas = torch.linspace(
            self.beta_start**root,
            self.beta_end**root,
            self.num_train_timesteps,
            dtype=torch.float32,
            device="cpu",
        ) ** (1 / root)
        if self.rescale_betas_zero_snr:
            if self.prediction_type == "epsilon":
                raise InputError("scheduler rescale_betas_zero_snr needs prediction_type v_prediction")
            betas = _rescaled_to_zero_snr(betas)
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1.0 - betas, dim=0))

    @classmethod
    def from_json(cls, config: dict) -> "NoiseSchedule":
        """Read a scheduler_config.json; a field that is missing has the default of its class in diffusers.

        A spacing that is missing is that of each sampler's own class, as in diffusers' `from_config`.

        `clip_sample` is ignored, as in diffusers' StableDiffusionPipeline. Raises InputError for other settings that
        would change the arithmetic, and for schedulers of other kinds of models.
        """
        name = config.get("_class_name", "DDIMScheduler")
        if not isinstance(name, str) or name not in SCHEDULERS:
            raise InputError(
                f"scheduler _class_name is {shown(name)}: expected one of Stable Diffusion, such as DDIMScheduler"
            )
        for key in ("trained_betas", "thresholding", "use_flow_sigmas"):
            if config.get(key):
                raise InputError(f"scheduler {key} is {config[key]!r:.60}: bas does not support it")
        if config.get("timestep_type", "discrete") != "discrete":
            raise InputError(f"scheduler timestep_type is {config['timestep_type']!r:.60}: bas does not support it")
        for key in OTHER_SPACINGS:
            if config.get(key):
                own = f"--sampler {KARRAS} has it" if "karras" in key else "bas spaces denoising steps evenly in time"
                _warn_once(f"scheduler {key} is not used: {own}")
        for key, own in OTHER_SOLVERS.items():
            if config.get(key, own) != own:
                _warn_once(f"scheduler {key} {config[key]!r:.60} is not used: --sampler says how images are denoised")
        ends_at_one = (
            name != "PNDMScheduler"
        )  # the others, and diffusers' DDIM made from their files, end without noise
        defaults: dict[str, Any] = CLASS_DEFAULTS | CLASS_BETAS.get(name, {}) | {"set_alpha_to_one": ends_at_one}
        names = {f.name for f in fields(cls) if f.init}
        given = {key: value for key, value in config.items() if key in names and value is not None}
        return cls(**defaults | given)

    def to_json(self) -> dict:
        """Return the scheduler_config.json that diffusers reads."""
        spacing = {"timestep_spacing": self.timestep_spacing} if self.timestep_spacing else {}
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": self.num_train_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.prediction_type,
            "steps_offset": self.steps_offset,
            **spacing,
            "set_alpha_to_one": self.set_alpha_to_one,
            **({} if self.final_sigmas_type == "zero" else {"final_sigmas_type": self.final_sigmas_type}),
            **({"rescale_betas_zero_snr": True} if self.rescale_betas_zero_snr else {}),
            "clip_sample": False,
        }

    def alpha(self, t: float, final: float = 1.0) -> float:
        """a_t as a number, between timesteps by the logarithm of the noise; `final` beyond the last step (t < 0)."""
        if t < 0 or t == int(t):
            return self.alphas_cumprod[int(t)].item() if t >= 0 else final
        low, high = log_sigmas(self)[int(t) : int(t) + 2].tolist()
        return 1 / (1 + math.exp(2 * (low + (t - int(t)) * (high - low))))


@dataclass(frozen=True)
class SigmaSchedule(NoiseSchedule):
    """The schedule for samplers that compute with the noise relative to the signal: some signal is always left.

    They end without noise, whatever DDIM does, unless `final_sigmas_type` says otherwise.
    """

    linear: bool = False  # between timesteps by that relative noise, as diffusers' Euler; else by its logarithm

    def alpha(self, t: float, final: float = 1.0) -> float:
        """a_t as a number, `final` beyond the last step (t < 0)."""
        if t < 0 or t == int(t) or not self.linear:
            return max(super().alpha(t, final), LEAST_ALPHA)
        low, high = log_sigmas(self)[int(t) : int(t) + 2].exp().tolist()
        return 1 / (1 + (low + (t - int(t)) * (high - low)) ** 2)


def seen_by(schedule: NoiseSchedule, sampler: str) -> NoiseSchedule:
    """Return the schedule as a sampler sees it."""
    if sampler in ("ddim", "ddpm"):
        return schedule
    own: dict[str, Any] = {f.name: getattr(schedule, f.name) for f in fields(NoiseSchedule) if f.init}
    zero = sampler != "euler" or schedule.final_sigmas_type == "zero"  # euler_a knows no other end in diffusers
    return SigmaSchedule(**{**own, "set_alpha_to_one": zero}, linear=sampler in EULER)


@cache
def _warn_once(message: str) -> None:
    """Warn, once in a process."""
    log.warning(message)


def _rescaled_to_zero_snr(betas: Tensor) -> Tensor:
    """Return the betas whose sqrt(a_t) ends at 0 and begins as before (Lin et al. 2024, algorithm 1). (T,) -> (T,)"""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    a = ((roots - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([a[:1], a[1:] / a[:-1]])


def log_sigmas(schedule: NoiseSchedule) -> Tensor:
    """Return the logarithm of each timestep's noise relative to its signal, sqrt((1 - a_t) / a_t). (T,) float64"""
    a = schedule.alphas_cumprod.double().clamp(min=LEAST_ALPHA)
    return 0.5 * torch.log((1 - a) / a)


@cache
def _table(schedule: NoiseSchedule, device: torch.device) -> Tensor:
    """Return the a_t on a device, copied there once, so that no step waits for the copy. (T,)"""
    return schedule.alphas_cumprod.to(device)


def _per_sample(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """a_t of each sample, with as many axes as `like`, on its device."""
    values = _table(schedule, like.device).to(like.dtype)
    return values[t].view(-1, *[1] * (like.ndim - 1))


def add_noise(schedule: NoiseSchedule, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Add noise to clean latents (Ho et al. 2020, eq. 4). z0, eps: (b, c, h, w); t: (b,) -> (b, c, h, w)"""
    a = _per_sample(schedule, t, z0)
    return a**0.5 * z0 + (1 - a) ** 0.5 * eps


def training_target(schedule: NoiseSchedule, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return the training target: eps, or v = sqrt(a) eps - sqrt(1-a) z0 (Salimans and Ho 2022). (b, c, h, w)"""
    if schedule.prediction_type == "epsilon":
        return eps
    a = _per_sample(schedule, t, z0)
    return a**0.5 * eps - (1 - a) ** 0.5 * z0


def clean_and_noise(schedule: NoiseSchedule, z: Tensor, output: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Convert the output of the model at timestep t to (z0, eps). z, output: (b, c, h, w)"""
    a = schedule.alpha(t)
    if schedule.prediction_type == "epsilon":
        return (z - (1 - a) ** 0.5 * output) / a**0.5, output
    return a**0.5 * z - (1 - a) ** 0.5 * output, a**0.5 * output + (1 - a) ** 0.5 * z


def used_spacing(schedule: NoiseSchedule, sampler: str) -> str:
    """Return how a sampler spaces its timesteps with this schedule: leading, linspace, trailing or karras."""
    if sampler == KARRAS:
        return "karras"
    return schedule.timestep_spacing or ("leading" if sampler in ("ddim", "ddpm") else "linspace")


def sampling_timesteps(schedule: NoiseSchedule, steps: int, sampler: str = "ddim") -> Sequence[float]:
    """Return the timesteps of a sampling run, noisiest first, with the spacing of the model's scheduler config.

    DPM-Solver++ has one interval more than DDIM and leaves the last point out, as its authors' code does. Raises
    InputError for more steps than the model has timesteps.
    """
    total, multistep = schedule.num_train_timesteps, sampler == "dpmpp_2m"
    spacing = used_spacing(schedule, sampler)
    points = steps + 1 if multistep else steps
    if not 1 <= steps or points > total:
        raise InputError(f"{steps} denoising steps: this model was trained with {total} timesteps, so ask for fewer")
    if spacing == "karras":
        return karras_timesteps(schedule, steps)
    if spacing == "leading":
        timesteps = [i * (total // points) + schedule.steps_offset for i in reversed(range(points))]
    elif spacing == "linspace":
        gap = (total - 1) / max(points - 1, 1)
        places = [i * gap for i in reversed(range(points))]
        timesteps = places if sampler in EULER else [*map(round, places)]  # Euler's are not rounded in diffusers
    else:
        timesteps = [round(total - i * total / steps) - 1 for i in range(steps)]
    timesteps = [min(t, total - 1) for t in timesteps[:steps]]
    if len(set(timesteps)) < steps:
        raise InputError(
            f"{steps} denoising steps, shifted by {schedule.steps_offset}, go beyond the {total} timesteps: use fewer"
        )
    return timesteps


def karras_timesteps(schedule: NoiseSchedule, steps: int) -> list[float]:
    """Return the places between timesteps, noisiest first, where the noise is that of Karras et al. 2022, eq. 5."""
    known = log_sigmas(schedule).numpy()
    least, most = (np.exp(end) ** (1 / KARRAS_RHO) for end in (known[0], known[-1]))
    sigmas = (most + np.linspace(0, 1, steps) * (least - most)) ** KARRAS_RHO
    return np.interp(np.log(sigmas), known, np.arange(len(known))).tolist()


def previous_timestep(schedule: NoiseSchedule, timesteps: Sequence[float], i: int, sampler: str = "ddim") -> float:
    """Return the timestep at which step i of a sampling run ends; below 0 is the end of the run.

    DDIM steps by T // steps, by its definition. With "linspace" spacing this is not exactly the next timestep.
    """
    if sampler == "ddim":
        return timesteps[i] - schedule.num_train_timesteps // len(timesteps)
    return timesteps[i + 1] if i + 1 < len(timesteps) else -1


def earlier_step(last: tuple[Tensor, float] | None, prev_t: float, steps: int) -> tuple[Tensor, float] | None:
    """Return the step before that a DPM-Solver++ step extrapolates from: none at the end of a run of few steps."""
    return None if prev_t < 0 and steps < FEW_STEPS else last


def initial_scale(schedule: NoiseSchedule, t: float, sampler: str) -> float:
    """Return the factor of the first noise of a run that begins at timestep t.

    It is 1, because the models were trained to see almost pure noise there. As in diffusers, Euler's samplers leave out
    the image's part of it, unless timesteps are spaced as "leading".
    """
    evenly = used_spacing(schedule, sampler) == "leading"
    return 1.0 if sampler not in EULER or evenly else (1 - schedule.alpha(t)) ** 0.5


def ddpm_step(schedule: NoiseSchedule, z: Tensor, output: Tensor, t: float, prev_t: float, noise: Tensor) -> Tensor:
    """Take one ancestral step (Ho et al. 2020, eq. 6, 7, the smaller variance).

    Tensors (b, c, h, w); noise ~ N(0, I).
    """
    a_t, a_prev = schedule.alpha(t), schedule.alpha(prev_t)
    alpha = a_t / a_prev
    z0, _ = clean_and_noise(schedule, z, output, t)
    mean = a_prev**0.5 * (1 - alpha) / (1 - a_t) * z0 + alpha**0.5 * (1 - a_prev) / (1 - a_t) * z
    if prev_t < 0:
        return mean
    variance = max((1 - a_prev) / (1 - a_t) * (1 - alpha), 1e-20)
    return mean + variance**0.5 * noise


def ddim_step(
    schedule: NoiseSchedule,
    z: Tensor,
    output: Tensor,
    t: float,
    prev_t: float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Take one DDIM step (Song et al. 2021, eq. 12 and 16). Tensors (b, c, h, w); `noise` is used when eta > 0."""
    a_t = schedule.alpha(t)
    a_prev = schedule.alpha(prev_t, final=1.0 if schedule.set_alpha_to_one else schedule.alpha(0))
    z0, eps = clean_and_noise(schedule, z, output, t)
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    rest = max(0.0, 1 - a_prev - sigma**2)  # rounded below 0 where eta is 1 and a_t is 0
    z_prev = a_prev**0.5 * z0 + rest**0.5 * eps
    return z_prev + sigma * noise if eta > 0 else z_prev


def dpmpp_2m_step(
    schedule: NoiseSchedule,
    z: Tensor,
    z0: Tensor,
    t: float,
    prev_t: float,
    last: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Take one DPM-Solver++(2M) step (Lu et al. 2022, algorithm 2).

    z, z0: (b, c, h, w), the current latents and their clean latents as predicted; `last` is (z0, t) of the step before,
    None for a step of first order. The step that ends at prev_t < 0 returns z0, or ends at timestep 0 if the schedule's
    `final_sigmas_type` is "sigma_min".
    """
    if prev_t < 0 and schedule.final_sigmas_type == "zero":
        return z0
    prev_t = max(prev_t, 0)
    a_t, a_prev = (torch.tensor(schedule.alpha(i), dtype=torch.float64).clamp(min=LEAST_ALPHA) for i in (t, prev_t))
    log_snr = [0.5 * torch.log(a / (1 - a)) for a in (a_t, a_prev)]
    h = log_snr[1] - log_snr[0]
    estimate = z0
    if last is not None:
        z0_last, t_last = last
        a_last = torch.tensor(schedule.alpha(t_last), dtype=torch.float64).clamp(min=LEAST_ALPHA)
        r = (log_snr[0] - 0.5 * torch.log(a_last / (1 - a_last))) / h
        estimate = z0 + (z0 - z0_last) / (2 * r.item())
    ratio = ((1 - a_prev) / (1 - a_t)).sqrt().item()
    return ratio * z - (a_prev.sqrt() * torch.expm1(-h)).item() * estimate
