"""How long a training takes, as the studio says it: from a run that was measured on this machine, or not at all."""

from dataclasses import asdict, replace

import pytest

from bas.config import TrainConfig
from bas.io.json_files import write_json
from bas.io.run_files import CONCEPTS, SETTINGS, TIMES
from bas.web.studio import jobs
from bas.web.studio.measured import measured

CONFIG = TrainConfig(instance_data_dir="scene", phase1_train_steps=40, phase2_train_steps=20, device="cpu")
STAGES = [("preparation", 5.0), ("phase1", 4.0), ("phase2", 10.0), ("saving", 1.0)]


@pytest.fixture
def trained(studio):
    """A run that was trained here."""
    run = studio.home.folder / "runs" / "toy"
    run.mkdir()
    jobs.make(studio.home, "train", "toy", ["train"], {}, {})
    write_json(run / SETTINGS, {"config": asdict(CONFIG), "handles": ["<toy>"], "base": "", "version": "1"})
    (run / CONCEPTS).touch()
    write_times(run)
    return run


def write_times(run, device="cpu", sessions=1):
    """The clock of a run."""
    stages = [{"stage": name, "seconds": seconds} for name, seconds in STAGES]
    session = {"started": "2026", "device": device, "versions": {}, "stages": stages}
    write_json(run / TIMES, {"sessions": [session] * sessions})


def test_a_training_like_one_that_was_measured_takes_as_long_for_each_step(studio, trained):
    asked = replace(CONFIG, phase1_train_steps=400, phase2_train_steps=60, seed=3, learning_rate=1e-4, output_dir="new")
    assert measured(studio.home, asked) == {"run": "toy", "seconds": pytest.approx(5 + 1 + 400 * 0.1 + 60 * 0.5)}


def test_what_was_not_measured_is_not_guessed(studio, trained, monkeypatch):
    """With other costs of a step, on another device, with a break, unfinished, or elsewhere."""
    for change in ({"train_batch_size": 3}, {"resolution": 256}, {"train": "lora"}, {"img_log_steps": 7}):
        assert measured(studio.home, replace(CONFIG, **change)) is None, change
    for times in ({"device": "NVIDIA H100"}, {"sessions": 2}):
        write_times(trained, **times)
        assert measured(studio.home, CONFIG) is None, times
    write_times(trained)
    assert measured(studio.home, CONFIG) is not None
    monkeypatch.setattr(jobs.own, "is_marked", lambda *_: False)  # it came with the folder
    assert measured(studio.home, CONFIG) is None
    monkeypatch.undo()
    (trained / CONCEPTS).unlink()
    assert measured(studio.home, CONFIG) is None
