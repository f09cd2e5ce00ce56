"""Rows of the bench about training: steps, memory, start-up, scaling; and which function measures which group."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from tools.bench.bas_side import BasSide, Mode, chosen_modes, mode_named
from tools.bench.clock import child, interleave, optimizer_seconds
from tools.bench.fidelity import Reference, fidelity, official_gradients
from tools.bench.goals import failure, line
from tools.bench.images import images
from tools.bench.material import Material
from tools.bench.official_loop import OfficialLoop, read_scene
from tools.bench.programs import STEPS, commands, imports, loading, scenes
from tools.bench.table import Line, Stat, share, speedup

# --- Training steps -----------------------------------------------------------------------------------------------


def steps(bench, setting, _lines) -> Iterator[Line]:
    """Both phases' steps: the official loop, its compiled form and every mode of bas in turns, and their fidelity."""
    for phase in (1, 2):
        material, modes = bench.material(setting), chosen_modes(setting.device, phase, bench.quick, bench.compile)
        reference = official_gradients(material, phase)
        # On a GPU one mode at a time stands beside the official side: all together would not fit.
        for group in [[mode] for mode in modes] if setting.device == "cuda" else [modes]:
            yield from tried_step_lines(bench, setting, material, reference, group, phase)


def tried_step_lines(
    bench, setting, material: Material, reference: Reference, modes: list[Mode], phase: int
) -> list[Line]:
    """The lines of `step_lines`. When that fails, those of each mode by itself, and why one fails even then."""
    try:
        return step_lines(bench, setting, material, reference, modes, phase)
    except Exception as error:
        reason = failure(error)
    gc.collect()  # a side that failed holds its error, whose traceback holds the side
    if len(modes) == 1:
        return [line(setting, f"phase-{phase} step", modes[0].name, note=reason)]
    return [found for mode in modes for found in tried_step_lines(bench, setting, material, reference, [mode], phase)]


def step_lines(bench, setting, material: Material, reference: Reference, modes: list[Mode], phase: int) -> list[Line]:
    """The lines of some modes that take turns with both forms of the official loop."""
    loop = OfficialLoop(Path(material.model), list(material.words), material.device)
    loop.begin(phase)
    official = loop.stepper(read_scene(Path(material.scene), Path(material.class_images)))
    calls: dict[str, Callable] = {"official": official}
    if bench.compile:
        calls["compiled"] = with_compiled_unet(loop, official)
    with ExitStack() as sides:
        for mode in modes:
            calls[mode.name] = sides.enter_context(closing(BasSide(material, mode, phase, bench.fresh("run")))).step
        found = interleave(calls, setting.device, bench.rounds, bench.budget)
    seconds = {name: Stat.of(values) for name, values in found.items()}
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


def memory(bench, setting, _lines) -> Iterator[Line]:
    """Peak memory of each phase, and what the first step takes beyond a steady one: each in a process of its own."""
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
            rows = (f"peak memory, phase {phase}", "peak", "GB"), (f"start-up, phase {phase}", "start", "s")
            try:
                ours = run("bas", mode=mode.name)
            except Exception as error:
                yield from (line(setting, row, mode.name, note=failure(error)) for row, *_ in rows)
                continue
            for row, key, unit in rows:
                ratio = share(official[key], ours[key]) if key == "peak" else None
                sides = {"official": official[key], "compiled": compiled.get(key), "bas": ours[key]}
                yield line(setting, row, mode.name, unit=unit, ratio=ratio, **sides)


def job(_bench, setting, lines: list[Line]) -> Iterator[Line]:
    """400 + 400 steps, counted from the medians of the lines above; or why a mode has none."""
    first, second = (
        {other.mode: other for other in lines if other.setting == setting.name and other.row == f"phase-{phase} step"}
        for phase in (1, 2)
    )
    for mode in (mode for mode in second if mode in first):
        if not (first[mode].bas and second[mode].bas):
            yield line(setting, "400 + 400 steps", mode, note=first[mode].note or second[mode].note)
            continue
        total = {}
        for side in ("official", "compiled", "bas"):
            both = getattr(first[mode], side), getattr(second[mode], side)
            if all(both):
                total[side] = Stat.of([STEPS * sum(stat.median for stat in both)])
        ratio = speedup(total["official"], total["bas"])
        yield line(setting, "400 + 400 steps", mode, ratio=ratio, note="counted from the steps' medians", **total)


# --- Scaling ------------------------------------------------------------------------------------------------------


def scaling(bench, setting, _lines) -> Iterator[Line]:
    """bas's step with 8 concepts against 1, and at other sizes; the official code has one size."""
    mode = mode_named("bf16" if setting.device == "cuda" else "fp32")
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
                yield line(setting, name, mode.name, bas=stats[value], ratio=ratio, note=note)


def adapters(bench, setting, _lines) -> Iterator[Line]:
    """A LoRA step of rank 16 against a full step of phase 2 without the time of its optimizer."""
    mode = mode_named("bf16" if setting.device == "cuda" else "fp32")
    lora, material = Mode("lora", mode.flags | {"train": "lora"}), bench.material(setting)
    with ExitStack() as sides, optimizer_seconds(setting.device) as spent:
        calls = {
            each.name: sides.enter_context(closing(BasSide(material, each, 2, bench.fresh("run")))).step
            for each in (mode, lora)
        }
        found = interleave(calls, setting.device, bench.rounds, bench.budget)
    optimizer = Stat.of(spent[max(spent)]).median  # that of all weights
    rest, ours = Stat.of([seconds - optimizer for seconds in found[mode.name]]), Stat.of(found["lora"])
    ratio, note = share(rest, ours), f"against {rest.median:.3g} s"
    yield line(
        setting, "LoRA step against a full one without its optimizer", mode.name, bas=ours, ratio=ratio, note=note
    )


MEASURES = {
    "imports": imports,
    "steps": steps,
    "memory": memory,
    "job": job,
    "images": images,
    "scaling": scaling,
    "adapters": adapters,
    "loading": loading,
    "commands": commands,
    "scenes": scenes,
}
