"""The rows of the bench: what each measures, on which sides, and its goal."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_bas import BasSide, Mode, chosen_modes, mode_named
from bench_clock import child, interleave, run_command
from bench_fidelity import Reference, fidelity, official_gradients
from bench_material import Material
from bench_table import Line, Stat, share, speedup
from diffusers import DDIMScheduler
from official_loop import OfficialLoop, open_pipeline, read_scene

from bas.checkpoint import load
from bas.config import SampleConfig
from bas.sample import latent_shape, sample, standard_normal

STEPS = 400  # of each phase, by default on both sides
PROMPT = "a photo of a creature at the beach"

# Goals and, in brackets, stretch goals: (row, device, a word of the mode or "") -> text. The first match counts.
GOALS = {
    ("phase-1 step", "cuda", "exact"): "5x (7x)",
    ("phase-1 step", "cuda", "bf16"): "8x (11x)",
    ("phase-1 step", "cpu", "exact"): "",
    ("phase-1 step", "cpu", ""): "3x (3.5x)",
    ("phase-2 step", "cuda", "bf16"): "4.5x (6x)",
    ("phase-2 step", "cpu", "fp32"): "1.3x (1.5x)",
    ("phase-2 step", "cpu", "bf16"): "2.3x (3x)",
    ("400 + 400 steps", "cuda", "bf16"): "5x (7.5x), 15 s on an H200",
    ("start-up", "cuda", ""): "3 s (1 s)",
    ("peak memory, phase 1", "cuda", ""): "0.30x (0.21x)",
    ("peak memory, phase 2", "cuda", ""): "0.62x (0.53x)",
    ("class images", "cuda", ""): "1.1x (1.3x) of compiled",
    ("one image", "cuda", ""): "0.40 s (0.30 s)",
    ("8 concepts against 1", "cuda", ""): "1.03x (1.01x)",
    ("command", "cuda", "cold"): "2.7x (5x)",
    ("command", "cuda", "warm"): "4.5x (6.5x)",
    ("import", "", ""): "2.3x (torch + 0.2 s)",
    ("load to bf16, time", "", ""): "2x (3x)",
    ("load to bf16, memory", "", ""): "0.40x (0.36x)",
}


def goal(row: str, device: str, mode: str) -> str:
    """The goal of a row, or an empty text."""
    found = (
        text
        for (name, where, word), text in GOALS.items()
        if row.startswith(name) and where in ("", device) and word in f"{mode} {row}"
    )
    return next(found, "")


def line(setting, row: str, mode: str = "", **values) -> Line:
    """A line of the table with its goal."""
    return Line(row, setting.name, mode, goal=goal(row, setting.device, mode), **values)


# --- Training steps -----------------------------------------------------------------------------------------------


def steps(bench, setting, _lines) -> list[Line]:
    """Both phases' steps: the official loop, its compiled form and every mode of bas by turns, and their fidelity."""
    found = []
    for phase in (1, 2):
        material, modes = bench.material(setting), chosen_modes(setting.device, phase, bench.quick, bench.compile)
        reference = official_gradients(material, phase)
        # On a GPU one mode at a time stands beside the official side: all together would not fit.
        for group in [[mode] for mode in modes] if setting.device == "cuda" else [modes]:
            found += step_lines(bench, setting, material, reference, group, phase)
    return found


def step_lines(bench, setting, material: Material, reference: Reference, modes: list[Mode], phase: int) -> list[Line]:
    """The lines of some modes that take turns with both forms of the official loop."""
    loop = OfficialLoop(Path(material.model), list(material.words), material.device)
    loop.begin(phase)
    official = loop.stepper(read_scene(Path(material.scene), Path(material.class_images)))
    sides = {mode.name: BasSide(material, mode, phase, bench.fresh("run")) for mode in modes}
    calls: dict[str, Callable] = {"official": official}
    if bench.compile:
        calls["compiled"] = with_compiled_unet(loop, official)
    calls |= {name: side.step for name, side in sides.items()}
    seconds = {name: Stat.of(v) for name, v in interleave(calls, setting.device, bench.rounds, bench.budget).items()}
    for side in sides.values():
        side.close()
    return [
        line(
            setting,
            f"phase-{phase} step",
            mode.name,
            official=seconds["official"],
            compiled=seconds.get("compiled"),
            bas=seconds[mode.name],
            ratio=speedup(seconds["official"], seconds[mode.name]),
            fidelity=fidelity(reference, material, mode, phase, bench.fresh("run")),
        )
        for mode in modes
    ]


def with_compiled_unet(loop: OfficialLoop, step: Callable) -> Callable:
    """The same loop and optimizer with the compiled UNet in place for the length of a step."""
    compiled = torch.compile(loop.unet)

    def call():
        loop.predict = compiled
        step()
        loop.predict = loop.unet

    return call


def memory(bench, setting, _lines) -> list[Line]:
    """Peak memory of each phase, and what the first step takes beyond a steady one: each in a process of its own."""
    found = []
    for phase in (1, 2):
        material = bench.material(setting)
        task = {"task": "steps", "material": material.to_json(), "phase": phase, "count": 2 if bench.quick else 3}

        def run(side: str, material=material, task=task, **values) -> dict:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(bench.fresh("inductor"))}  # an empty one: a cold start
            told = child(task | {"side": side, "run": str(bench.fresh("run")), **values}, bench.threads, cache)
            return {
                "peak": Stat.of([told["peak"] / 1e9]),
                "start": Stat.of([told["first"] - Stat.of(told["later"]).median]),
            }

        official = run("official", compiled=False)
        compiled = run("official", compiled=True) if bench.compile else {}
        for mode in chosen_modes(setting.device, phase, bench.quick, bench.compile):
            ours = run("bas", mode=mode.name)
            for row, key, unit in (
                (f"peak memory, phase {phase}", "peak", "GB"),
                (f"start-up, phase {phase}", "start", "s"),
            ):
                ratio = share(official[key], ours[key]) if key == "peak" else None
                sides = {"official": official[key], "compiled": compiled.get(key), "bas": ours[key]}
                found.append(line(setting, row, mode.name, unit=unit, ratio=ratio, **sides))
    return found


def job(_bench, setting, lines: list[Line]) -> list[Line]:
    """400 + 400 steps, counted from the medians of the lines above."""
    found, phases = (
        [],
        [
            {
                other.mode: other
                for other in lines
                if other.setting == setting.name and other.row == f"phase-{phase} step"
            }
            for phase in (1, 2)
        ],
    )
    for mode in phases[0].keys() & phases[1].keys():
        both = [phase[mode] for phase in phases]
        if not all(other.bas for other in both):
            continue
        total = {}
        for side in ("official", "compiled", "bas"):
            stats = [getattr(other, side) for other in both]
            if all(stats):
                total[side] = Stat.of([STEPS * sum(stat.median for stat in stats)])
        ratio = speedup(total["official"], total["bas"])
        note = "counted from the medians of both steps"
        found.append(line(setting, "400 + 400 steps", mode, ratio=ratio, note=note, **total))
    return sorted(found, key=lambda row: row.mode)


# --- Pictures -----------------------------------------------------------------------------------------------------


def pictures(bench, setting, _lines) -> list[Line]:
    """One picture, and class images in batches: diffusers' pipeline, with its UNet compiled, and bas by turns."""
    cuda, folder = setting.device == "cuda", bench.model(setting.model)
    count = 2 if bench.quick else 50
    pipeline = open_pipeline(folder, setting.device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    plain = pipeline.unet
    compiled = torch.compile(plain) if bench.compile else None
    types = {"bf16": torch.bfloat16} if cuda else {"fp32": torch.float32, "bf16": torch.bfloat16}
    ours = {name: load(folder, device=setting.device, dtype=dtype) for name, dtype in types.items()}

    def theirs(unet, config: SampleConfig):
        shape = latent_shape(ours[next(iter(ours))], config)
        noise = [torch.Generator().manual_seed(config.seed + i) for i in range(config.num_images)]
        pipeline.unet = unet
        return pipeline(
            [PROMPT] * config.num_images,
            height=config.height,
            width=config.width,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            latents=standard_normal(shape, noise).to(setting.device, plain.dtype),
        ).images

    found = []
    for title, batch, many in [
        ("one image", 1, count),
        *(("class images", b, 50 if cuda else 2 if bench.quick else 5) for b in batches(bench, cuda)),
    ]:
        config = SampleConfig(
            num_inference_steps=many, num_images=batch, batch_size=batch, height=bench.side, width=bench.side
        )
        calls = {"official": lambda config=config: theirs(plain, config)}
        if compiled:
            calls["compiled"] = lambda config=config: theirs(compiled, config)
        calls |= {name: (lambda m=models, config=config: sample(m, PROMPT, config)) for name, models in ours.items()}
        seconds = interleave(calls, setting.device, bench.rounds, bench.budget)
        wanted = calls["official"]()
        for name, models in ours.items():
            stats = {
                side: Stat.of([x / batch for x in seconds[side]]) for side in ("official", "compiled") if side in calls
            }
            stats["bas"] = Stat.of([x / batch for x in seconds[name]])
            rival = stats.get("compiled", stats["official"]) if title == "class images" else stats["official"]
            row = f"{title}, {many} steps" + (f", {batch} at once" if title == "class images" else "")
            off = {"picture levels of 255": picture_error(sample(models, PROMPT, config), wanted)}
            found.append(
                line(setting, row, name, unit="s an image", ratio=speedup(rival, stats["bas"]), fidelity=off, **stats)
            )
    return found


def batches(bench, cuda: bool) -> tuple[int, ...]:
    """How many class images at once: the best one is the row's figure."""
    return (4, 16, 32) if cuda else (2,) if bench.quick else (1, 4)


def picture_error(ours: list, theirs: list) -> float:
    """Mean absolute difference of 8-bit pictures, in levels."""
    pairs = [(np.asarray(a, dtype=float), np.asarray(b, dtype=float)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


# --- Scaling ------------------------------------------------------------------------------------------------------


def scaling(bench, setting, _lines) -> list[Line]:
    """bas's step with 8 concepts against 1, and at other sizes; the official code has one size."""
    mode, found = mode_named("bf16" if setting.device == "cuda" else "fp32"), []
    for row, phase, key, values, base in (
        ("8 concepts against 1", 1, "concepts", (1, 8), 1),
        ("resolution", 2, "side", (256, 512, 768), 512),
    ):
        sides = {
            value: BasSide(bench.material(setting, **{key: value}), mode, phase, bench.fresh("run")) for value in values
        }
        calls = {value: side.step for value, side in sides.items()}
        stats = {v: Stat.of(x) for v, x in interleave(calls, setting.device, bench.rounds, bench.budget).items()}
        for side in sides.values():
            side.close()
        for value in values:
            if value != base:
                name = row if key == "concepts" else f"{row} {value} against {base}, phase 2"
                ratio, note = share(stats[base], stats[value]), f"against {stats[base].median:.3g} s"
                found.append(line(setting, name, mode.name, bas=stats[value], ratio=ratio, note=note))
    return found


# --- Processes ----------------------------------------------------------------------------------------------------


def imports(bench, setting, _lines) -> list[Line]:
    """Importing bas's functions against importing diffusers' pipeline; PyTorch alone beside them."""
    found: dict[str, list[float]] = {"bas": [], "torch": [], "diffusers": []}
    for i in range(1 + bench.rounds):
        for side, seconds in found.items():
            told = child({"task": "imports", "side": side}, bench.threads)["seconds"]
            if i:  # the first round only fills the disk's cache
                seconds.append(told)
    stats = {side: Stat.of(seconds) for side, seconds in found.items()}
    ratio, note = speedup(stats["diffusers"], stats["bas"]), f"torch alone {stats['torch'].median:.2f} s"
    return [line(setting, "import", official=stats["diffusers"], bas=stats["bas"], ratio=ratio, note=note)]


def loading(bench, setting, _lines) -> list[Line]:
    """From a folder of float32 weights to a model in bf16: time without, memory with the imports."""
    task = {"task": "loading", "model": str(bench.model(setting.model)), "device": setting.device}
    found: dict[str, list[dict]] = {"diffusers": [], "bas": []}
    for i in range(1 + bench.rounds):
        for side, runs in found.items():
            told = child(task | {"side": side}, bench.threads)
            if i:
                runs.append(told)
    lines = []
    for row, key, unit, scale, ratio in (
        ("load to bf16, time", "seconds", "s", 1, speedup),
        ("load to bf16, memory", "peak", "GB", 1e9, share),
    ):
        theirs, ours = (Stat.of([run[key] / scale for run in found[side]]) for side in ("diffusers", "bas"))
        lines.append(line(setting, row, unit=unit, official=theirs, bas=ours, ratio=ratio(theirs, ours)))
    return lines


def commands(bench, setting, _lines) -> list[Line]:
    """From the command to the saved concepts and one image of them: cold without class images, warm with them."""
    material, cuda = bench.material(setting), setting.device == "cuda"
    count, images = (STEPS, 100) if cuda else (4, 2)
    numbers = ["--phase1_train_steps", count, "--phase2_train_steps", count, "--num_class_images", images]
    common = [*map(str, numbers), "--initializer_tokens", *material.words, "--device", setting.device]
    prompt = ["--prompt", "a photo of <asset0> at the beach", "--num_inference_steps", str(50 if cuda else 10)]
    loop, cache = str(Path(__file__).with_name("official_loop.py")), bench.fresh("cache")
    environment = {"BAS_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(bench.fresh("inductor"))}
    found = []
    for state in ("cold", "warm"):
        theirs, ours = bench.fresh("run"), bench.fresh("run")
        folders = ["--weights", material.model, "--output_dir"]
        programs = {
            "official": (
                [loop, "train", material.scene, *folders, theirs, "--class_data_dir", cache / "official", *common],
                [
                    loop,
                    "sample",
                    theirs,
                    *prompt,
                    "--output",
                    bench.fresh("picture").with_suffix(".png"),
                    "--device",
                    setting.device,
                ],
            ),
            "bas": (
                ["-m", "bas", "train", material.scene, *folders, ours, *common],
                [
                    "-m",
                    "bas",
                    "sample",
                    ours,
                    *prompt,
                    "--output_dir",
                    bench.fresh("pictures"),
                    "--device",
                    setting.device,
                ],
            ),
        }
        stats = {
            side: Stat.of(
                [sum(run_command([sys.executable, *map(str, c)], bench.threads, environment)[0] for c in both)]
            )
            for side, both in programs.items()
        }
        note = f"{images} class images, {count} + {count} steps, one picture"
        row = f"command to concepts and one image, {state}"
        found.append(line(setting, row, note=note, ratio=speedup(stats["official"], stats["bas"]), **stats))
    return found


def scenes(_bench, setting, _lines) -> list[Line]:
    """Scenes per hour."""
    return unmeasured(setting, "scenes", "no bench of many scenes yet")


MEASURES = {
    "imports": imports,
    "steps": steps,
    "memory": memory,
    "job": job,
    "pictures": pictures,
    "scaling": scaling,
    "loading": loading,
    "commands": commands,
    "scenes": scenes,
}

# What stands in the table for a group that was not measured.
NAMES = {
    "imports": ("import",),
    "steps": ("phase-1 step", "phase-1 step, exact", "phase-2 step"),
    "memory": ("peak memory, phase 1", "peak memory, phase 2", "start-up"),
    "job": ("400 + 400 steps",),
    "pictures": ("one image, 50 steps", "class images"),
    "scaling": ("8 concepts against 1", "resolution"),
    "loading": ("load to bf16, time", "load to bf16, memory"),
    "commands": ("command to concepts and one image, cold", "command to concepts and one image, warm"),
    "scenes": ("scenes per hour",),
}


def unmeasured(setting, group: str, reason: str) -> list[Line]:
    """The lines of a group that this run leaves out, and why."""
    mode = "bf16" if setting.device == "cuda" else ""
    return [line(setting, row, mode if "step" in row else "", note=reason) for row in NAMES[group]]
