"""References of sampling and noising: diffusers' schedulers over a made-up model, and its training pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.reference.measure import Named, uniform


@dataclass(frozen=True)
class Run:
    """One sampling run over a made-up model, long enough to show any difference in the arithmetic."""

    sampler: str
    prediction: str
    spacing: str
    offset: int
    steps: int
    eta: float = 0.0
    alpha_to_one: bool = False

    @property
    def name(self) -> str:
        """The key of the run in schedulers.safetensors."""
        return "/".join(str(value) for value in vars(self).values())

    def schedule(self) -> dict:
        """The scheduler_config.json of the run."""
        return {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": self.prediction,
            "timestep_spacing": self.spacing,
            "steps_offset": self.offset,
        }


RUNS = [
    Run(sampler, prediction, spacing, offset, steps, eta, alpha_to_one)
    for sampler in ("ddim", "ddpm", "dpmpp_2m")
    for prediction in ("epsilon", "v_prediction")
    for spacing in ("leading", "trailing", "linspace")
    for offset in (0, 1)
    for steps in (1, 7, 30)
    for eta, alpha_to_one in (((0.0, False), (1.0, False), (0.5, True)) if sampler == "ddim" else ((0.0, False),))
]
LATENTS = (1, 2, 3, 3)

TRAINING_TIMESTEPS = torch.tensor([0, 1, 500, 999])


def made_up_model(z: Tensor, t: int) -> Tensor:
    """Stands in for a UNet: smooth, and different at every timestep. -> the shape of z"""
    return torch.tanh(0.8 * z.roll(1, -1) - 0.4 * z + t / 1000)


def diffusers_scheduler(run: Run):
    """diffusers' scheduler for a run, its timesteps set, its float32 tables widened so that rounding does not show."""
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if run.sampler == "ddim":
        scheduler = DDIMScheduler(**run.schedule(), clip_sample=False, set_alpha_to_one=run.alpha_to_one)
    elif run.sampler == "ddpm":
        scheduler = DDPMScheduler(**run.schedule(), clip_sample=False)
    else:
        scheduler = DPMSolverMultistepScheduler(
            **run.schedule(), algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
        )
    scheduler.set_timesteps(run.steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def diffusers_trajectory(run: Run) -> Tensor:
    """The latents after each step of diffusers' scheduler. -> (steps, *LATENTS) float64"""
    from unittest.mock import patch

    scheduler, z, trajectory = diffusers_scheduler(run), uniform("z", *LATENTS).double(), []
    for i, t in enumerate(scheduler.timesteps.tolist()):
        output, noise = made_up_model(z, t), uniform(f"noise{i}", *LATENTS).double()
        options = {"eta": run.eta, "variance_noise": noise} if run.sampler == "ddim" else {}
        with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise):
            z = scheduler.step(output, t, z, **options).prev_sample
        trajectory.append(z)
    return torch.stack(trajectory)


def diffusers_timesteps(run: Run) -> Tensor:
    """The timesteps of a run. -> (steps,) int64"""
    return diffusers_scheduler(run).timesteps


def diffusers_training_pairs(prediction: str) -> Named:
    """diffusers' noisy latents and training targets."""
    scheduler = diffusers_scheduler(Run("ddpm", prediction, "leading", 0, 1))
    z0, eps, t = uniform("z0", 4, 2, 3, 3).double(), uniform("eps", 4, 2, 3, 3).double(), TRAINING_TIMESTEPS
    target = eps if prediction == "epsilon" else scheduler.get_velocity(z0, eps, t)
    return {f"{prediction}/noisy": scheduler.add_noise(z0, eps, t), f"{prediction}/target": target}


def schedules() -> Named:
    """Everything that schedulers.safetensors holds."""
    trajectories = {f"{run.name}/latents": diffusers_trajectory(run) for run in RUNS}
    timesteps = {f"{run.name}/timesteps": diffusers_timesteps(run) for run in RUNS}
    return trajectories | timesteps | diffusers_training_pairs("epsilon") | diffusers_training_pairs("v_prediction")
