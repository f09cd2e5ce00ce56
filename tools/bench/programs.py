"""Rows of the bench that start programs: imports, loading, whole commands from a scene to an image, many scenes."""

import sys
from collections.abc import Iterator

from tools.bench.clock import child, run_command
from tools.bench.goals import line
from tools.bench.material import WORDS, make_class_images, make_scene, write_adapters
from tools.bench.table import Line, Stat, share, speedup

STEPS, CLASS_IMAGES = 400, 100  # of a whole job on a GPU, as both sides have them by default
SHORT_STEPS, SHORT_CLASS_IMAGES = 4, 2  # on a CPU
PROGRAMS = {"official": ["-m", "tools.bench.official_loop"], "bas": ["-m", "bas"]}  # by side


def run_program(side: str, words: list, bench, environment: dict[str, str]) -> float:
    """Seconds of a command of one side, from the start of its process to the end."""
    return run_command([sys.executable, *PROGRAMS[side], *map(str, words)], bench.threads, environment)[0]


def training_flags(bench, setting, count: int, images: int) -> list:
    """What both sides are told of a training: `count` steps in each phase, `images` class images."""
    steps = ["--phase1_train_steps", count, "--phase2_train_steps", count, "--num_class_images", images]
    return ["--weights", bench.model(setting.model), *steps, "--initializer_tokens", *WORDS, "--device", setting.device]


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
    model = bench.model(setting.model)
    lora = write_adapters(model, bench.fresh("lora").with_suffix(".safetensors"))
    task = {"task": "loading", "model": str(model), "device": setting.device}
    tasks = {"diffusers": {"side": "diffusers"}, "bas": {"side": "bas"}, "lora": {"side": "bas", "lora": str(lora)}}
    found: dict[str, list[dict]] = {side: [] for side in tasks}
    for i in range(1 + bench.rounds):
        for side, runs in found.items():
            told = child(task | tasks[side], bench.threads)
            if i:
                runs.append(told)
    for row, key, unit, scale, ratio in (
        ("load to bf16, time", "seconds", "s", 1, speedup),
        ("load to bf16, memory", "peak", "GB", 1e9, share),
    ):
        theirs, ours = (Stat.of([run[key] / scale for run in found[side]]) for side in ("diffusers", "bas"))
        yield line(setting, row, unit=unit, official=theirs, bas=ours, ratio=ratio(theirs, ours))
    alone, both = (Stat.of([run["peak"] / 1e9 for run in found[side]]) for side in ("bas", "lora"))
    note = f"against {alone.median:.3g} GB without"
    yield line(setting, "load a base and a LoRA, memory", unit="GB", bas=both, ratio=share(alone, both), note=note)


def commands(bench, setting, _lines) -> Iterator[Line]:
    """From the command to the saved concepts and one image of them: cold without class images, warm with them."""
    material, cuda = bench.material(setting), setting.device == "cuda"
    count, images = (STEPS, CLASS_IMAGES) if cuda else (SHORT_STEPS, SHORT_CLASS_IMAGES)
    cache, device = bench.fresh("cache"), ["--device", setting.device]
    training = ["train", material.scene, *training_flags(bench, setting, count, images)]
    sampling = ["--num_inference_steps", 50 if cuda else 10, "--prompt", "a photo of <asset0> at the beach", *device]
    environment = {"BAS_CACHE": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(bench.fresh("inductor"))}
    # its flag for the folder of class images (bas has its cache), its flag for the image
    sides = {"official": (["--class_data_dir", cache / "official"], "--output"), "bas": ([], "--output_path")}
    for state in ("cold", "warm"):
        stats = {}
        for side, (class_images, output) in sides.items():
            run, image = bench.fresh("run"), bench.fresh("image").with_suffix(".png")
            both = [*training, *class_images, "--output_dir", run], ["sample", run, *sampling, output, image]
            stats[side] = Stat.of([sum(run_program(side, words, bench, environment) for words in both)])
        row = f"command to concepts and one image, {state}"
        note = f"{images} class images, {count} + {count} steps"
        yield line(setting, row, note=note, ratio=speedup(stats["official"], stats["bas"]), **stats)


def scenes(bench, setting, _lines) -> Iterator[Line]:
    """Scenes per hour: the official program once for each scene, bas once for all. Class images are there already."""
    cuda, folder = setting.device == "cuda", bench.fresh("scenes")
    many, count, images = (4, STEPS, CLASS_IMAGES) if cuda else (3, SHORT_STEPS, SHORT_CLASS_IMAGES)
    if bench.quick:
        many, count = 2, 1
    class_images = make_class_images(bench.fresh("class_images"), bench.side, images)
    found = [make_scene(folder / f"scene{i}", bench.side) for i in range(many)]
    flags = [*training_flags(bench, setting, count, images), "--class_data_dir", class_images, "--output_dir"]
    runs = {side: bench.fresh("runs") for side in PROGRAMS}
    commands = {
        "official": [["train", scene, *flags, runs["official"] / scene.name] for scene in found],
        "bas": [["train", *found, *flags, runs["bas"], "--resolution", bench.side]],
    }
    environment, hourly = {"BAS_CACHE": str(bench.fresh("cache"))}, {}
    for side in PROGRAMS:
        run_program(side, ["train", "--help"], bench, environment)  # only fills the disk's cache
    for side, started in commands.items():
        seconds = sum(run_program(side, words, bench, environment) for words in started)
        hourly[side] = Stat.of([3600 * many / seconds])
    note = f"{many} scenes, {count} + {count} steps, {images} class images made before, and start of the process"
    ratio = hourly["bas"].median / hourly["official"].median
    yield line(setting, "scenes per hour", unit="scenes an hour", note=note, ratio=ratio, **hourly)
