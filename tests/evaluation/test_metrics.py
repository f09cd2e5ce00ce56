"""The metrics on known cases, and through tiny models beside a direct computation with transformers."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from bas.evaluation.masking import blacken
from bas.evaluation.metrics import (
    IdentitySimilarity,
    Metrics,
    PromptSimilarity,
    attention_iou,
    class_prompt,
    leakage,
)
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.evaluation.segments import Segmenter, read_segments, segment_by_attention
from bas.pretrained.folder import load
from bas.pretrained.hub import find
from tests.helpers.tiny import refused, tokenizer
from tools.checks.metrics import KINDS, make_trial, object_score, ranked_right, through_vae
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import DEMO_SCENES, Layout

PROMPTS = ["a photo of a bowl at the beach", "a stone", "a photo of a creature"]


@pytest.fixture(scope="module")
def images():
    """Three images of 40x30 pixels."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 255, (3, 4, 5, 3), dtype=np.uint8)
    return [Image.fromarray(array).resize((40, 30), Image.Resampling.BICUBIC) for array in small]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random CLIP and DINO, as folders."""
    root = tmp_path_factory.mktemp("metrics")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"clip": write_clip(root / "clip"), "dino": write_dino(root / "dino")}


TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_clip(folder):
    words = tokenizer(folder)
    text = {**TOWER, "vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def write_dino(folder):
    config = hf.ViTConfig(**TOWER, image_size=32, patch_size=8, initializer_range=0.2)
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def half_mask():
    mask = np.zeros((30, 40), np.float32)
    mask[5:25, 8:30] = 1
    mask[5:25, 30] = 0.5
    return mask


# --- Black masks --------------------------------------------------------------------------------------------------


def test_what_the_mask_leaves_out_is_black_and_the_rest_as_it_was(images):
    mask, before = half_mask(), np.array(images[0])
    after = np.array(blacken(images[0], mask))
    assert np.array_equal(after[mask == 1], before[mask == 1])
    assert not after[mask == 0].any()
    assert np.abs(after[mask == 0.5] - before[mask == 0.5] / 2).max() <= 0.5
    with pytest.raises(ValueError, match="a mask of"):
        blacken(images[0], mask.T)


# --- CLIP and DINO ------------------------------------------------------------------------------------------------


def test_prompt_similarity_is_clips_cosine_of_each_image_with_its_own_prompt(folders, images):
    model = hf.CLIPModel.from_pretrained(folders["clip"]).eval()
    processor = hf.CLIPProcessor(
        hf.CLIPImageProcessorPil.from_pretrained(folders["clip"]), hf.CLIPTokenizer.from_pretrained(folders["clip"])
    )
    inputs = processor(text=PROMPTS, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    found = PromptSimilarity(str(folders["clip"])).prompt_similarity(images, PROMPTS)
    assert found == pytest.approx(logits.diag().tolist(), abs=1e-5)
    assert len({round(value, 3) for value in logits.flatten().tolist()}) > 3  # pairs differ, so that the diagonal tells


def test_a_model_is_loaded_without_a_bar_among_our_own_lines(folders, capfd):
    PromptSimilarity(str(folders["clip"]))
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


def test_a_prompt_longer_than_the_model_reads_is_cut(folders, images):
    clip = PromptSimilarity(str(folders["clip"]))
    longer, cut = " ".join(["bowl"] * 200), " ".join(["bowl"] * 75)
    assert clip.prompt_similarity(images[:1], [longer]) == clip.prompt_similarity(images[:1], [cut])


def test_identity_similarity_is_dinos_cosine_of_black_masked_images(folders, images):
    mask, segments = half_mask(), [half_mask(), half_mask()[::-1].copy(), half_mask()[:, ::-1].copy()]
    model = hf.ViTModel.from_pretrained(folders["dino"], add_pooling_layer=False).eval()
    processor = hf.ViTImageProcessorPil.from_pretrained(folders["dino"])
    masked = [
        Image.fromarray((np.array(image) * layer[..., None]).round().astype(np.uint8))
        for image, layer in zip([images[1], *images], [mask, *segments], strict=True)
    ]
    with torch.no_grad():
        features = model(**processor(masked, return_tensors="pt")).last_hidden_state[:, 0]
    wanted = F.cosine_similarity(features[1:], features[:1]).tolist()
    found = IdentitySimilarity(str(folders["dino"])).identity_similarity(images, images[1], mask, segments)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert min(wanted) < 0.99


def test_the_same_concept_is_1_whatever_is_behind_it(folders, images):
    mask = (half_mask() == 1).astype(np.float32)
    elsewhere = Image.composite(images[0], images[2], Image.fromarray((mask * 255).astype(np.uint8)))
    dino = IdentitySimilarity(str(folders["dino"]))
    same, behind, other = dino.identity_similarity([images[0], elsewhere, images[1]], images[0], mask, [mask] * 3)
    assert same == pytest.approx(1, abs=1e-6)
    assert behind == pytest.approx(1, abs=1e-6)
    assert other < 0.999
    assert dino.identity_similarity([elsewhere], images[0], mask)[0] < 0.999  # without a segment it counts


def test_a_batch_changes_nothing(folders, images, monkeypatch):
    many, mask = images * 2, half_mask()
    metrics = Metrics.photographs(clip=str(folders["clip"]), dino=str(folders["dino"]))
    whole = metrics.prompt_similarity(many, PROMPTS * 2), metrics.identity_similarity(many, many[0], mask)
    monkeypatch.setattr("bas.evaluation.metrics.AT_ONCE", 4)
    parts = metrics.prompt_similarity(many, PROMPTS * 2), metrics.identity_similarity(many, many[0], mask)
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_models_that_are_not_here_or_of_another_kind_are_named(folders, tmp_path):
    with refused("openai/none is not downloaded yet: run `hf download openai/none`, or name a folder with --clip"):
        PromptSimilarity("openai/none")
    for name in ("nowhere", "~nobody/clip", "x" * 300):
        with refused(f"--dino {name} is neither a folder nor a hub id"):
            IdentitySimilarity(name)
    with refused(f"{folders['clip']} is a model of type clip: this method needs vit"):
        IdentitySimilarity(str(folders["clip"]))
    pickled = write_dino(tmp_path / "dino")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with refused(f"{pickled} cannot be used"):
        IdentitySimilarity(str(pickled))


DAMAGE = {  # to the file of a CLIP's folder: its new bytes
    "model.safetensors": lambda old: old[: len(old) // 2],
    "config.json": lambda old: old.replace(b'"projection_dim": 12', b'"projection_dim": "x"'),
    "preprocessor_config.json": lambda old: b"{",
    "merges.txt": lambda old: b"#version: 0.2\nbowl bowl bowl\n",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_named(name, folders, tmp_path):
    """Whatever kind of error a library raises for it."""
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(DAMAGE[name](before))
    assert (folder / name).read_bytes() != before
    with refused(str(folder), "cannot be used"):
        PromptSimilarity(str(folder))


@pytest.mark.parametrize(("name", "kind"), [("clip", PromptSimilarity), ("dino", IdentitySimilarity)])
def test_a_model_with_weights_that_are_no_numbers_is_refused(name, kind, folders, tmp_path):
    """One of them would make every similarity not a number."""
    folder = shutil.copytree(folders[name], tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    first = min(key for key in tensors if key.endswith("layernorm.weight" if name == "dino" else "norm1.weight"))
    tensors[first][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with refused(f"{folder} holds 1 weights that are not finite numbers, ", f"{first} first: download it again"):
        kind(str(folder))


def test_handles_become_class_names():
    names = {"<asset0>": "bowl", "<asset1>": "toy dog"}
    assert class_prompt("a photo of <asset1> and <asset0> at the beach", names) == (
        "a photo of toy dog and bowl at the beach"
    )


# --- The miniature ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def playroom():
    """The demo's scene: image and masks."""
    image, masks = draw(DEMO_SCENES["playroom"], 64)
    return Image.fromarray(image), masks


def alone(scene, index, background="snow"):
    """One object of a demo scene, alone somewhere else."""
    return Image.fromarray(draw(Layout(DEMO_SCENES[scene].objects[index : index + 1], background, 5), 64)[0])


def test_an_object_in_its_own_image_is_1(playroom):
    image, masks = playroom
    for mask in masks:
        assert ObjectSimilarity().identity_similarity([image], image, mask) == pytest.approx([1], abs=1e-4)


def test_the_object_elsewhere_and_mirrored_is_near_1_and_a_swapped_one_lower(playroom):
    image, masks = playroom
    shown = alone("playroom", 0)
    images = [shown, shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT), alone("playroom", 1), alone("shore", 0)]
    same, mirrored, swapped, foreign = ObjectSimilarity().identity_similarity(images, image, masks[0])
    assert same > 0.95
    assert mirrored == pytest.approx(same, abs=0.02)
    assert max(swapped, foreign) < same - 0.15


def test_where_a_segment_is_black_nothing_is_found(playroom):
    image, masks = playroom
    whole, without = masks[0] > 0, masks[0] == 0
    segments = [layer.astype(np.float32) for layer in (whole, without)]
    inside, outside = ObjectSimilarity().identity_similarity([image, image], image, masks[0], segments)
    assert inside > 0.99
    assert outside < 0.8


def test_an_object_too_small_to_see_is_refused(playroom):
    image, _ = playroom
    speck = np.zeros((64, 64), np.float32)
    speck[3, 3] = 1
    with refused("a mask covers no cell"):
        ObjectSimilarity().identity_similarity([image], image, speck)


def test_leakage_is_the_similarity_of_each_handles_images_to_each_object(playroom):
    image, masks = playroom
    drawn = [[alone("playroom", i), alone("playroom", i, "water")] for i in (0, 1, 2)]
    clean = leakage(ObjectSimilarity(), drawn, image, list(masks))
    assert clean.shape == (3, 3)
    assert (clean.argmax(axis=1) == [0, 1, 2]).all()
    leaked = leakage(ObjectSimilarity(), [drawn[1], drawn[1], drawn[2]], image, list(masks))
    assert leaked[0].argmax() == 1
    assert np.array_equal(leaked[1:], clean[1:])


def test_the_true_object_ranks_above_others_in_95_percent_of_trials():
    """A part of the validation that tools/checks/metrics.py prints in full."""
    for kind in KINDS:
        trials = [make_trial(i, kind) for i in range(25)]
        pairs, _ = ranked_right([object_score(trial, trial.images) for trial in trials])
        assert pairs >= 0.95, kind


@pytest.mark.slow
def test_the_true_object_ranks_above_others_through_the_vae():
    """As all that a model draws is."""
    trials = [make_trial(i, KINDS[0]) for i in range(20)]
    rebuilt = through_vae(load(find(None)), [image for trial in trials for image in trial.images])
    scores = [object_score(trial, rebuilt[4 * i : 4 * i + 4]) for i, trial in enumerate(trials)]
    assert ranked_right(scores)[0] >= 0.95


def test_the_miniatures_clip_prefers_the_place_that_an_image_shows():
    places = ["at the beach", "in the jungle", "in the snow"]
    names = ["beach", "jungle", "snow"]
    images = [alone("playroom", 0, name) for name in names for _ in places]
    prompts = [f"a photo {place}" for _ in names for place in places]
    found = np.array(Metrics.miniature().prompt_similarity(images, prompts)).reshape(3, 3)
    assert (found.argmax(axis=1) == [0, 1, 2]).all()


# --- Attention and segments ---------------------------------------------------------------------------------------


def test_attention_iou_on_counted_cells():
    mask = torch.zeros(1, 8, 8)
    mask[0, :4] = 1  # rows 0 and 1 of a 4x4 grid
    maps = torch.full((1, 4, 4), 0.1)
    maps[0, 1:3] = 0.9  # rows 1 and 2: one of three rows is shared
    assert attention_iou(maps, mask) == pytest.approx([1 / 3])
    assert attention_iou(torch.zeros(1, 4, 4), torch.zeros(1, 8, 8)) == [0.0]


def test_a_segment_from_attention_is_what_lies_above_half_the_maximum():
    attention = np.zeros((4, 4), np.float32)
    attention[1:3, 1:3] = 0.2
    segment = segment_by_attention(attention, (16, 16))
    assert set(np.unique(segment)) == {0, 1}
    assert segment[5:11, 5:11].all()
    assert np.array_equal(segment, segment[::-1, ::-1])
    assert not segment[[0, 1, 2, 13, 14, 15]].any()  # two of the map's cells, and a little around them


def test_segments_from_files_have_their_images_size(images, tmp_path):
    Image.fromarray((half_mask() * 255).astype(np.uint8)).save(tmp_path / "a.png")
    (found,) = read_segments([tmp_path / "a.png"], images[:1])
    assert np.abs(found - half_mask()).max() < 0.003
    with refused("a.png is 40x30, its image 30x40"):
        read_segments([tmp_path / "a.png"], [images[0].transpose(Image.Transpose.ROTATE_90)])


@pytest.mark.parametrize("kind", ["maskformer", "mask2former"])
def test_segments_by_class_word_are_the_models_semantic_ones(kind, images, tmp_path):
    pytest.importorskip("scipy", reason="scipy, without which transformers builds neither, is not installed")
    model, processor = write_segmenter(kind, tmp_path)
    with torch.no_grad():
        outputs = model(**processor(images[0], return_tensors="pt"))
    (wanted,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(30, 40)])
    segmenter = Segmenter(str(tmp_path))
    masks = {word: segmenter.segments(images[:1], word)[0] for word in ("dog", "Wall")}
    assert np.array_equal(masks["dog"], (wanted == 0).numpy())
    assert np.array_equal(masks["Wall"], (wanted >= 1).numpy())
    assert sum(mask.sum() for mask in masks.values()) == 30 * 40
    with refused("the segmentation model has no class 'cat': it has dog, wall"):
        segmenter.segments(images[:1], "cat")


def test_a_word_stands_for_all_classes_that_begin_with_it(images, tmp_path, monkeypatch):
    """COCO has walls of brick, of stone and others: the first of them counts like the last."""
    pytest.importorskip("scipy", reason="scipy, without which transformers builds neither, is not installed")
    write_segmenter("maskformer", tmp_path)
    segmenter, classes = Segmenter(str(tmp_path)), torch.arange(1200).view(30, 40) % 3
    monkeypatch.setattr(
        segmenter.processor, "post_process_semantic_segmentation", lambda outputs, target_sizes: [classes]
    )
    (wall,), (dog,) = (segmenter.segments(images[:1], word) for word in ("wall", "dog"))
    assert np.array_equal(wall, (classes > 0).numpy())
    assert np.array_equal(dog, (classes == 0).numpy())


def write_segmenter(kind, folder):
    """A tiny random model of three classes, two of them walls; returns it and its processor."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "out_features": stages}
    names = dict(enumerate(("dog", "wall-brick", "wall-other-merged")))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    widths = {"mask_feature_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "maskformer":
            decoder = hf.DetrConfig(
                d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2, num_queries=6,
                decoder_ffn_dim=16, encoder_ffn_dim=16,
            )  # fmt: skip
            config = hf.MaskFormerConfig(
                backbone_config=hf.MaskFormerSwinConfig(**swin), decoder_config=decoder, fpn_feature_size=32,
                **widths, **labels,
            )  # fmt: skip
            model = hf.MaskFormerForInstanceSegmentation(config)
            processor = hf.MaskFormerImageProcessorPil(size={"height": 64, "width": 64}, size_divisor=32)
        else:
            config = hf.Mask2FormerConfig(
                backbone_config=hf.SwinConfig(**swin), feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
                dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
                **widths, **labels,
            )  # fmt: skip
            model = hf.Mask2FormerForUniversalSegmentation(config)
            processor = hf.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, size_divisor=32)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
