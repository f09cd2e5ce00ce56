"""Weights beyond the precision that a run is saved in: found at its start, or at its end without loss."""

import shutil
from pathlib import Path

import pytest
import torch

from bas.cli.entry import main
from bas.pretrained.folder import load
from tests.helpers.cases import some_fast
from tests.helpers.families import change_tensors


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_out.bias"),
        ("text_encoder/model.safetensors", "text_model.embeddings.token_embedding.weight"),
    ],
)
@pytest.mark.parametrize("found", some_fast(("at the start", "at the end"), "at the end"))
def test_a_weight_beyond_fp16_costs_no_checkpoint(found, file, name, bench, tmp_path, capsys, monkeypatch):
    """70,000 is more than fp16's 65,504. The same run is then finished in bf16, whose nearest number is 70,144.

    At the end as if it were training that made the weight so large.
    """
    if found == "at the end":
        monkeypatch.setattr("bas.training.setup.check_savable", lambda *args: None)
    model, run = shutil.copytree(bench.model, tmp_path / "model"), tmp_path / "run"
    change_tensors(Path(model) / file, lambda tensors: tensors[name].view(-1)[0:1].fill_(70_000.0))
    argv = [*bench.command(run), "--weights", str(model), "--checkpointing_steps", "2", "--phase2_train_steps", "0"]
    argv += ["--mixed_precision", "no", "--no_prior_preservation"]
    assert main([*argv, "--save_precision", "fp16"]) == (1 if found == "at the end" else 2)
    part = file.split("/")[0]
    assert "the model cannot be saved in fp16, 1 weights are beyond its range" in (error := capsys.readouterr().err)
    assert f"({part} {name.removeprefix('text_model.')}): use --save_precision fp32 or bf16" in error
    assert not (run / file).exists()
    if found == "at the start":
        assert not (run / "metrics.jsonl").exists()
        return
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run / "concepts.safetensors").exists()
    assert main([*argv, "--save_precision", "bf16", "--resume_from_checkpoint", "latest"]) == 0
    assert not list((run / "checkpoints").glob("*"))
    weights = getattr(load(run), part).state_dict()
    assert max(weight.max() for weight in weights.values() if weight.dtype == torch.float32) == 70_144


def test_a_weight_beyond_bf16_is_refused_where_it_would_be_rounded(bench, tmp_path, capsys):
    """3.4e38 is the largest number of float32 within 0.1 %, and infinity in bf16, whose largest is 3.39e38."""
    model, run = shutil.copytree(bench.model, tmp_path / "model"), tmp_path / "run"
    file = Path(model) / "unet/diffusion_pytorch_model.safetensors"
    change_tensors(file, lambda tensors: tensors["conv_out.bias"][0:1].fill_(3.4e38))
    argv = [*bench.command(run), "--weights", str(model), "--mixed_precision", "bf16"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "conv_out.bias holds values beyond the range of torch.bfloat16: use --mixed_precision no" in error
    assert not (run / "metrics.jsonl").exists()
