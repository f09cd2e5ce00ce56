"""Measurements that need a process of their own, so that peaks and first times belong to one measurement alone.

python -m tools.bench.children '{"task": "steps", ...}'     prints one line of JSON; the bench starts these
"""

import json
import sys
import time
from pathlib import Path


def steps(task: dict) -> dict:
    """Seconds of the first and of later steps of one side, and the peak of memory."""
    import torch

    from bas.runtime.memory import peak_bytes
    from tools.bench.clock import time_calls
    from tools.bench.material import Material

    torch.set_num_threads(task["threads"])
    material = Material(**task["material"])
    if task["side"] == "official":
        from tools.bench.official_loop import OfficialLoop, read_scene

        loop = OfficialLoop(Path(material.model), list(material.words), material.device)
        loop.begin(task["phase"])
        if task["compiled"]:
            loop.compile()
        step = loop.stepper(read_scene(Path(material.scene), Path(material.class_images)))
    else:
        from tools.bench.bas_side import BasSide, mode_named  # without diffusers, as bas runs

        step = BasSide(material, mode_named(task["mode"]), task["phase"], Path(task["run"])).step
    cuda = material.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    (first,) = time_calls(step, 1, material.device)
    later = time_calls(step, task["count"], material.device)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_bytes() or 0
    return {"first": first, "later": later, "peak": peak}


def imports(task: dict) -> dict:
    """Seconds to import what a program of that side imports."""
    began = time.perf_counter()
    if task["side"] == "bas":
        from bas import load, sample, train  # noqa: F401
    elif task["side"] == "torch":
        import torch  # noqa: F401
    else:
        from diffusers import StableDiffusionPipeline  # noqa: F401
    return {"seconds": time.perf_counter() - began}


def loading(task: dict) -> dict:
    """Seconds from a folder of float32 weights to a model in bf16, without the imports; peak of memory, with them.

    `lora` in the task is a LoRA file that is added, with the side `bas`.
    """
    import torch

    from bas.runtime.memory import peak_bytes

    torch.set_num_threads(task["threads"])
    cuda = task["device"].startswith("cuda")
    if task["side"] == "bas":
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401 - bas imports them inside the call

        from bas.pretrained.additions import Additions
        from bas.pretrained.folder import load

        additions = Additions.read([task["lora"]], ()) if "lora" in task else None
        began = time.perf_counter()
        model = load(task["model"], device=task["device"], dtype=torch.bfloat16, additions=additions)
    else:
        from diffusers import StableDiffusionPipeline

        began = time.perf_counter()
        model = StableDiffusionPipeline.from_pretrained(
            task["model"], torch_dtype=torch.bfloat16, safety_checker=None, use_safetensors=True
        ).to(task["device"])
    if cuda:
        torch.cuda.synchronize()
    seconds, loaded = time.perf_counter() - began, next(model.unet.parameters()).dtype
    assert loaded == torch.bfloat16
    return {"seconds": seconds, "peak": peak_bytes() or 0}


TASKS = {"steps": steps, "imports": imports, "loading": loading}

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(TASKS[task["task"]](task)))
