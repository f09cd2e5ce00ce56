"""The baselines: what they learn from, what they train, and which settings they leave no choice about."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bas
from bas.config import TrainConfig
from bas.data.batches import prepare, sample_batch
from bas.data.collages import collect, scene_for_method
from bas.data.scene import Scene, with_background
from bas.data.scene_folder import load_scene
from bas.io.images import to_floats
from bas.presets import CARDS, CARDS_XL, METHODS, Phase
from bas.pretrained.folder import build_on_meta
from bas.training.disk_space import count_numbers, files_to_come
from bas.training.phase_state import trainable_parameters
from tests.helpers.tiny import WEIGHTS, refused, write_scene


def plan(**explicit) -> list[tuple]:
    """The phases of these flags, without their names."""
    return [(p.steps, p.lr, p.trains, p.prior) for p in TrainConfig.resolve(explicit).phases]


def baseline(bench, run, method: str, **changes) -> TrainConfig:
    """The bench's short training by another method."""
    values = vars(bench.config(run)) | {"method": method, "collection_size": 4} | changes
    plain = ("apply_masked_loss", "lambda_attention", "subset_sampling")
    return TrainConfig.resolve({name: value for name, value in values.items() if name not in plain})


# --- Rows ---------------------------------------------------------------------------------------------------------


def test_rows_of_the_methods():
    """One phase of 800 steps; the rates that the methods are known by."""
    everything = ("handles", "embedding", "unet", "text_encoder")
    assert plan(method="ti") == plan(method="ti-m") == [(800, 5e-4, ("handles",), False)]
    assert plan(method="db") == plan(method="db-m") == [(800, 2e-6, everything, True)]
    assert plan(method="cd-m") == [(800, pytest.approx(1e-5), ("handles", "cross_attention_kv"), True)]
    assert plan(method="db", train_text_encoder=False)[0][2] == everything[:3]
    assert plan(method="db", train="cross_attention")[0][2][2] == "cross_attention"
    assert plan(method="db", train="lora")[0][1:3] == (1e-4, ("handles", "unet_lora", "text_encoder_lora"))
    with refused("--method cd-m decides what is trained", "--train lora"):
        plan(method="cd-m", train="lora")
    assert plan(method="db", with_prior_preservation=False)[0][3] is False
    assert plan(method="db", phase1_train_steps=0, phase2_train_steps=0) == []
    assert len(plan(method="bas")) == len(plan()) == 2


def test_what_a_method_trains_is_not_for_a_card_or_a_model_to_say():
    """Custom Diffusion keeps its rate and saves whole weights; adapters would be refused as the weights of the run."""
    alone = [(800, pytest.approx(1e-5), ("handles", "cross_attention_kv"), True)]
    for explicit, row, cards in (
        ({"card": "8gb"}, {}, CARDS),
        ({"card": "16gb"}, {}, CARDS_XL),
        ({}, {"train": "lora"}, CARDS),
        ({"card": "6gb"}, {"train": "kv"}, CARDS),
    ):
        config = TrainConfig.resolve({"method": "cd-m", **explicit}, row, cards)
        assert [(p.steps, p.lr, p.trains, p.prior) for p in config.phases] == alone
        assert (config.train, config.save_precision) == ("full", "fp32")
    assert TrainConfig.resolve({"method": "db-m", "card": "8gb"}).train == "lora"


def test_a_baseline_has_the_plain_loss():
    """Whatever the model's own row says of the attention loss; asking for it is refused rather than ignored."""
    for method in METHODS:
        config = TrainConfig.resolve({"method": method}, {"lambda_attention": 0.3, "seg_mix_probability": 0.8})
        assert config.seg_mix_probability == 0
        assert (config.apply_masked_loss, config.lambda_attention, config.subset_sampling) == (False, 0.0, "all")
    with refused("--method db-m", "lambda_attention"):
        TrainConfig.resolve({"method": "db-m", "lambda_attention": 0.01})
    with refused("--method ti-m", "seg_mix_probability"):
        TrainConfig.resolve({"method": "ti-m", "seg_mix_probability": 0.5})
    with refused("--method ti-m", "exact_phase1"):
        TrainConfig.resolve({"method": "ti-m", "exact_phase1": True})
    with refused("--method ti", "apply_masked_loss, lambda_attention, subset_sampling"):
        TrainConfig(method="ti")


# --- What they learn from -----------------------------------------------------------------------------------------


def inside(masks: list[np.ndarray]) -> np.ndarray:
    return to_floats(np.maximum.reduce(masks))


def test_a_collection_holds_the_concepts_on_plain_colours(bench):
    """Inside the masks the image, outside one colour, its own for every image; the first shows everything."""
    scene = load_scene(bench.config())
    collection = collect(scene, 40, seed=3)
    assert (collection.handles, collection.words, len(collection.extra_images)) == (scene.handles, scene.words, 39)
    photo, colours, shown = np.asarray(scene.image), [], []
    views = collection.images
    for image, masks in views:
        union, pixels = inside(list(masks.values())), np.asarray(image)
        assert np.array_equal(pixels[union == 1], photo[union == 1])
        (colour,) = {tuple(pixel) for pixel in pixels[union == 0].tolist()}
        soft = (union > 0) & (union < 1)
        mixed = photo[soft] * union[soft][:, None] + np.array(colour) * (1 - union[soft])[:, None]
        assert np.abs(pixels[soft] - mixed).max() <= 0.5
        colours.append(colour)
        shown.append(tuple(masks))
        assert all(masks[i] is scene.masks[i] for i in masks)
    assert shown[0] == (0, 1, 2)
    assert {len(subset) for subset in shown} == {1, 2, 3}
    assert len(set(colours)) == 40
    again = collect(scene, 40, seed=3)
    assert all(
        np.array_equal(a.image, b.image) for a, b in zip(collection.extra_images, again.extra_images, strict=True)
    )
    assert not np.array_equal(collect(scene, 1, seed=4).image, collection.image)


def test_a_collection_draws_from_every_image(bench):
    """Each with its own concepts; a background that was asked for is one of them."""
    scene = with_background(load_scene(bench.config()), "bg")
    further = collect(scene, 2, seed=0).extra_images[0]
    several = Scene(scene.image, scene.masks, scene.handles, scene.words, (further,))
    shots = collect(several, 60, seed=1).extra_images
    assert any(set(shot.masks) <= set(further.masks) for shot in shots)
    assert any(3 in shot.masks for shot in shots)


def test_prompt_and_image_of_a_collection_agree(bench):
    """Each row names exactly the handles that its image shows, in random order, and a flip moves both."""
    config = baseline(bench, "run", "db-m", collection_size=6, train_batch_size=64)
    scene = scene_for_method(config)
    models, _ = bench.prepared(config)
    image, masks = scene.tensors(models.resolution, models.size_multiple)
    data = prepare(models, scene, image, masks, config, None)
    handles = dict(zip(scene.handles, data.handle_ids, strict=True))
    phase = Phase("x", 1, 0.0, ("handles",), False)
    batch = sample_batch(data, models, phase, config, torch.Generator().manual_seed(0))
    sets = {frozenset(range(3)), *(frozenset(shot.masks) for shot in scene.extra_images)}
    named = [
        frozenset(i for i, key in enumerate(handles.values()) if key in row)
        for row in map(torch.Tensor.tolist, batch.input_ids)
    ]
    assert set(named) == sets
    assert [int(row.sum()) for row in batch.present] == [len(subset) for subset in named]
    assert len({tuple(row.tolist()) for row in batch.input_ids}) > len(sets)


def test_naive_baselines_see_the_image_under_one_prompt(bench):
    config = baseline(bench, "run", "ti", train_batch_size=16)
    scene = scene_for_method(config)
    assert np.array_equal(scene.image, load_scene(config).image)
    assert scene.extra_images == ()
    models, data = bench.prepared(config)
    phase = Phase("x", 1, 0.0, ("handles",), False)
    batch = sample_batch(data, models, phase, config, torch.Generator().manual_seed(0))
    assert (batch.present == 1).all()


def test_naive_baselines_see_no_close_ups(bench, tmp_path):
    """Those are cut around masks, of which a naive baseline knows nothing."""
    scene = write_scene(tmp_path / "scene", concepts=2, size=(64, 64))
    for i in range(2):
        mask = np.zeros((64, 64), np.uint8)
        mask[8:20, 8 + 32 * i : 20 + 32 * i] = 255
        Image.fromarray(mask).save(scene / f"mask{i}.png")
    choices = {"instance_data_dir": str(scene), "close_ups": True}
    assert load_scene(baseline(bench, "run", "db", **choices)).extra_images != ()
    assert scene_for_method(baseline(bench, "run", "db", **choices)).extra_images == ()
    assert len(scene_for_method(baseline(bench, "run", "db-m", **choices)).extra_images) == 3


# --- What they train ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "moved"),
    [
        ("ti-m", set()),
        ("cd-m", {"unet: to_k, to_v of cross-attention"}),
        ("db-m", {"unet: to_k, to_v of cross-attention", "unet: the rest", "text_encoder"}),
    ],
)
def test_a_baseline_moves_what_its_row_says(bench, tmp_path, method, moved):
    """Weight by weight, and the handles in any case; the VAE and, but for db-m, the vocabulary keep their bits."""
    config = baseline(bench, tmp_path / "run", method, learning_rate=1e-3, initial_learning_rate=1e-3)
    run = bas.train(config)
    found, embedding = set(), 0
    for file in WEIGHTS:
        before, after, network = load_file(bench.model / file), load_file(run / file), file.split("/")[0]
        for name, tensor in before.items():
            part = network
            if network == "unet":
                pair = ".attn2.to_k." in name or ".attn2.to_v." in name
                part = f"unet: {'to_k, to_v of cross-attention' if pair else 'the rest'}"
            if name.endswith("token_embedding.weight"):
                embedding = int(not torch.equal(after[name][: len(tensor)], tensor))
                continue
            if not torch.equal(tensor, after[name]):
                found.add(part)
    assert found == moved
    assert embedding == (method == "db-m")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == [method] * 6
    assert all("attention" not in row and ("prior" in row) == (method != "ti-m") for row in rows)
    handles = load_file(run / "concepts.safetensors")["handles"]
    first = bench.prepared(config)[0].text_encoder.get_input_embeddings().handles
    assert (handles != first).all(dim=1).all()
    assert sorted(path.name for path in (run / "scene").iterdir() if path.is_dir()) == ["1", "2", "3"]


def test_custom_diffusion_trains_every_cross_attention_layer(bench):
    models, _ = bench.prepared(bench.config())
    trained = trainable_parameters(models, Phase("x", 1, 0.0, ("handles", "cross_attention_kv"), True))
    layers = [name for name, _ in models.unet.named_modules() if name.endswith("attn2")]
    expected = {f"unet.{layer}.{side}.weight" for layer in layers for side in ("to_k", "to_v")}
    assert len(layers) == 7
    assert trained.keys() == expected | {"handles"}


def test_room_for_checkpoints_counts_what_a_method_trains(bench):
    """State of 12 bytes for each number: the file that a checkpoint writes."""
    models = build_on_meta(bench.model)[0]
    numbers = count_numbers(models)
    config = baseline(bench, "run", "cd-m", checkpointing_steps=1)
    files = files_to_come(numbers, config)
    pairs = sum(
        p.numel() for name, p in models.unet.named_parameters() if ".attn2.to_k" in name or ".attn2.to_v" in name
    )
    assert files["checkpoints, while training"] == 2 * 12 * pairs
    unet = sum(p.numel() for p in models.unet.parameters())
    assert numbers["unet"] == unet
    whole = files_to_come(numbers, bench.config(checkpointing_steps=1))
    text = sum(p.numel() for p in models.text_encoder.parameters())
    assert whole["checkpoints, while training"] == 2 * 12 * (unet + text)
