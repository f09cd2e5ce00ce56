"""Small runs: they hold what was trained alone, resume to the same bits, and read as whole models."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bas
from bas.cli.entry import main
from bas.config import TrainConfig
from bas.io.run_files import TUNED, read_concepts, save_concepts
from bas.models.adapters import add_adapters
from bas.models.bundle import is_adapter
from bas.pretrained import small_runs
from bas.pretrained.folder import read_spec
from bas.pretrained.hashes import weights_hash
from bas.sampling.prompt_strength import encode_prompts
from bas.training import checkpoints
from bas.training import loop as training
from bas.training.base_model import Base
from bas.training.loop import trained
from bas.training.phase_state import trained_weights
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step
from tests.helpers.tiny import file_hashes, refused, snapshot

LORA = {"train": "lora", "rank": 2, "conv_rank": 1, "alpha": 3.0, "learning_rate": 1e-2}
FILES = (TUNED, "metrics.jsonl")


@pytest.fixture(scope="module")
def small(bench, tmp_path_factory):
    """A finished run of 3 + 3 steps with adapters everywhere."""
    return bas.train(bench.config(tmp_path_factory.mktemp("small") / "run", **LORA))


def prediction(models) -> torch.Tensor:
    """What the model predicts for one latent and a prompt with a handle."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        context = encode_prompts(models.text_encoders, models.tokenizer, ["a photo of <asset0> and <asset1>"])
        return models.unet(z, 500, context.states).sample


def bare(name: str) -> str:
    """A weight's name without the prefix that some versions of transformers put before the text encoder's."""
    return name.replace("text_model.", "")


# --- What is trained and kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("lora", ("lora_A", "lora_B")),
        ("token", ("to_k.lora_", "to_v.lora_")),
        ("kv", ("attn2.to_k", "attn2.to_v")),
        ("v", ("attn2.to_v",)),
    ],
)
def test_a_kind_moves_its_weights_and_nothing_else(bench, tmp_path, kind, part):
    """Every weight of the base outside the kind keeps its bits; everything that it names moves."""
    config = bench.config(tmp_path / "run", **LORA | {"train": kind})
    base = bas.load(bench.model, device="cpu", dtype=torch.float32)
    before = {name: snapshot(getattr(base, name)) for name in ("unet", "vae", "text_encoder")}
    with trained(config) as run:
        names = [name for name in trained_weights(run.models, config) if name != "handles"]
        assert names
        assert all(any(word in name for word in part) for name in names)
        for network, state in before.items():
            after = getattr(run.models, network).state_dict()
            same = {name for name in state if torch.equal(state[name], after[name])}
            moved = {name.removeprefix(f"{network}.") for name in names if name.startswith(network)}
            assert state.keys() - same == {name for name in moved if not is_adapter(name)}
            assert all(after[name].abs().max() > 0 for name in moved)  # B has left zero
        training.finish(run)
    assert {*map(bare, load_file(tmp_path / "run" / TUNED))} == {*map(bare, names)}
    assert not (tmp_path / "run" / "unet").exists()


@pytest.mark.parametrize("kind", ["lora", "token"])
def test_a_small_run_reads_as_the_model_that_was_trained(bench, tmp_path, kind):
    """The run, read from disk, predicts what the networks in memory predict, to 5e-6; its base predicts otherwise."""
    config = bench.config(tmp_path / "run", **LORA | {"train": kind})
    with trained(config) as run:
        expected = prediction(run.models)
        training.finish(run)
    models = bas.load(tmp_path / "run", device="cpu", dtype=torch.float32)
    assert models.handles == ("<asset0>", "<asset1>", "<asset2>")
    assert any(".lora_" in name for name in models.unet.state_dict()) == (kind == "token")
    assert (prediction(models) - expected).abs().max() < 5e-6
    plain, _ = bench.prepared(bench.config())
    assert (prediction(plain) - expected).abs().max() > 1e-3


def test_without_phase_2_a_small_run_holds_handles_alone(bench, tmp_path):
    run = bas.train(bench.config(tmp_path / "run", **LORA, phase2_train_steps=0))
    assert load_file(run / TUNED) == {}
    assert read_spec(run).handles == ("<asset0>", "<asset1>", "<asset2>")


def test_the_file_is_that_of_the_masters(bench, tmp_path):
    """In bf16 the file holds float32 numbers that bf16 cannot express, and steps far below bf16's spacing count."""
    run = bas.train(bench.config(tmp_path / "run", **LORA, mixed_precision="bf16"))
    tuned = load_file(run / TUNED)
    for name, tensor in tuned.items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float()), name


def test_bf16_gradients_point_as_those_of_float32(bench):
    """Cosine of all adapters' gradients with float32's above 0.999."""
    config = bench.config(**LORA)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        models, data = bench.prepared(config)
        add_adapters(models, config, 3)
        generator = torch.Generator().manual_seed(5)
        for name, p in trained_weights(models, config).items():
            if ".lora_B." in name:
                p.data = 0.05 * torch.randn(p.shape, generator=generator)
        models.unet.to(dtype)
        models.text_encoder.to(dtype)
        phase = config.phases[1]
        parameters = training.build_phase_state(models, phase, config, "no", {}).weights.optimized
        batch = training.sample_batch(data, models, phase, config, torch.Generator().manual_seed(0))
        loss, _ = training.training_step(models, batch, config)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        pairs = zip(parameters, gradients, strict=True)
        found.append(torch.cat([gradient.float().flatten() for name, gradient in pairs if is_adapter(name)]))
    assert torch.cosine_similarity(*found, dim=0) > 0.999


# --- Resuming -----------------------------------------------------------------------------------------------------


class CutOff(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("step", some_fast((3, 4, 6), 4))
def test_a_small_run_resumes_to_the_same_bits(bench, tmp_path, monkeypatch, small, step):
    """Cut off in phase 1, in the first step of phase 2, and in its last; the checkpoint takes 16 bytes a weight."""
    original, steps = training.optimizer_step, iter(range(1, 100))

    def dying(*args):
        if next(steps) == step:
            raise CutOff
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", dying)
        with pytest.raises(CutOff):
            bas.train(bench.config(tmp_path / "run", checkpointing_steps=1, **LORA))
    (folder,) = checkpoints.list_checkpoints(tmp_path / "run")
    count = sum(tensor.numel() for tensor in load_file(small / TUNED).values()) + 3 * 16
    header = 200 * len(checkpoints.load_checkpoint(folder).tensors) + 20_000
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * count + header
    run = bas.train(bench.config(tmp_path / "run", resume_from_checkpoint="latest", **LORA))
    assert file_hashes(run, FILES) == file_hashes(small, FILES)


def test_a_run_of_single_tokens_resumes_to_the_same_bits(bench, tmp_path, monkeypatch):
    """Cut off before its last step."""
    whole = bas.train(bench.config(tmp_path / "whole", train="token", rank=2))

    def dying(*_):
        raise CutOff

    with monkeypatch.context() as patch:
        before_step(patch, 6, dying)
        with pytest.raises(CutOff):
            bas.train(bench.config(tmp_path / "run", checkpointing_steps=1, train="token", rank=2))
    run = bas.train(bench.config(tmp_path / "run", resume_from_checkpoint="latest", train="token", rank=2))
    assert file_hashes(run, FILES) == file_hashes(whole, FILES)


def test_another_kind_does_not_resume(bench, tmp_path, small):
    """A run of another rank or kind is refused by the flag's name, a finished one too."""
    with refused("already holds a finished run"):
        bas.train(bench.config(small, **LORA))
    for changes, flag in (({"rank": 3}, "--rank"), ({"train": "full"}, "--train"), ({"alpha": 1.0}, "--alpha")):
        again = bench.config(small, resume_from_checkpoint="latest", **LORA | changes)
        with refused(flag):
            training.is_finished(again)


# --- The base -----------------------------------------------------------------------------------------------------


def copied(small, tmp_path, name: str, **settings):
    """A copy of the run that says it was trained on a base of this name, with these settings."""
    run = shutil.copytree(small, tmp_path / "copy")
    tensors, metadata = read_concepts(run)
    metadata["config"] |= settings | {"pretrained_model_name_or_path": name}
    save_concepts(run, [tensors["handles"]], tensors["masks"] / 255, metadata.pop("handles"), metadata)
    return run


def test_the_base_is_found_by_its_hash(bench, tmp_path, small, monkeypatch):
    """Where the name of the base leads nowhere, a known model with its hash is taken."""
    run = copied(small, tmp_path, str(tmp_path / "gone"))
    monkeypatch.setattr(small_runs, "manifest", lambda: {"other": {}, str(bench.model): {}})
    monkeypatch.setattr(small_runs, "is_known_elsewhere", lambda name: False)
    first, second = (bas.load(model, device="cpu").unet.conv_in.weight for model in (run, bench.model))
    assert torch.equal(first, second)


def test_a_base_that_is_not_here_is_named(tmp_path, small, capsys, monkeypatch):
    """One line says what to fetch or to put back, with exit code 2, before anything is written."""
    monkeypatch.chdir(tmp_path)
    back = f"put it back as {tmp_path}/gone, or say where it is with --base"
    for name, advice in (("sd15", "bas download sd15"), (str(tmp_path / "gone"), back)):
        run = copied(small, tmp_path, name)
        assert main(["sample", str(run), "--prompt", "a photo of <asset0>"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "keeps no base model" in line
        assert line.endswith(advice)
        shutil.rmtree(run)


def test_a_base_that_changed_is_not_taken(bench, tmp_path, small):
    """The name leads to other weights: the hash decides."""
    other = shutil.copytree(bench.model, tmp_path / "model")
    file = other / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    save_file(tensors, file)
    with refused("keeps no base model", str(other)):
        read_spec(copied(small, tmp_path, str(other)))


def test_the_hash_of_a_small_run_depends_on_all_that_it_is(tmp_path, small):
    """Another byte in its weights or its base's hash gives another hash."""
    run = shutil.copytree(small, tmp_path / "run")
    assert weights_hash(run, remembered=False) == weights_hash(small, remembered=False)
    data = bytearray((run / TUNED).read_bytes())
    data[-1] ^= 1
    (run / TUNED).write_bytes(bytes(data))
    assert weights_hash(run, remembered=False) != weights_hash(small, remembered=False)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(next(n for n in t if ".lora_A." in n)), ("no lora_A beside it",)),
        (lambda t: t.pop(next(n for n in t if ".lora_B." in n)), ("no fitting lora_B",)),
        (lambda t: t.update({next(n for n in t if ".lora_A." in n): torch.zeros(())}), ("no fitting lora_B",)),
        (lambda t: t.update({next(n for n in t if ".lora_B." in n): torch.zeros(8)}), ("no fitting lora_B",)),
        (lambda t: t.update(strange=torch.zeros(1)), ("holds strange",)),
        (lambda t: t.update({"unet.conv_in.bias": torch.zeros(1)}), ("conv_in.bias is [1], the base has [8]",)),
    ],
)
def test_damaged_weights_are_refused(tmp_path, small, change, parts):
    """Half of a pair, a tensor without a place, a wrong shape: one line that names it."""
    run = shutil.copytree(small, tmp_path / "run")
    tensors = load_file(run / TUNED)
    change(tensors)
    with safe_open(run / TUNED, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, run / TUNED, metadata)
    with refused(*parts):
        bas.load(run, device="cpu")


# --- Settings -----------------------------------------------------------------------------------------------------


def test_a_kind_has_its_own_rate_over_a_models():
    """The rate of bas.json was made for another kind; what the user says wins."""
    row = {"learning_rate": 2e-4}
    assert TrainConfig.resolve({}, row).learning_rate == 2e-4
    assert TrainConfig.resolve({"train": "lora"}, row).learning_rate == 1e-4
    assert TrainConfig.resolve({}, row | {"train": "lora"}).learning_rate == 2e-4
    assert TrainConfig.resolve({"train": "kv", "learning_rate": 3e-4}, row).learning_rate == 3e-4


def test_a_setting_without_effect_is_refused():
    """The adapters' settings belong to the kinds that have adapters; a settings file may hold their defaults."""
    assert TrainConfig.resolve({"train": "token", "rank": 4, "conv_rank": None}).rank == 4
    for kind, name, value in (("full", "rank", 4), ("kv", "alpha", 2.0), ("token", "lora_targets", "attention")):
        with refused(f"--{name} has no effect with --train {kind}"):
            TrainConfig.resolve({"train": kind, name: value})


def test_a_run_of_single_tokens_is_no_base(bench, tmp_path):
    run = bas.train(bench.config(tmp_path / "run", train="token", phase1_train_steps=0, phase2_train_steps=1))
    with refused("cannot be a base"):
        bas.train(bench.config(tmp_path / "again", pretrained_model_name_or_path=str(run)))


def test_the_old_flag_is_answered_with_the_new_one(capsys):
    assert main(["train", "scene", "--unet_layers", "cross_attention"]) == 2
    assert "bas calls it --train" in capsys.readouterr().err


def test_a_base_that_was_moved_is_named(bench, tmp_path, small, capsys):
    """--base says where it is; another model there, or a base of a whole model, is refused."""
    run, moved = copied(small, tmp_path, str(tmp_path / "gone")), shutil.copytree(bench.model, tmp_path / "moved")
    words = ["--prompt", "a photo of <asset0>", "--num_inference_steps", "1"]
    image = ["--output_path", str(tmp_path / "a.png")]
    assert main(["sample", str(run), *words, *image, "--base", str(moved)]) == 0
    assert main(["info", str(run), "--base", str(moved), "--json"]) == 0
    details = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (details["loads"], details["handles"]) == (True, ["<asset0>", "<asset1>", "<asset2>"])
    assert (details["trained"], details["ranks"], details["alpha"]) == ("lora", [1, 2], 3.0)
    count = sum(tensor.numel() for tensor in load_file(run / TUNED).values())
    assert details["trained weights"].startswith(f"{count:,}, fp")
    assert main(["info", str(run), "--json"]) == 0
    assert "keeps no base model" in json.loads(capsys.readouterr().out)["problem"]
    with refused("--base", "was trained on one with"):
        read_spec(run, base=small)
    with refused("is a whole model"):
        read_spec(moved, base=moved)


@pytest.fixture(scope="module")
def additions(bench, small, tmp_path_factory):
    """A LoRA and an embedding that another run was exported to."""
    folder = tmp_path_factory.mktemp("additions")
    assert main(["export", str(small), str(folder / "style.safetensors"), "--prefix", "other-"]) == 0
    return {"lora": (f"{folder}/style.safetensors:0.5",), "embedding": (f"{folder}/other-asset0.safetensors",)}


def test_files_under_the_base_are_a_part_of_it(bench, tmp_path, additions, monkeypatch):
    """A run trained over a LoRA and an embedding reads as it was trained.

    It resumes and opens with the same files alone, which may lie in the run.
    """
    config = bench.config(tmp_path / "run", **LORA, **additions)
    with trained(config) as run:
        expected = prediction(run.models)
        training.finish(run)
    models = bas.load(tmp_path / "run", device="cpu", dtype=torch.float32)
    assert models.handles == ("<other-asset0>", "<asset0>", "<asset1>", "<asset2>")
    assert (prediction(models) - expected).abs().max() < 5e-6
    plain, _ = bench.prepared(bench.config())
    assert (prediction(plain) - expected).abs().max() > 1e-3
    assert training.is_finished(config)
    (style,) = additions["lora"]
    with refused("another base"):
        training.is_finished(replace(config, lora=(style.replace("0.5", "0.6"),)))
    file = tmp_path / "style.safetensors"
    shutil.copy(style.removesuffix(":0.5"), file)
    moved = copied(tmp_path / "run", tmp_path, str(bench.model), lora=[f"{file}:0.5"])
    file.unlink()
    with refused("style.safetensors does not exist", f"or into {moved}"):
        read_spec(moved)
    shutil.copy(style.removesuffix(":0.5"), moved)
    assert (prediction(bas.load(moved, device="cpu", dtype=torch.float32)) - expected).abs().max() < 5e-6


def test_images_keep_the_files_that_they_were_made_with(bench, tmp_path, additions, monkeypatch):
    """The settings in an image name all that changed its model, and as --config they repeat it, bit for bit.

    A flag overrides the file.
    """
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "a photo of <other-asset0>", "--num_inference_steps", "1", "--precision", "fp32"]
    files = ["--lora", *additions["lora"], "--embedding", *additions["embedding"]]
    files += ["--vae", str(bench.model / "vae"), "--clip_skip", "2"]
    assert main(["sample", str(bench.model), *words, *files]) == 0
    with Image.open("result.png") as image:
        settings = json.loads(image.info["bas"])
        first = image.tobytes()
    assert settings["lora"] == [*additions["lora"]]
    assert settings["embedding"] == [*additions["embedding"]]
    assert (settings["vae"], settings["clip_skip"]) == (str(bench.model / "vae"), 2)
    names = ("lora", "embedding", "vae", "clip_skip")
    (tmp_path / "again.toml").write_text("".join(f"{name} = {json.dumps(settings[name])}\n" for name in names))
    again = ["sample", str(bench.model), *words, "--config", "again.toml", "--output_path", "again.png"]
    for flags, same in (([], True), (["--lora", *additions["lora"]], True), (["--clip_skip", "1"], False)):
        assert main([*again, *flags]) == 0
        with Image.open("again.png") as image:
            assert (image.tobytes() == first) == same
    assert main([*again, "--vae", "nowhere"]) == 2


def test_a_second_scene_is_trained_as_if_it_were_alone(bench, tmp_path, small):
    """One base in memory, two runs one after the other, bf16 between: the adapters of the first leave no trace."""
    base = Base.open(bench.model, torch.device("cpu"), keep=True)
    training.train(bench.config(tmp_path / "first", **LORA, mixed_precision="bf16", seed=5), base)
    training.train(bench.config(tmp_path / "second", **LORA), base)
    assert file_hashes(tmp_path / "second", FILES) == file_hashes(small, FILES)
    assert not any(is_adapter(name) for name, _ in base.fresh().unet.named_parameters())
