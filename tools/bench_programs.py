"""Rows of the bench that start programs: imports, loading, and whole commands from a scene to a picture."""

import sys
from collections.abc import Iterator
from pathlib import Path

from bench_clock import child, run_command
from bench_goals import line
from bench_table import Line, Stat, share, speedup

STEPS, CLASS_IMAGES = 400, 100  # of a whole job on a GPU, as both sides have them by default
SHORT_STEPS, SHORT_CLASS_IMAGES = 4, 2  # on a CPU


def imports(bench, setting, _lines) -> Iterator[Line]:
    """Importing bas's functions against importing diffusers' pipeline; PyTorch alone beside them."""
    found: dict[str, list[float]] = {"bas": [], "torch": [], "diffusers": []}
    for i in range(1 + bench.rounds):
        for side, seconds in found.items():
            told = child({"task": "imports", "side": side}, bench.threads)["seconds"]
            if i:  # the first round only fills the disk's cache
                seconds.append(told)
    stats = {side: Stat.of(seconds) for side, seconds in found.items()}
    ratio, note = speedup(stats["diffusers"], stats["bas"]), f"torch alone {stats['torch'].median:.2f} s"
    yield line(setting, "import", official=stats["diffusers"], bas=stats["bas"], ratio=ratio, note=note)


def loading(bench, setting, _lines) -> Iterator[Line]:
    """From a folder of float32 weights to a model in bf16: time without, memory with the imports."""
    task = {"task": "loading", "model": str(bench.model(setting.model)), "device": setting.device}
    found: dict[str, list[dict]] = {"diffusers": [], "bas": []}
    for i in range(1 + bench.rounds):
        for side, runs in found.items():
            told = child(task | {"side": side}, bench.threads)
            if i:
                runs.append(told)
    for row, key, unit, scale, ratio in (
        ("load to bf16, time", "seconds", "s", 1, speedup),
        ("load to bf16, memory", "peak", "GB", 1e9, share),
    ):
        theirs, ours = (Stat.of([run[key] / scale for run in found[side]]) for side in ("diffusers", "bas"))
        yield line(setting, row, unit=unit, official=theirs, bas=ours, ratio=ratio(theirs, ours))


def commands(bench, setting, _lines) -> Iterator[Line]:
    """From the command to the saved concepts and one image of them: cold without class images, warm with them."""
    material, cuda = bench.material(setting), setting.device == "cuda"
    count, images = (STEPS, CLASS_IMAGES) if cuda else (SHORT_STEPS, SHORT_CLASS_IMAGES)
    cache, device = bench.fresh("cache"), ["--device", setting.device]
    steps = ["--phase1_train_steps", count, "--phase2_train_steps", count, "--num_class_images", images]
    training = ["train", material.scene, "--weights", material.model, *steps, *device]
    training += ["--initializer_tokens", *material.words]
    sampling = ["--num_inference_steps", 50 if cuda else 10, "--prompt", "a photo of <asset0> at the beach", *device]
    environment = {"BAS_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(bench.fresh("inductor"))}
    # program, its flag for the folder of class images (bas has its cache), its flag for the picture
    sides = {
        "official": (
            [Path(__file__).with_name("official_loop.py")],
            ["--class_data_dir", cache / "official"],
            "--output",
        ),
        "bas": (["-m", "bas"], [], "--output_path"),
    }
    for state in ("cold", "warm"):
        stats = {}
        for side, (program, class_images, output) in sides.items():
            run, picture = bench.fresh("run"), bench.fresh("picture").with_suffix(".png")
            both = (
                [*program, *training, *class_images, "--output_dir", run],
                [*program, "sample", run, *sampling, output, picture],
            )
            commands = ([sys.executable, *map(str, command)] for command in both)
            seconds = [run_command(command, bench.threads, environment)[0] for command in commands]
            stats[side] = Stat.of([sum(seconds)])
        row = f"command to concepts and one image, {state}"
        note = f"{images} class images, {count} + {count} steps"
        yield line(setting, row, note=note, ratio=speedup(stats["official"], stats["bas"]), **stats)
