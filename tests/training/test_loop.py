"""Training: what each phase moves, what each flag changes, and that a run's folder holds what was learnt."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import bas
from bas.config import TrainConfig
from bas.data.batches import Batch, sample_batch
from bas.io.run_files import read_concepts
from bas.models.text import encode_ids, tokenize
from bas.models.unet import AttentionMap, UNetOutput
from bas.presets import Phase
from bas.pretrained.folder import load
from bas.runtime.device import autocast, tf32
from bas.schedulers import training_target
from bas.training import loop as training
from bas.training.master_weights import MasterWeights
from bas.training.metrics import MetricsLog
from bas.training.phase_state import PhaseState, trainable_parameters
from tests.helpers.faults import before_step
from tests.helpers.tiny import WEIGHTS, file_hashes, write_model, write_scene

EVERYTHING = Phase("all", 1, 0.0, ("handles", "embedding", "unet", "text_encoder"), True)
HANDLES = Phase("handles", 1, 0.0, ("handles",), False)


def draw(prepared, config: TrainConfig, seed: int = 0, phase: int = -1) -> Batch:
    """One batch of a phase of the plan; the last one is the one with class images."""
    models, data = prepared
    return sample_batch(data, models, config.phases[phase], config, torch.Generator().manual_seed(seed))


def gradients(models, batch: Batch, config: TrainConfig, phase: Phase = EVERYTHING) -> dict[str, torch.Tensor]:
    """The gradient of the loss for everything that a phase trains."""
    trained = trainable_parameters(models, phase)
    loss, _ = training.training_step(models, batch, config)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def saved_tensors(folder) -> dict[str, torch.Tensor]:
    """All weights of a model folder, by component and name."""
    files = {name.split("/")[0]: load_file(folder / name) for name in WEIGHTS}
    return {f"{component}.{name}": tensor for component, file in files.items() for name, tensor in file.items()}


def changed(bench, run) -> tuple[set[str], torch.Tensor]:
    """The parts in which a run differs from its base model, and the handles' rows."""
    before, after = saved_tensors(bench.model), saved_tensors(run)
    assert before.keys() == after.keys()
    embedding = next(name for name in before if name.endswith("token_embedding.weight"))
    count = len(before[embedding])
    handles, after[embedding] = after[embedding][count:], after[embedding][:count]
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {"embedding" if name == embedding else name.split(".")[0] for name in names}, handles


def initial_handles(bench, config) -> torch.Tensor:
    """The handles' rows before the first step."""
    return bench.prepared(config)[0].text_encoder.get_input_embeddings().handles.detach().clone()


def metrics(run) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- What each phase trains ---------------------------------------------------------------------------------------


def test_phase1_moves_the_handles_and_nothing_else(bench, tmp_path):
    """Every other weight and every row of the vocabulary keep their bits, weight decay or not."""
    config = bench.config(tmp_path / "run", phase2_train_steps=0, initializer_tokens=("creature", "bowl", "stone"))
    parts, handles = changed(bench, bas.train(config))
    assert parts == set()
    assert (handles != initial_handles(bench, config)).all()


def test_phase1_computes_no_other_gradient(bench):
    """What is frozen costs no memory: after a backward pass the handles alone hold a gradient."""
    config = bench.config()
    prepared = bench.prepared(config)
    models, batch = prepared[0], draw(prepared, config, phase=0)
    trainable_parameters(models, EVERYTHING)
    trainable_parameters(models, HANDLES)
    training.training_step(models, batch, config)[0].backward()
    handles = models.text_encoder.get_input_embeddings().handles
    for network in (models.unet, models.vae, models.text_encoder):
        for parameter in network.parameters():
            assert parameter.requires_grad == (parameter is handles)
            assert (parameter.grad is None) == (parameter is not handles)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, {"unet", "text_encoder", "embedding"}),
        ({"train_text_encoder": False}, {"unet", "embedding"}),
    ],
)
def test_phase2_moves_what_it_says(bench, tmp_path, flags, parts):
    config = bench.config(tmp_path / "run", phase1_train_steps=0, phase2_train_steps=1, learning_rate=1e-3, **flags)
    moved, handles = changed(bench, bas.train(config))
    assert moved == parts
    assert (handles != initial_handles(bench, config)).any()


def test_phase2_reaches_every_weight_of_unet_and_text_encoder(bench, tmp_path):
    run = bas.train(bench.config(tmp_path / "run", phase1_train_steps=0, phase2_train_steps=2, learning_rate=1e-3))
    before, after = saved_tensors(bench.model), saved_tensors(run)
    same = [name for name in before if not name.startswith("vae") and torch.equal(before[name], after[name])]
    assert same == []


def test_phases_are_rows_of_the_plan():
    plan = TrainConfig(phase1_train_steps=7, phase2_train_steps=9).phases
    assert plan[0] == Phase("phase1", 7, 5e-4, ("handles",), False)
    assert plan[1] == Phase("phase2", 9, 2e-6, ("handles", "embedding", "unet", "text_encoder"), True)
    assert [phase.name for phase in TrainConfig(phase1_train_steps=0).phases] == ["phase2"]
    assert [phase.prior for phase in TrainConfig(exact_phase1=True).phases] == [True, True]
    assert [phase.prior for phase in TrainConfig(with_prior_preservation=False).phases] == [False, False]
    scaled = TrainConfig(scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3).phases
    assert [phase.lr for phase in scaled] == pytest.approx([3e-3, 1.2e-5])


# --- The loss -----------------------------------------------------------------------------------------------------


class FixedUNet:
    """Stands in for the UNet: whatever it is asked, it predicts its leaves, so that their gradient can be read."""

    def __init__(self, batch: Batch, prediction: torch.Tensor | None = None):
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(batch.z0.shape, generator=generator)
        self.prediction = (noise if prediction is None else prediction).requires_grad_(True)
        scores = torch.randn(3, len(batch.z0), 2, 4, 4, 77, generator=generator)
        self.probs = scores.softmax(-1).requires_grad_(True)
        self.asked = None

    def __call__(self, z_t, t, context, return_maps, pooled):
        self.asked = return_maps
        maps = [AttentionMap(place, p) for place, p in zip(("down", "mid", "up"), self.probs, strict=True)]
        return UNetOutput(self.prediction, maps)


def fixed_step(prepared, config, **choices):
    """The loss of one batch under a UNet of fixed outputs: (unet, batch, loss, parts)."""
    models, _ = prepared
    batch = draw(prepared, config)
    unet = FixedUNet(batch, **choices)
    loss, parts = training.training_step(replace(models, unet=unet), batch, config)
    loss.backward()
    return unet, batch, loss, parts


def test_loss_is_the_weighted_sum_of_its_parts(bench):
    """Each part computed apart from the step's own path, with weights other than the defaults."""
    config = bench.config(train_batch_size=3, prior_loss_weight=0.7, lambda_attention=0.3)
    prepared = bench.prepared(config)
    unet, batch, loss, parts = fixed_step(prepared, config)
    target = training_target(prepared[0].schedule, batch.z0, batch.eps, batch.t)
    error = (unet.prediction - target) ** 2
    assert torch.allclose(parts["reconstruction"], (error[:3] * batch.union**2).mean())
    assert torch.allclose(parts["prior"], error[3:].mean())
    average = unet.probs[[0, 2], :3].mean(dim=(0, 2))  # down and up, not the middle; (b, h, w, k)
    total = 0
    for row in range(3):
        for column, mask, present in zip(batch.positions[row], batch.masks[row], batch.present[row], strict=True):
            attention = average[row, :, :, column]
            total += present * ((attention / attention.max() - mask) ** 2).mean()
    assert torch.allclose(parts["attention"], total / 3)
    whole = parts["reconstruction"] + 0.7 * parts["prior"] + 0.3 * parts["attention"]
    assert torch.allclose(loss, whole)


def test_gradient_outside_the_mask_is_exactly_zero(bench):
    config = bench.config(with_prior_preservation=False, train_batch_size=4)
    unet, batch, _, _ = fixed_step(bench.prepared(config), config)
    outside = (batch.union == 0).expand_as(unet.prediction)
    assert 0.1 < outside.float().mean() < 0.9
    assert (unet.prediction.grad[outside] == 0).all()
    assert (unet.prediction.grad[~outside] != 0).all()


def test_without_the_masked_loss_the_whole_image_counts(bench):
    config = bench.config(with_prior_preservation=False, apply_masked_loss=False)
    unet, _, _, _ = fixed_step(bench.prepared(config), config)
    assert (unet.prediction.grad != 0).all()


def test_normalized_loss_is_divided_by_the_masked_share(bench):
    plain, normalized = (bench.config(normalize_masked_loss=flag, lambda_attention=0.0) for flag in (False, True))
    prepared = bench.prepared(plain)
    _, batch, _, parts = fixed_step(prepared, plain)
    _, _, _, scaled = fixed_step(prepared, normalized)
    assert torch.allclose(scaled["reconstruction"], parts["reconstruction"] / (batch.union**2).mean())


def test_attention_loss_reads_the_handles_columns_of_instance_rows(bench):
    """No gradient for class rows, for other tokens' columns, or for the maps of the middle block."""
    config = bench.config(train_batch_size=2, lambda_attention=1.0)
    unet, batch, _, _ = fixed_step(bench.prepared(config), config)
    assert unet.asked == (4, 4)
    down, middle, up = unet.probs.grad
    assert (middle == 0).all()
    assert torch.equal(down, up)
    assert (down[2:] == 0).all()
    for row in range(2):
        used = set(batch.positions[row][batch.present[row] == 1].tolist())
        touched = set(down[row].abs().amax(dim=(0, 1, 2)).nonzero().flatten().tolist())
        assert touched == used


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, {"reconstruction", "prior", "attention"}),
        ({"with_prior_preservation": False}, {"reconstruction", "attention"}),
        ({"lambda_attention": 0.0}, {"reconstruction", "prior"}),
        ({"lambda_attention": 0.0, "preset": "paper", "with_prior_preservation": False}, {"reconstruction"}),
    ],
)
def test_flags_leave_parts_of_the_loss_out(bench, flags, parts):
    config = bench.config(**flags)
    unet, _, loss, found = fixed_step(bench.prepared(config), config)
    assert found.keys() == parts
    assert (unet.asked is False) == ("attention" not in parts)
    if parts == {"reconstruction"}:
        assert torch.equal(loss, found["reconstruction"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_perfect_prediction_has_no_loss(bench, tmp_path, kind):
    """What the model should predict is the noise, or the velocity sqrt(a) eps - sqrt(1 - a) z0."""
    model = write_model(tmp_path / "model", kind)
    config = bench.config(pretrained_model_name_or_path=str(model), lambda_attention=0.0, train_batch_size=2)
    prepared = bench.prepared(config)
    batch = draw(prepared, config)
    a = prepared[0].schedule.alphas_cumprod[batch.t][:, None, None, None]
    perfect = batch.eps if kind == "epsilon" else a.sqrt() * batch.eps - (1 - a).sqrt() * batch.z0
    _, _, loss, _ = fixed_step(prepared, config, prediction=perfect.clone())
    assert loss < 1e-12


def test_single_subsets_show_one_concept(bench):
    config = bench.config(subset_sampling="single", train_batch_size=12)
    assert (draw(bench.prepared(config), config).present.sum(dim=1) == 1).all()


# --- One optimizer step -------------------------------------------------------------------------------------------


def take_step(models, batches, config, phase):
    """One optimizer step of plain SGD at rate 1: returns what it returns, and how far each parameter moved."""
    trained = trainable_parameters(models, phase)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = PhaseState(MasterWeights(trained, {}), optimizer, scaler, "no")
    values = training.optimizer_step(models, batches, config, state)
    moved = {name: (before[name] - p).detach() for name, p in trained.items()}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(before[name])
    assert all(p.grad is None for p in trained.values())
    return values, moved


def norm_of(tensors) -> torch.Tensor:
    """The joint Euclidean norm."""
    return torch.cat([t.flatten() for t in tensors]).norm()


def test_accumulated_gradient_is_the_mean_over_the_batches(bench):
    """Two batches of one row move the weights as their mean gradient does, and as one batch of both rows."""
    config = bench.config(gradient_accumulation_steps=2, max_grad_norm=0.0)
    prepared = bench.prepared(config)
    one, two = draw(prepared, config, seed=1), draw(prepared, config, seed=2)
    values, moved = take_step(prepared[0], [one, two], config, EVERYTHING)
    losses = [training.training_step(prepared[0], batch, config)[0].item() for batch in (one, two)]
    assert values["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    each = [gradients(prepared[0], batch, config) for batch in (one, two)]
    halves = {name: [getattr(batch, name) for batch in (one, two)] for name in vars(one)}
    rows = ("z0", "eps", "t", "input_ids")  # instances first, then class images
    joined = {name: torch.cat([half[[row]] for row in (0, 1) for half in halves[name]]) for name in rows}
    both = Batch(**{name: torch.cat(parts) for name, parts in halves.items()} | joined)
    joint = gradients(prepared[0], both, config)
    scale = norm_of(joint.values())
    for name, step in moved.items():
        mean = (each[0][name] + each[1][name]) / 2
        assert (step - mean).abs().max() < 1e-6 * scale, name
        assert (step - joint[name]).abs().max() < 1e-5 * scale, name


def test_gradients_are_clipped_to_the_joint_norm(bench):
    config = bench.config(max_grad_norm=0.01)
    prepared = bench.prepared(config)
    batch = draw(prepared, config)
    free = gradients(prepared[0], batch, config)
    values, moved = take_step(prepared[0], [batch], config, EVERYTHING)
    assert values["grad_norm"] == pytest.approx(norm_of(free.values()).item(), rel=1e-5)
    assert norm_of(moved.values()) == pytest.approx(0.01, rel=1e-3)
    values, moved = take_step(prepared[0], [batch], replace(config, max_grad_norm=0.0), EVERYTHING)
    assert norm_of(moved.values()) == pytest.approx(values["grad_norm"].item(), rel=1e-4)


class Readings(TorchDispatchMode):
    """Counts the operations that make a program wait for the device."""

    WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("phase", [HANDLES, EVERYTHING])
def test_a_step_reads_nothing_from_the_device(bench, tmp_path, phase):
    """No `.item()` and no boolean indexing in forward, backward, clipping, or in noting the losses."""
    config = bench.config(train_batch_size=2)
    prepared = bench.prepared(config)
    batch = draw(prepared, config)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with Readings() as readings:
        values, _ = take_step(prepared[0], [batch], config, phase)
        log.add("phase", 1, 0.1, values)
    assert readings.seen == []
    with readings:
        assert values["loss"].item() > 0
    assert readings.seen == ["_local_scalar_dense"]  # the mode does notice


def test_exact_phase1_prior_cannot_reach_the_handles_but_the_clipping(bench, tmp_path):
    """The class prompt holds no handle: gradient exactly zero. The norm is that of the whole embedding."""
    config = bench.config(tmp_path / "run", exact_phase1=True, phase1_train_steps=1, phase2_train_steps=0)
    models, data = bench.prepared(config)
    batch = draw((models, data), config, phase=0)
    assert len(batch.z0) == 2
    trained = trainable_parameters(models, HANDLES)
    _, parts = training.training_step(models, batch, config)
    (gradient,) = torch.autograd.grad(parts["prior"], [trained["handles"]], retain_graph=True)
    assert (gradient == 0).all()
    whole = gradients(models, batch, config, Phase("", 1, 0.0, ("handles", "embedding"), True))
    run = bas.train(config)
    (row,) = metrics(run)
    assert row["grad_norm"] == pytest.approx(norm_of(whole.values()).item(), rel=1e-4)
    assert row["grad_norm"] > 1.5 * whole["handles"].norm()
    assert changed(bench, run)[0] == set()


# --- Sizes, precision, memory -------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(bench):
    """The same losses, the attention loss among them, and the same gradients."""
    config = bench.config()
    prepared = bench.prepared(config)
    models, batch = prepared[0], draw(prepared, config)
    plain = training.training_step(models, batch, config)[1], gradients(models, batch, config)
    models.unet.set_gradient_checkpointing(True)
    saving = training.training_step(models, batch, config)[1], gradients(models, batch, config)
    for ours, theirs in zip(saving, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=1e-6, atol=1e-9), name


def test_fp16_comes_close_to_fp32(bench):
    """Under autocast, as fp16 trains; how close bf16 comes, whose weights are rounded, is in test_masters.py."""
    config = bench.config(train_batch_size=2)
    prepared = bench.prepared(config)
    models, batch = prepared[0], draw(prepared, config)
    exact, parts = gradients(models, batch, config), training.training_step(models, batch, config)[1]
    with autocast(torch.device("cpu"), "fp16"):
        rough, rough_parts = gradients(models, batch, config), training.training_step(models, batch, config)[1]
    for name, value in parts.items():
        assert rough_parts[name].dtype == torch.float32
        assert rough_parts[name].item() == pytest.approx(value.item(), rel=1e-3), name
    ours, theirs = (torch.cat([g.flatten() for g in found.values()]) for found in (rough, exact))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999
    assert all(g.dtype == torch.float32 for g in rough.values())


@pytest.mark.parametrize(
    ("flags", "size", "sides"),
    [
        ({"resolution": 40}, (32, 32), (40, 40)),
        ({}, (52, 32), (48, 32)),
        ({}, (30, 61), (32, 64)),
        ({"center_crop": True}, (52, 32), (32, 32)),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 2}, (32, 32), (32, 32)),
        ({"gradient_checkpointing": True}, (32, 32), (32, 32)),
        ({"mixed_precision": "bf16"}, (32, 32), (32, 32)),
        ({"exact_phase1": True, "train_batch_size": 2}, (32, 32), (32, 32)),
        ({"with_prior_preservation": False, "train_batch_size": 2, "attention_grid": 8}, (32, 32), (32, 32)),
    ],
)
def test_runs_of_many_kinds_end_well(bench, tmp_path, flags, size, sides):
    scene = write_scene(tmp_path / "scene", concepts=2, size=size)
    choices = {"instance_data_dir": str(scene), "phase1_train_steps": 1, "phase2_train_steps": 1}
    run = bas.train(bench.config(tmp_path / "run", **choices, **flags))
    tensors, note = read_concepts(run)
    assert tensors["masks"].shape == (2, sides[1], sides[0])
    assert note["handles"] == ["<asset0>", "<asset1>"]
    assert bas.load(run).resolution == min(sides)  # at which its images are drawn
    assert all(torch.tensor(row["loss"]).isfinite() for row in metrics(run))


# --- The run folder -----------------------------------------------------------------------------------------------


def test_each_phase_has_its_own_course(bench, tmp_path):
    """The rate that is written is the rate that is used: a warm-up's first step moves nothing."""
    flags = {"lr_scheduler": "linear", "lr_warmup_steps": 1, "phase1_train_steps": 3, "phase2_train_steps": 3}
    rows = metrics(bas.train(bench.config(tmp_path / "run", **flags)))
    assert [row["lr"] for row in rows] == pytest.approx([0, 5e-4, 2.5e-4, 0, 2e-6, 1e-6])
    one = bench.config(tmp_path / "one", **flags | {"phase1_train_steps": 1, "phase2_train_steps": 0})
    assert torch.equal(changed(bench, bas.train(one))[1], initial_handles(bench, one))


def test_metrics_have_one_line_per_step(bench, tmp_path):
    run = bas.train(bench.config(tmp_path / "run", phase1_train_steps=2, phase2_train_steps=3))
    rows = metrics(run)
    assert [(row["phase"], row["step"]) for row in rows] == [
        *(("phase1", step) for step in (1, 2)),
        *(("phase2", step) for step in (3, 4, 5)),
    ]
    assert list(rows[0]) == ["phase", "step", "lr", "loss", "reconstruction", "attention", "grad_norm"]
    assert list(rows[2]) == ["phase", "step", "lr", "loss", "reconstruction", "prior", "attention", "grad_norm"]
    for row in rows:
        total = row["reconstruction"] + row.get("prior", 0) + 0.01 * row["attention"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_a_seed_decides_and_watching_changes_nothing(bench, tmp_path):
    """The same bits again, also with previews and checkpoints in between; other bits with another seed."""
    first = bas.train(bench.config(tmp_path / "first"))
    watch = {"img_log_steps": 2, "checkpointing_steps": 1, "preview_inference_steps": 2, "log_steps": 4}
    second = bas.train(bench.config(tmp_path / "second", **watch))
    other = bas.train(bench.config(tmp_path / "other", seed=1))
    assert file_hashes(first) == file_hashes(second)
    assert file_hashes(first)["metrics.jsonl"] != file_hashes(other)["metrics.jsonl"]
    assert sorted(path.name for path in (second / "previews").glob("step-*.png")) == [
        f"step-{step:06d}.png" for step in (2, 4, 6)
    ]
    assert not (second / "checkpoints").exists()


def test_concepts_file_says_what_was_learnt(bench, tmp_path):
    config = bench.config(tmp_path / "run", handles=("<toy>", "<Bowl>", "<x-1>"))
    run = bas.train(config)
    tensors, note = read_concepts(run)
    assert note["handles"] == ["<toy>", "<Bowl>", "<x-1>"]
    assert torch.equal(tensors["handles"], changed(bench, run)[1])
    _, masks = bas.data.scene_folder.load_scene(config).tensors(32, 8)
    assert torch.equal(tensors["masks"], (masks * 255).round().to(torch.uint8))
    assert note["base"] == bas.pretrained.hashes.weights_hash(bench.model)
    assert note["config"]["learning_rate"] == 2e-6
    assert note["version"] == bas.__version__


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_diffusers_opens_a_run(bench, tmp_path, precision):
    """The same token ids for the handles and, in float32, the same text states and predictions."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    choices = {"phase1_train_steps": 1, "phase2_train_steps": 1, "save_precision": precision}
    run = bas.train(bench.config(tmp_path / "run", **choices))
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for tensor in saved_tensors(run).values()} == {dtype}
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(run, local_files_only=True).to(torch.float32)
    models = load(run)
    assert models.handles == ("<asset0>", "<asset1>", "<asset2>")
    prompt = "a photo of <asset1> and <asset2> at the beach"
    theirs = pipeline.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(theirs.input_ids, tokenize(models.tokenizer, [prompt]))
    assert set(models.tokenizer.convert_tokens_to_ids(["<asset1>", "<asset2>"])) < set(theirs.input_ids[0].tolist())
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        context = encode_ids(models.text_encoders, tokenize(models.tokenizer, [prompt])).states
        expected = pipeline.text_encoder(theirs.input_ids).last_hidden_state
        assert (context - expected).abs().max() < 1e-5
        prediction = models.unet(z, t, context, return_maps=False).sample
        assert (prediction - pipeline.unet(z, t, expected).sample).abs().max() < 1e-5


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_for_the_training_alone(bench, tmp_path, monkeypatch, allowed):
    """Within the steps as the flag says; on a CPU, the switches then stand as the caller had set them."""
    seen, backends = [], (torch.backends.cuda.matmul, torch.backends.cudnn)
    before_step(monkeypatch, 2, lambda *_: seen.extend(backend.allow_tf32 for backend in backends))
    with tf32(not allowed):
        bas.train(bench.config(tmp_path / "run", allow_tf32=allowed))
        assert [backend.allow_tf32 for backend in backends] == [not allowed] * 2
    assert seen == [allowed] * 2


def test_folder_trained_by_the_official_code_opens(bench, tmp_path):
    """That code adds tokens with transformers, resizes the embedding, and saves with diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(bench.model, local_files_only=True)
    base = len(pipeline.tokenizer)
    assert pipeline.tokenizer.add_tokens(["<asset0>", "<asset1>"]) == 2
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[base:] = torch.arange(32.0).reshape(2, 16) / 32
    pipeline.save_pretrained(tmp_path / "official")
    models = bas.load(tmp_path / "official")
    assert models.handles == ("<asset0>", "<asset1>")
    prompt = "a photo of <asset1> at the beach"
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids).last_hidden_state
        ours = encode_ids(models.text_encoders, tokenize(models.tokenizer, [prompt])).states
    assert (ours - expected).abs().max() < 1e-5
    (image,) = bas.sample(models, prompt, num_inference_steps=2)
    assert image.size == (32, 32)
