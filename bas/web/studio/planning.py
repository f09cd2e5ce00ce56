"""The answers that need the code of networks, which takes seconds to import: forms, checks, plans, new jobs."""

from typing import Any

from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401  here once: from two threads this import can fail

from bas import __version__
from bas.runtime.device import pick_device
from bas.web.studio import forms, jobs, tasks
from bas.web.studio.app import Ask
from bas.web.studio.store import JOBS, RUNS


def about(ask: Ask) -> dict[str, Any]:
    """Describe this installation and this machine."""
    device = str(pick_device(None))
    return {"version": __version__, "home": str(ask.home.folder), "device": device, "bases": forms.bases()}


def check_masks(ask: Ask) -> dict[str, Any]:
    """Check masks: what the losses will see."""
    return forms.check(ask.home, ask.json)


def list_settings(ask: Ask) -> dict[str, Any]:
    """List the settings of training and of drawing."""
    chosen = {name: ask.query[name] for name in forms.LAYERS if name in ask.query}
    train = forms.fields(forms.base_of(ask.query), chosen)
    return {"train": train, "sample": forms.sampling_fields(), "memory": forms.gpu_memory()}


def plan_training(ask: Ask) -> dict[str, Any]:
    """Plan a training: what it would take."""
    return forms.plan(ask.home, ask.json)


def add_job(ask: Ask) -> dict[str, Any]:
    """Add a job. It waits for its turn, or starts at once."""
    job = tasks.ask(ask.home, ask.json)
    ask.lane.tick()
    return jobs.describe(ask.home.folder / JOBS / job) or {}


def list_exports(ask: Ask) -> list[dict[str, Any]]:
    """List the forms in which a run can be taken away."""
    return tasks.exports(ask.home.find(RUNS, ask.path["run"]))
