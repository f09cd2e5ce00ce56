"""The start of a run: what is wrong with its input is found before weights are read, and its folder must be free."""

import pytest

import bas
from bas.training.setup import check_machine
from tests.helpers.tiny import refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"phase1_train_steps": 0, "phase2_train_steps": 0}, ["nothing to train"]),
        ({"exact_phase1": True, "mixed_precision": "fp16"}, ["--exact_phase1", "bf16"]),
        ({"num_of_assets": 2}, ["--num_of_assets is 2", "3 masks"]),
        ({"pretrained_model_name_or_path": "no-such-model"}, ["no-such-model", "not a known model"]),
        ({"device": "nonsense"}, ["--device nonsense"]),
        ({"resume_from_checkpoint": "nowhere"}, ["nowhere", "no complete checkpoint"]),
    ],
)
def test_wrong_input_is_found_before_weights_are_read(bench, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with refused(*words):
        bas.train(bench.config(tmp_path / "run", **flags))


def test_run_folder_must_be_free(bench, tmp_path, monkeypatch):
    run = bas.train(bench.config(tmp_path / "run", phase1_train_steps=1, phase2_train_steps=0))
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with refused("already holds a finished run"):
        bas.train(bench.config(run))
    (run / "concepts.safetensors").unlink()
    with refused("unfinished run", "--resume_from_checkpoint latest"):
        bas.train(bench.config(run))
    (tmp_path / "file").write_text("in the way")
    with refused("cannot write to --output_dir"):
        bas.train(bench.config(tmp_path / "file" / "run"))


def test_a_warm_up_that_never_ends_is_told(bench, caplog):
    """Phases of 3 steps reach their rate after 2 steps of warm-up, not after 3."""
    for warmup in (2, 3):
        check_machine(bench.config(lr_scheduler="linear", lr_warmup_steps=warmup, phase2_train_steps=5), weights=False)
    assert [text for text in caplog.messages if "warmup" in text] == [
        "--lr_warmup_steps 3: phase1 has 3 steps, so it never reaches its learning rate"
    ]
