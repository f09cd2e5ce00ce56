"""--report_to tensorboard: the events are the numbers of metrics.jsonl, and a missing package is one line."""

import json
import sys

import pytest

from bas.cli.entry import main
from bas.errors import InputError
from bas.training.tensorboard import EVENTS, EventLog, writer_class
from tests.helpers import tiny

ROWS = [
    {"phase": "phase1", "step": 1, "lr": 5e-4, "loss": 0.25, "grad_norm": 1.5},
    {"phase": "phase2", "step": 2, "lr": 2e-6, "loss": 0.125, "prior": 0.75, "grad_norm": 0.5},
]


def read_events(folder):
    """The events of a folder, by the package's own reader."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard, an extra, is not installed"
    )
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(events) -> dict[str, list[tuple[int, float]]]:
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"--report_to tensorboard needs an extra: pip install tensorboard"):
        writer_class()
    model, scene = tiny.write_model(tmp_path / "model"), tiny.write_scene(tmp_path / "toy", concepts=1)
    words = ["train", str(scene), "--weights", str(model), "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--report_to", "tensorboard"]) == 2
    assert capsys.readouterr().err == "bas: --report_to tensorboard needs an extra: pip install tensorboard\n"
    assert not (tmp_path / "run").exists()


def test_rows_become_scalars_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard, an extra, is not installed")
    log = EventLog(tmp_path, done=0)
    log.add(ROWS)
    log.close()
    assert scalars(read_events(tmp_path / EVENTS)) == {
        "lr": [(1, pytest.approx(5e-4)), (2, pytest.approx(2e-6))],
        "loss": [(1, 0.25), (2, 0.125)],
        "grad_norm": [(1, 1.5), (2, 0.5)],
        "prior": [(2, 0.75)],
    }
    again = EventLog(tmp_path, done=1)
    again.add([ROWS[1] | {"loss": 0.5}])
    again.close()
    assert scalars(read_events(tmp_path / EVENTS))["loss"] == [(1, 0.25), (2, 0.5)]


def test_a_training_reports_its_metrics_and_previews(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard, an extra, is not installed")
    model, scene = tiny.write_model(tmp_path / "model"), tiny.write_scene(tmp_path / "toy", concepts=1)
    flags = "--phase1_train_steps 2 --phase2_train_steps 1 --no_prior_preservation --img_log_steps 2 --device cpu"
    flags += " --preview_inference_steps 1 --checkpointing_steps 0 --report_to tensorboard"
    run = tmp_path / "run"
    assert main(["train", str(scene), "--weights", str(model), "--output_dir", str(run), *flags.split()]) == 0
    events = read_events(run / EVENTS)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("lr", "loss", "reconstruction", "attention", "grad_norm"):
        assert scalars(events)[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    (image,) = events.Images("preview")
    assert (image.step, image.encoded_image_string[:4]) == (2, b"\x89PNG")
