"""SDXL's small runs: each kind trains what it names, resumes to the same bits and reads as it was trained."""

import pytest
import torch
from safetensors.torch import load_file

import bas
from bas.io.run_files import CONCEPTS, TUNED, read_concepts
from bas.models.text import encode_ids, tokenize
from bas.training import loop as training
from bas.training.loop import trained
from bas.training.phase_state import trained_weights
from tests.helpers.faults import before_step
from tests.helpers.sdxl import XLBench
from tests.helpers.tiny import snapshot

KINDS = {  # what its names hold, and how it is trained
    "lora": (("lora_A", "lora_B"), {"rank": 2, "conv_rank": 1, "alpha": 3.0, "train_text_encoder": True}),
    "token": (("to_k.lora_", "to_v.lora_"), {"rank": 2}),
    "kv": (("attn2.to_k", "attn2.to_v"), {}),
    "v": (("attn2.to_v",), {}),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return XLBench(tmp_path_factory.mktemp("sdxl bench"))


def prediction(models) -> torch.Tensor:
    """What the model predicts for one latent and a prompt with handles."""
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        context = encode_ids(models.text_encoders, tokenize(models.tokenizer, ["a photo of <asset0> and <asset1>"]))
        return models.unet(z, 500, context.states, pooled=context.pooled).sample


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_run(bench, tmp_path, kind, monkeypatch):
    """Every weight of the base outside the kind keeps its bits, everything that it names moves; what was cut off in
    phase 2 resumes to the same bits; loaded from its folder and its base, the run predicts what was trained."""
    part, changes = KINDS[kind]
    settings = {"train": kind, "learning_rate": 1e-2, "phase1_train_steps": 1, "phase2_train_steps": 2} | changes
    config = bench.config(tmp_path / "whole", save_precision="fp32", **settings)
    before = {name: snapshot(network) for name, network in bas.load(bench.model, "cpu", torch.float32).networks.items()}
    with trained(config) as run:
        names = [name for name in trained_weights(run.models, config) if not name.startswith("handles")]
        assert all(any(piece in name for piece in part) for name in names)
        encoders = {name.partition(".")[0] for name in names}
        assert encoders == ({"unet", "text_encoder", "text_encoder_2"} if kind == "lora" else {"unet"})
        for component, network in run.models.networks.items():
            after = network.state_dict()
            for name, tensor in before[component].items():
                if "token_embedding" not in name:
                    assert torch.equal(tensor, after[name]) == (f"{component}.{name}" not in names), name
        for name, p in trained_weights(run.models, config).items():
            assert ".lora_B." not in name or p.any(), name
        expected = prediction(run.models)
        training.finish(run)
    tuned = {name.replace("text_model.", "") for name in load_file(tmp_path / "whole" / TUNED)}
    assert tuned == {name.replace("text_model.", "") for name in names}
    rows = read_concepts(tmp_path / "whole")[0]
    assert (rows["handles"].shape, rows["handles_2"].shape) == ((3, 64), (3, 128))
    models = bas.load(tmp_path / "whole", "cpu", torch.float32)
    assert models.handles == ("<asset0>", "<asset1>", "<asset2>")
    assert (prediction(models) - expected).abs().max() < 1e-5 * expected.abs().max()

    def dying(*_):
        raise KeyboardInterrupt

    cut = bench.config(tmp_path / "cut", save_precision="fp32", checkpointing_steps=1, **settings)
    with monkeypatch.context() as patch:
        before_step(patch, 3, dying)
        with pytest.raises(KeyboardInterrupt):
            bas.train(cut)
    bas.train(bench.config(tmp_path / "cut", resume_from_checkpoint="latest", save_precision="fp32", **settings))
    for file in (TUNED, CONCEPTS):
        whole, resumed = (load_file(tmp_path / name / file) for name in ("whole", "cut"))
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_base_that_is_not_here_is_named(bench, tmp_path):
    """`find_base` by the hash, and by --base where it was moved."""
    run = bas.train(bench.config(tmp_path / "run", train="v", phase1_train_steps=1, phase2_train_steps=0))
    away = bench.model.rename(tmp_path / "moved")
    try:
        with pytest.raises(bas.errors.InputError, match="keeps no base model"):
            bas.load(run, "cpu")
        spec = bas.pretrained.folder.read_spec(run, base=away)
    finally:
        away.rename(bench.model)
    assert (spec.family, spec.handles[0]) == ("Stable Diffusion XL", "<asset0>")
