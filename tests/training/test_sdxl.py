"""SDXL trained: a step against diffusers' modules, what is trained of two text encoders, a run from end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import bas
from bas.cli.inspection import describe_model
from bas.config import EditConfig, SampleConfig
from bas.data.batches import sample_batch
from bas.io.run_files import read_concepts
from bas.pretrained.folder import load
from bas.pretrained.hub import train_config
from bas.sampling.blended_diffusion import Region, edit
from bas.sampling.sampler import decode, generate, generate_with_maps, standard_normal
from bas.training.loop import training_step
from bas.training.phase_state import parameter_groups, trainable_parameters
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step
from tests.helpers.sdxl import XLBench
from tests.helpers.tiny import refused


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return XLBench(tmp_path_factory.mktemp("sdxl bench"))


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    """A run of both phases, with a preview at its end."""
    return bas.train(
        bench.config(tmp_path_factory.mktemp("sdxl run") / "run", img_log_steps=6, preview_inference_steps=1)
    )


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: copies between the two, and values that the host reads."""

    READ = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, name = operation(*args, **(kwargs or {})), operation._schema.name
        tensors = [x for x in tree_flatten((args, kwargs, result))[0] if isinstance(x, Tensor) and x.dim()]
        if name in self.READ or len({x.device.type for x in tensors}) > 1:
            self.found.append(name)
        return result


@pytest.mark.parametrize("number", [0, 1])
def test_nothing_in_a_step_waits_for_a_gpu(bench, number):
    """What a CUDA graph asks of a step, without a GPU: forward and backward copy nothing from the host.

    The meta device stands in for the GPU. The first step takes the schedule's table there.
    """
    config = bench.config()
    models, data = bench.prepared(config)
    phase, meta = config.phases[number], torch.device("meta")
    trainable_parameters(models, phase)
    batch = sample_batch(data, models, phase, config, torch.Generator().manual_seed(1)).to(meta)
    for network in models.networks.values():
        network.to(meta)
    with Waits() as planted:
        torch.zeros(3).to(meta)
    assert planted.found == ["aten::_to_copy"]
    for _ in range(2):
        with Waits() as waits:
            loss, _ = training_step(models, batch, config)
            loss.backward()
        assert loss.is_meta
    assert waits.found == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_is_that_of_diffusers_modules(bench, number):
    """The loss's parts and the gradients of both handle tables, a weight of the UNet and the projection.

    The step is spelt out: prompts by transformers' modules, the prediction by diffusers' UNet, maps by its processors.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    from tools.reference.attention import record

    config = bench.config()
    models, data = bench.prepared(config)
    phase = config.phases[number]
    trainable_parameters(models, phase)
    batch = sample_batch(data, models, phase, config, torch.Generator().manual_seed(1))
    loss, parts = training_step(models, batch, config)
    loss.backward()

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(bench.model, local_files_only=True)
    handles = [encoder.get_input_embeddings().handles.detach() for encoder in models.text_encoders]
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    for encoder, rows in zip(encoders, handles, strict=True):
        encoder.resize_token_embeddings(len(models.tokenizer), mean_resizing=False)
        encoder.get_input_embeddings().weight.data[-len(rows) :] = rows
    pipeline.text_encoder_2.text_model.eos_token_id = models.tokenizer.eos_token_id
    ends = [row.index(models.tokenizer.eos_token_id) for row in batch.input_ids.tolist()]
    padded = torch.stack([F.pad(row[: end + 1], (0, 76 - end)) for row, end in zip(batch.input_ids, ends, strict=True)])
    first = pipeline.text_encoder(batch.input_ids, output_hidden_states=True)
    second = pipeline.text_encoder_2(padded, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    kept = record(pipeline.unet)
    a = models.schedule.alphas_cumprod[batch.t].view(-1, 1, 1, 1)
    z_t = a.sqrt() * batch.z0 + (1 - a).sqrt() * batch.eps
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * len(batch.t))
    added = {"text_embeds": second.text_embeds, "time_ids": sizes}
    predicted = pipeline.unet(z_t, batch.t, states, added_cond_kwargs=added).sample
    expected = {"reconstruction": ((predicted - batch.eps)[:1] * batch.union).square().mean()}
    if number:
        expected["prior"] = F.mse_loss(predicted[1:], batch.eps[1:])
    maps = [probs[:1] for place, probs in kept if place != "mid" and probs.shape[2] == 4]
    average = torch.cat(maps, dim=1).mean(dim=1).unflatten(1, (2, 2))
    assert len(maps) == 2 + 2 * 2  # on the 2x2 grid: one transformer of two blocks down, two up
    looks = [average[0, :, :, place] for place in batch.positions[0]]
    errors = [(look / look.max() - mask).square().mean() for look, mask in zip(looks, batch.masks[0], strict=True)]
    expected["attention"] = (torch.stack(errors) * batch.present[0]).sum()
    for name, value in expected.items():
        torch.testing.assert_close(parts[name].detach(), value.detach(), atol=0, rtol=1e-5)
    (expected["reconstruction"] + expected.get("prior", 0) + config.lambda_attention * expected["attention"]).backward()
    for ours, encoder in zip(models.text_encoders, encoders, strict=True):
        own, theirs = ours.get_input_embeddings().handles.grad, encoder.get_input_embeddings().weight.grad
        assert (own - theirs[-len(own) :]).abs().max() < 1e-5 * own.abs().max()
    if number:
        name = "mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight"
        pairs = [(models.unet.get_parameter(name).grad, pipeline.unet.get_parameter(name).grad)]
        pairs += [
            (m.text_projection.weight.grad, t.text_projection.weight.grad)
            for m, t in [(models.text_encoder_2, encoders[1])]
        ]
        for own, theirs in pairs:
            assert (own - theirs).abs().max() < 1e-5 * own.abs().max()


def test_every_trained_number_has_a_gradient_and_what_nothing_reads_is_not_trained(bench):
    """The last layer and final norm of the first text encoder; of the second, all is read."""
    config = bench.config()
    models, data = bench.prepared(config)
    trained = trainable_parameters(models, config.phases[1])
    batch = sample_batch(data, models, config.phases[1], config, torch.Generator().manual_seed(1))
    training_step(models, batch, config)[0].backward()
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert [name for name, p in trained.items() if "embed" not in name and not p.grad.any()] == []
    everything = {
        f"{part}.{name}"
        for part in ("unet", "text_encoder", "text_encoder_2")
        for name, _ in models.networks[part].named_parameters()
        if "token_embedding" not in name
    }
    left = {name.replace("text_model.", "") for name in everything - trained.keys()}
    assert {name.rsplit(".", 1)[0].split(".layers.")[0] for name in left} == {
        "text_encoder.encoder",
        "text_encoder.final_layer_norm",
    }
    assert all(name.startswith(("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")) for name in left)
    assert {*parameter_groups(models)["handles"]} == {"handles", "handles_2"}
    assert {*parameter_groups(models)["embedding"]} == {"embedding", "embedding_2"}


def test_a_run_ends_as_a_folder_whose_images_diffusers_repeats(run):
    """Both phases, from a photograph to an image of a handle; the concepts file has the rows of both text encoders."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    models = load(run)
    rows = read_concepts(run)[0]
    assert rows["handles"].shape == (3, 64)
    assert rows["handles_2"].shape == (3, 128)
    for encoder, name in zip(models.text_encoders, ("handles", "handles_2"), strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight[-3:], rows[name])
    config = SampleConfig(num_inference_steps=4, guidance_scale=5.0)
    prompt, start = "a photo of <asset0> and <asset2>", standard_normal((4, 8, 8), [torch.Generator().manual_seed(1)])
    ours = decode(models, generate([prompt], [1], models, config))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(run, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipeline(prompt, num_inference_steps=4, guidance_scale=5.0, latents=start, output_type="pt").images
    assert (ours - theirs).abs().max() < 1e-4
    assert Image.open(run / "previews" / "step-000006.png").width > 100


def test_training_moves_both_text_encoders(bench, run):
    """Phase 2 changes weights of each network that it trains, and leaves what nothing reads as it was."""
    for part, file in (("text_encoder", "model"), ("text_encoder_2", "model"), ("unet", "diffusion_pytorch_model")):
        before, after = (load_file(place / part / f"{file}.safetensors") for place in (bench.model, run))
        moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key][: len(tensor)])}
        unread = {key for key in before if part == "text_encoder" and ("final_layer" in key or ".layers.1." in key)}
        assert not moved & unread
        assert len(moved) > 0.95 * len(before.keys() - unread), part


@pytest.mark.parametrize("precision", some_fast(("no", "bf16", "fp16"), "bf16"))
def test_a_stopped_run_resumes_to_the_same_bits(bench, run, tmp_path, monkeypatch, precision):
    """Stopped in phase 2: weights, both tables, the optimizer and the random state go on where they were."""
    whole = run if precision == "no" else bas.train(bench.config(tmp_path / "whole", mixed_precision=precision))
    cut = bench.config(tmp_path / "cut", mixed_precision=precision, checkpointing_steps=4)
    with monkeypatch.context() as patch:
        before_step(patch, 6, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bas.train(cut)
    bas.train(replace(cut, resume_from_checkpoint="latest"))
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"):
        ours, theirs = (load_file(place / f"{name}.safetensors") for place in (tmp_path / "cut", whole))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name


def test_every_way_to_make_images_takes_a_run(run):
    """Sampling with handles kept apart, local editing, attention maps, and what `bas info` says of the run."""
    models = load(run)
    prompt = "a photo of <asset0> and <asset2>"
    config = SampleConfig(num_inference_steps=2)
    plain, apart = (bas.sample(models, prompt, config, separate=choice)[0] for choice in (False, True))
    assert np.abs(np.asarray(plain, np.float32) - np.asarray(apart, np.float32)).max() > 0
    latents, maps = generate_with_maps([prompt], [0], models, config, (2, 2))
    assert latents.shape == (1, 4, 8, 8)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(1, 2, 2), atol=1e-5, rtol=0)
    mask = np.zeros((64, 64), np.float32)
    mask[:32] = 1
    (edited,) = edit(models, plain, [Region(mask, "a photo of <asset1>")], EditConfig(num_inference_steps=2))
    before, after = (np.asarray(image, np.float32) for image in (plain, edited))
    assert np.array_equal(before[32:], after[32:])
    assert np.abs(before[:32] - after[:32]).max() > 0
    described = describe_model(run, hashes=False)
    assert (described["loads"], described["family"], described["resolution"]) == (True, "Stable Diffusion XL", 64)
    assert described["handles"] == ["<asset0>", "<asset1>", "<asset2>"]
    assert described["text"].startswith("64 features, 2 layers")
    assert "; 128 features, 3 layers" in described["text"]


def test_what_a_card_sets_is_that_of_the_family(bench):
    """By the dry run's count for SDXL at 1024x1024 (docs/hardware.md); smaller cards do not hold its weights."""
    config = train_config("scene", weights=str(bench.model), card="24gb")
    assert (config.train, config.gradient_checkpointing, config.train_text_encoder) == ("cross_attention", True, False)
    config = train_config("scene", weights=str(bench.model), card="40gb")
    assert (config.train, config.optimizer, config.mixed_precision) == ("full", "adamw8bit", "bf16")
    config = train_config("scene", weights=str(bench.model), card="16gb")
    assert (config.train, config.optimizer, config.learning_rate) == ("kv", "adamw8bit", 1e-5)
    config = train_config("scene", weights=str(bench.model), card="12gb")
    assert (config.train, config.train_text_encoder, config.learning_rate) == ("lora", False, 1e-4)
    with refused("--card 8gb: this version trains SDXL on cards from 12gb up"):
        train_config("scene", weights=str(bench.model), card="8gb")
