"""--prediction_type: every command that reads a model takes it, over what the model's files say."""

import json
import shutil

import pytest

import bas
from bas.cli.entry import build_parser, main
from bas.training.checkpoints import list_checkpoints
from tests.helpers.faults import before_step, resume
from tests.helpers.tiny import refused

READERS = ("train", "masks", "sample", "vary", "explore", "attend", "edit", "evaluate", "info", "export")
V = ("--prediction_type", "v_prediction")
NEEDED = "rescale_betas_zero_snr needs prediction_type v_prediction"


@pytest.fixture(scope="module")
def undecided(bench, tmp_path_factory):
    """A model that can only predict v, whose file does not say so."""
    folder = tmp_path_factory.mktemp("undecided") / "model"
    shutil.copytree(bench.model, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    return folder


@pytest.mark.parametrize("command", READERS)
def test_each_has_the_flag(command):
    (commands,) = (action for action in build_parser(command)._actions if action.dest == "command")
    assert "--prediction_type" in commands.choices[command]._option_string_actions  # type: ignore[index]


def test_masks(bench, undecided, capsys):
    words = ["masks", str(bench.scene), "--weights", str(undecided)]
    assert main(words) == 2
    assert NEEDED in capsys.readouterr().err
    assert main([*words, *V]) == 0


def test_sample(undecided, tmp_path, capsys):
    words = ["sample", str(undecided), "--prompt", "a photo", "--num_inference_steps", "1"]
    words += ["--device", "cpu", "--output_path", str(tmp_path / "a.png")]
    assert main(words) == 2
    assert NEEDED in capsys.readouterr().err
    assert main([*words, *V]) == 0


def test_info(undecided, capsys):
    assert main(["info", str(undecided), "--json", "--no_hash"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert main(["info", str(undecided), "--json", "--no_hash", *V]) == 0
    with_flag = json.loads(capsys.readouterr().out)
    assert (without["loads"], with_flag["loads"]) == (False, True)
    assert NEEDED in without["problem"]
    assert with_flag["prediction type"] == "v_prediction"


def test_export(undecided, tmp_path, capsys):
    """It reads the model; what it then refuses is the tiny model's vocabulary."""
    assert main(["export", str(undecided), str(tmp_path / "a.safetensors"), *V]) == 2
    assert "a single file carries no tokenizer" in capsys.readouterr().err


def test_train_and_resume(bench, undecided, tmp_path, monkeypatch):
    """The run has the schedule with v, also after a resume, whose checks read the base once more."""
    flags = {"pretrained_model_name_or_path": str(undecided), "checkpointing_steps": 2}
    with refused(NEEDED):
        bas.train(bench.config(tmp_path / "run", **flags))

    def die(*args):
        raise KeyboardInterrupt

    flags |= {"prediction_type": "v_prediction"}
    with monkeypatch.context() as patch:
        before_step(patch, 4, die)
        with pytest.raises(KeyboardInterrupt):
            bas.train(bench.config(tmp_path / "run", **flags))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000002"]
    run = resume(bench, tmp_path / "run", **flags)
    assert json.loads((run / "settings.json").read_text())["schedule"]["prediction_type"] == "v_prediction"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
