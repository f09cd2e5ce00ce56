"""The noise schedule and the samplers against diffusers, whole trajectories, and a few numbers by hand."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from bas import schedulers
from bas.errors import InputError
from bas.schedulers import (
    EULER,
    NoiseSchedule,
    add_noise,
    clean_and_noise,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    earlier_step,
    previous_timestep,
    sampling_timesteps,
    seen_by,
    training_target,
    used_spacing,
)
from tools.reference.cases import REFERENCE
from tools.reference.measure import uniform
from tools.reference.schedulers import (
    LATENTS,
    RUNS,
    TRAINING_TIMESTEPS,
    Run,
    diffusers_timesteps,
    diffusers_training_pairs,
    diffusers_trajectory,
    made_up_model,
)

STORED = load_file(REFERENCE / "schedulers.safetensors")
GROUPS = sorted({(run.sampler, run.prediction, run.spacing) for run in RUNS})
each_group = pytest.mark.parametrize(("sampler", "prediction", "spacing"), GROUPS)


def runs(sampler: str, prediction: str, spacing: str) -> list[Run]:
    """Runs of 1, 7 and 30 steps, offset 0 and 1, for DDIM eta 0, 0.5 and 1 and both final alphas."""
    found = [run for run in RUNS if (run.sampler, run.prediction, run.spacing) == (sampler, prediction, spacing)]
    assert len(found) == (18 if sampler == "ddim" else 6)
    return found


def trajectory(run: Run, dtype: torch.dtype) -> torch.Tensor:
    """The latents after each step of bas's sampler. -> (steps, *LATENTS)"""
    schedule = NoiseSchedule.from_json(run.schedule() | {"set_alpha_to_one": run.alpha_to_one})
    timesteps = sampling_timesteps(schedule, run.steps, run.sampler)
    z, last, out = uniform("z", *LATENTS).to(dtype), None, []
    for i, t in enumerate(timesteps):
        prev_t = previous_timestep(schedule, timesteps, i, run.sampler)
        output, noise = made_up_model(z, t), uniform(f"noise{i}", *LATENTS).to(dtype)
        if run.sampler == "ddim":
            z = ddim_step(schedule, z, output, t, prev_t, run.eta, noise)
        elif run.sampler == "ddpm":
            z = ddpm_step(schedule, z, output, t, prev_t, noise)
        else:
            z0, _ = clean_and_noise(schedule, z, output, t)
            z, last = dpmpp_2m_step(schedule, z, z0, t, prev_t, last), (z0, t)
        out.append(z)
    return torch.stack(out)


def assert_follows(run: Run, theirs: torch.Tensor) -> None:
    """Within 1e-6 of the largest value in float32; in float64, where no rounding hides an error, within 1e-9.

    diffusers keeps DPM-Solver's sigmas in float32 in any case, hence the exception.
    """
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6 if run.sampler == "dpmpp_2m" else 1e-9)):
        error = (trajectory(run, dtype) - theirs).abs().max() / theirs.abs().max()
        assert error <= tolerance, f"{run.name} in {dtype}: off by {error:.1e}"


@each_group
def test_trajectories_equal_stored_reference(sampler, prediction, spacing):
    for run in runs(sampler, prediction, spacing):
        schedule = NoiseSchedule.from_json(run.schedule())
        assert sampling_timesteps(schedule, run.steps, sampler) == STORED[f"{run.name}/timesteps"].tolist()
        assert_follows(run, STORED[f"{run.name}/latents"])


@each_group
def test_trajectories_equal_diffusers(sampler, prediction, spacing):
    pytest.importorskip("diffusers", reason="diffusers is not installed: the stored references stand in for it")
    for run in runs(sampler, prediction, spacing):
        assert_follows(run, diffusers_trajectory(run))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_equal_diffusers_for_any_number_of_steps(sampler, spacing):
    """1 to 100 steps. Left out: trailing where T / steps lands on halves, which diffusers rounds by float noise,
    and 61 steps, for which it makes 62 (the last at -1)."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: the stored references stand in for it")
    left_out = (48, 61, 96) if spacing == "trailing" else ()
    for steps in set(range(1, 101)) - set(left_out):
        run = Run(sampler, "epsilon", spacing, 1, steps)
        ours = sampling_timesteps(NoiseSchedule.from_json(run.schedule()), steps, sampler)
        assert ours == diffusers_timesteps(run).tolist(), f"{steps} steps"
    for steps in left_out:
        ours = sampling_timesteps(NoiseSchedule(timestep_spacing="trailing"), steps, sampler)
        assert len(ours) == steps
        assert ours[0] == 999
        assert ours[-1] > 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_target_equal_reference(prediction):
    """diffusers' add_noise and get_velocity, in float64 and float32."""
    schedule = NoiseSchedule(prediction_type=prediction)
    z0, eps = (uniform(name, 4, 2, 3, 3) for name in ("z0", "eps"))
    expected = {key: STORED[f"{prediction}/{key}"] for key in ("noisy", "target")}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        args = schedule, z0.to(dtype), eps.to(dtype), TRAINING_TIMESTEPS
        for ours, key in ((add_noise(*args), "noisy"), (training_target(*args), "target")):
            torch.testing.assert_close(ours.double(), expected[key], atol=tolerance, rtol=0)


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied, to another device or precision, within the block."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return operation(*args, **(kwargs or {}))


def test_a_device_gets_its_table_once():
    """The meta device stands in for a GPU, where each copy from the host would wait, and break a CUDA graph."""
    schedule = NoiseSchedule(prediction_type="v_prediction")
    z0, eps = (torch.empty(2, 4, 3, 3, device="meta") for _ in range(2))
    counts = []
    for _ in range(2):
        with Copies() as copies:
            for function in (add_noise, training_target):
                assert function(schedule, z0, eps, torch.zeros(2, dtype=torch.long, device="meta")).is_meta
        counts.append(copies.count)
    assert counts == [1, 0]
    assert schedule.alphas_cumprod.device.type == "cpu"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_reference_is_what_diffusers_computes(prediction):
    pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to recompute the reference with")
    for key, value in diffusers_training_pairs(prediction).items():
        torch.testing.assert_close(STORED[key], value, atol=1e-12, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_read_back_gives_latents_and_noise(prediction):
    """clean_and_noise undoes add_noise and training_target, at every timestep."""
    schedule = NoiseSchedule(prediction_type=prediction)
    z0, eps = (uniform(name, 1, 2, 3, 3).double() for name in ("z0", "eps"))
    for t in (0, 500, 999):
        args = schedule, z0, eps, torch.tensor([t])
        clean, noise = clean_and_noise(schedule, add_noise(*args), training_target(*args), t)
        torch.testing.assert_close(clean, z0, atol=1e-6, rtol=0)
        torch.testing.assert_close(noise, eps, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_model_leads_back_to_the_image(sampler, prediction):
    """A model that always answers with the true target brings pure noise to z0, whatever the number of steps."""
    schedule = NoiseSchedule(prediction_type=prediction, set_alpha_to_one=True)
    z0, eps = (uniform(name, 1, 2, 3, 3).double() for name in ("z0", "eps"))
    timesteps = sampling_timesteps(schedule, 10, sampler)
    z, last = add_noise(schedule, z0, eps, torch.tensor([timesteps[0]])), None
    for i, t in enumerate(timesteps):
        output = training_target(schedule, z0, eps, torch.tensor([t]))
        prev_t = previous_timestep(schedule, timesteps, i, sampler)
        if sampler == "ddim":
            z = ddim_step(schedule, z, output, t, prev_t)
        else:
            clean, _ = clean_and_noise(schedule, z, output, t)
            z, last = dpmpp_2m_step(schedule, z, clean, t, prev_t, last), (clean, t)
    torch.testing.assert_close(z, z0, atol=1e-5, rtol=0)


def test_stable_diffusions_timesteps():
    """50 steps: 981 ... 1 with SD's own offset of 1, 980 ... 0 with the official inference script's 0."""
    assert sampling_timesteps(NoiseSchedule(steps_offset=1), 50) == list(range(981, 0, -20))
    assert sampling_timesteps(NoiseSchedule(steps_offset=0), 50) == list(range(980, -1, -20))


def test_the_official_last_step_is_an_identity():
    """Timestep 0 with the final alpha of timestep 0: nothing is left to remove."""
    schedule = NoiseSchedule()
    z, output = uniform("z", *LATENTS), uniform("output", *LATENTS)
    torch.testing.assert_close(ddim_step(schedule, z, output, 0, -20), z, atol=1e-6, rtol=0)


def test_alphas_by_hand():
    """scaled_linear runs linearly between the roots of the betas: the first alpha is 1 - 0.00085."""
    schedule = NoiseSchedule()
    assert schedule.alpha(0) == pytest.approx(1 - 0.00085, abs=1e-7)
    root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) / 999
    assert schedule.alpha(1) == pytest.approx((1 - 0.00085) * (1 - root**2), abs=1e-7)
    assert schedule.alpha(999) == pytest.approx(0.0046601, abs=1e-6)
    assert schedule.alpha(-20) == 1.0
    assert schedule.alpha(-20, final=0.5) == 0.5


def test_config_survives_a_round_trip():
    schedule = NoiseSchedule(prediction_type="v_prediction", steps_offset=1, timestep_spacing="trailing")
    again = NoiseSchedule.from_json(schedule.to_json())
    assert again.to_json() == schedule.to_json()
    torch.testing.assert_close(again.alphas_cumprod, schedule.alphas_cumprod, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholding": True}, "thresholding"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr needs prediction_type v_prediction"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatchEulerDiscreteScheduler'"),
        ({"_class_name": "LCMScheduler"}, "_class_name is 'LCMScheduler'"),
        ({"_class_name": {"a": 1}}, "_class_name is {'a': 1}"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas is .{60}: bas"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"final_sigmas_type": "none"}, "final_sigmas_type is 'none': expected one of zero, sigma_min"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start is 0.5"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
    ],
)
def test_a_schedule_bas_cannot_honour_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        NoiseSchedule.from_json(NoiseSchedule().to_json() | change)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers itself
@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"),
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"),
        *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("left_out", [(), ("beta_schedule",), ("beta_start", "beta_end"), ("timestep_spacing",)])
def test_missing_fields_have_the_defaults_of_their_class(name, left_out):
    """Against the class in diffusers. Those that do not know set_alpha_to_one end at a = 1, as DDIM from their file."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": True}
    config = {"_class_name": name} | {key: value for key, value in config.items() if key not in left_out}
    theirs, ours = getattr(diffusers, name).from_config(config), NoiseSchedule.from_json(config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, atol=0, rtol=0)
    assert ours.steps_offset == theirs.config.steps_offset == 0
    assert ours.set_alpha_to_one == getattr(theirs.config, "set_alpha_to_one", True)
    assert ours.timestep_spacing is None
    for sampler, other in (
        *(("ddim", "DDIM"), ("ddpm", "DDPM"), ("dpmpp_2m", "DPMSolverMultistep")),
        *(("euler", "EulerDiscrete"), ("euler_a", "EulerAncestralDiscrete")),
    ):
        sampled = getattr(diffusers, f"{other}Scheduler").from_config(theirs.config)
        assert used_spacing(ours, sampler) == sampled.config.timestep_spacing


def test_samplers_by_noise_see_some_signal_everywhere():
    """2^-24 of it at the end, as in diffusers; between timesteps Euler's noise is linear, Karras' logarithm is."""
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert seen_by(schedule, "ddim") is seen_by(schedule, "ddpm") is schedule

    def sigma(a: float) -> float:
        return ((1 - a) / a) ** 0.5

    ends = [sigma(schedule.alpha(t)) for t in (500, 501)]
    for sampler, expected in (("euler", sum(ends) / 2), ("dpmpp_2m_karras", (ends[0] * ends[1]) ** 0.5)):
        seen = seen_by(schedule, sampler)
        assert (seen.alpha(999), seen.alpha(500), seen.alpha(-1)) == (2.0**-24, schedule.alpha(500), 1.0)
        assert sigma(seen.alpha(500.5)) == pytest.approx(expected, rel=1e-12)


def test_a_schedule_without_signal_at_its_end_is_that_of_diffusers():
    """rescale_betas_zero_snr: the whole table, and a run of each sampler, which starts from a_t = 0."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
    schedule = NoiseSchedule.from_json(config)
    theirs = diffusers.DDIMScheduler.from_config(config | {"clip_sample": False})
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, atol=0, rtol=0)
    assert schedule.alpha(999) == 0
    assert NoiseSchedule.from_json(schedule.to_json()) == schedule
    theirs.set_timesteps(5)
    timesteps = sampling_timesteps(schedule, 5)
    assert timesteps == theirs.timesteps.tolist() == [999, 799, 599, 399, 199]
    z = expected = uniform("z", *LATENTS)
    for i, t in enumerate(timesteps):
        output = uniform(f"output {i}", *LATENTS)
        z = ddim_step(schedule, z, output, t, previous_timestep(schedule, timesteps, i))
        expected = theirs.step(output, t, expected).prev_sample
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=0)
    solver = diffusers.DPMSolverMultistepScheduler.from_config(config)
    solver.set_timesteps(5)
    timesteps, z, last = sampling_timesteps(schedule, 5, "dpmpp_2m"), uniform("z", *LATENTS), None
    assert timesteps == solver.timesteps.tolist()
    expected = z
    for i, t in enumerate(timesteps):
        output = uniform(f"output {i}", *LATENTS)
        z0, _ = clean_and_noise(schedule, z, output, t)
        z, last = (
            dpmpp_2m_step(schedule, z, z0, t, previous_timestep(schedule, timesteps, i, "dpmpp_2m"), last),
            (z0, t),
        )
        expected = solver.step(output, t, expected).prev_sample
    torch.testing.assert_close(z, expected, atol=2e-3, rtol=0)  # diffusers also scales the noise there by 2^-12


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_another_spacing_of_steps_is_named_once(name, caplog):
    schedulers._warn_once.cache_clear()
    for _ in range(2):
        NoiseSchedule.from_json({"_class_name": "DPMSolverMultistepScheduler", name: True})
    own = "--sampler dpmpp_2m_karras has it" if "karras" in name else "bas spaces denoising steps evenly in time"
    message = f"scheduler {name} is not used: {own}"
    assert [record.message for record in caplog.records] == [message]


@pytest.mark.parametrize(("name", "value"), [("algorithm_type", "sde-dpmsolver++"), ("solver_order", 3)])
def test_settings_of_other_solvers_are_said_to_be_unused_and_bas_s_own_are_not(name, value, caplog):
    schedulers._warn_once.cache_clear()
    own = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2}
    NoiseSchedule.from_json(own)
    assert caplog.messages == []
    NoiseSchedule.from_json(own | {name: value})
    assert caplog.messages == [f"scheduler {name} {value!r} is not used: --sampler says how images are denoised"]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 5, 14, 15, 20])
def test_the_last_step_ends_where_the_file_says(steps, spacing):
    """sigma_min: at the noise of timestep 0; the step is of first order in runs of fewer than 15, as in diffusers."""
    config = NoiseSchedule(timestep_spacing=spacing, final_sigmas_type="sigma_min").to_json()
    schedule = NoiseSchedule.from_json(config)
    solver = diffusers.DPMSolverMultistepScheduler.from_config(config)
    solver.set_timesteps(steps)
    timesteps, last = sampling_timesteps(schedule, steps, "dpmpp_2m"), None
    assert timesteps == solver.timesteps.tolist()
    z = z0 = expected = uniform("z", *LATENTS)
    for i, t in enumerate(timesteps):
        prev_t = previous_timestep(schedule, timesteps, i, "dpmpp_2m")
        z0, _ = clean_and_noise(schedule, z, made_up_model(z, t), t)
        z, last = dpmpp_2m_step(schedule, z, z0, t, prev_t, earlier_step(last, prev_t, steps)), (z0, t)
        expected = solver.step(made_up_model(expected, t), t, expected).prev_sample
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(z, z0)


@pytest.mark.parametrize(("name", "sampler"), [("Euler", "euler"), ("EulerAncestral", "euler_a")])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_euler_ends_where_the_file_says(name, sampler, end):
    """sigma_min: at the noise of timestep 0. diffusers' ancestral sampler ends without noise in any case."""
    schedule = NoiseSchedule(timestep_spacing="trailing", final_sigmas_type=end)
    theirs = getattr(diffusers, f"{name}DiscreteScheduler").from_config(schedule.to_json())
    theirs.set_timesteps(5)
    least = ((1 - schedule.alpha(0)) / schedule.alpha(0)) ** 0.5
    assert theirs.sigmas[-1].item() == pytest.approx(least if (sampler, end) == ("euler", "sigma_min") else 0)
    seen = seen_by(schedule, sampler)
    t, clean, noise = sampling_timesteps(seen, 5, sampler)[-1], uniform("z", *LATENTS), uniform("noise", *LATENTS)
    a = seen.alpha(t)
    z = a**0.5 * clean + (1 - a) ** 0.5 * noise  # of a perfect model
    found = ddim_step(seen, z, noise, t, -1, EULER[sampler], noise)
    torch.testing.assert_close(found, (clean + theirs.sigmas[-1] * noise) / (1 + theirs.sigmas[-1] ** 2) ** 0.5)


@pytest.mark.parametrize("steps", [5, 10, 30, 50])
def test_a_random_step_from_no_signal_at_all_is_real(steps):
    """With eta 1 what the noise leaves of a step is 0, never the root of a rounding error below it."""
    schedule = NoiseSchedule(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True
    )
    t = sampling_timesteps(schedule, steps)[0]
    prev_t = previous_timestep(schedule, [t] * steps, 0)
    z, noise = uniform("z", *LATENTS), uniform("noise", *LATENTS)
    found, a = ddim_step(schedule, z, z, t, prev_t, 1.0, noise), schedule.alpha(prev_t)
    assert schedule.alpha(t) == 0
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, -(a**0.5) * z + (1 - a) ** 0.5 * noise)


@pytest.mark.parametrize(("steps", "sampler"), [(0, "ddim"), (1001, "ddim"), (1000, "dpmpp_2m")])
def test_more_steps_than_the_model_knows_are_refused(steps, sampler):
    with pytest.raises(InputError, match="denoising steps"):
        sampling_timesteps(NoiseSchedule(), steps, sampler)


@pytest.mark.parametrize(("steps", "sampler", "offset"), [(50, "ddim", 40), (999, "dpmpp_2m", 1)])
def test_a_timestep_twice_is_refused(steps, sampler, offset):
    """Of an offset that pushes evenly spaced timesteps beyond the last: a step from a timestep to itself divides 0."""
    with pytest.raises(InputError, match=f"shifted by {offset}, go beyond the 1000 timesteps"):
        sampling_timesteps(NoiseSchedule(steps_offset=offset, timestep_spacing="leading"), steps, sampler)
