"""Masks proposed by segmentation models: tiny random ones, built here, against transformers used directly."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image

from bas.cli.entry import main
from bas.config import ProposalConfig, TrainConfig
from bas.data.mask_proposals import (
    METHODS,
    SamReader,
    dilate,
    find_everything,
    load_segmenter,
    mask2former,
    propose,
    refine,
)
from bas.data.scene_folder import load_scene
from tests.helpers.segmenters import write_clipseg, write_sam
from tests.helpers.tiny import refused

W, H = 60, 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image():
    """A 60x40 image with some content."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (5, 8, 3), dtype=np.uint8)).resize((W, H), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random models of SAM and CLIPSeg, as folders."""
    root = tmp_path_factory.mktemp("segmenters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"sam": write_sam(root / "sam"), "clipseg": write_clipseg(root / "clipseg")}


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory):
    """A tiny random Mask2Former and its processor."""
    pytest.importorskip("scipy", reason="scipy, without which transformers builds no Mask2Former, is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        folder = write_mask2former(tmp_path_factory.mktemp("mask2former"))
    return load_segmenter(METHODS["mask2former"], str(folder))


def write_mask2former(folder):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], out_features=stages),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "dog", 1: "wall-other-merged"},
        label2id={"dog": 0, "wall-other-merged": 1},
    )
    hf.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    hf.Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, size_divisor=32).save_pretrained(folder)
    return folder


def settings(folder, **changes):
    return ProposalConfig(segmenter=str(folder), **changes)


# --- The methods --------------------------------------------------------------------------------------------------


def test_sam_points_and_boxes_are_those_of_transformers(folders, image):
    model, processor = load_segmenter(METHODS["sam"], str(folders["sam"]))

    def direct(**prompts):
        inputs = processor(image, **prompts, return_tensors="pt")
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        with torch.no_grad():
            outputs = model(pixel_values=inputs["pixel_values"], **{k: inputs[k].float() for k in prompts})
        masks = processor.post_process_masks(outputs.pred_masks, *sizes, binarize=False)[0][0]
        return (masks[outputs.iou_scores[0, 0].argmax()].sigmoid() >= 0.5).numpy()

    inside = settings(folders["sam"], points=("10,20", "30,5+40,30"))
    found = propose("sam", image, inside, CPU)
    assert [proposal.mask.shape for proposal in found] == [(H, W)] * 2
    assert np.array_equal(found[0].mask, direct(input_points=[[[[10, 20]]]]))
    assert np.array_equal(found[1].mask, direct(input_points=[[[[30, 5], [40, 30]]]]))
    (boxed,) = propose("sam", image, settings(folders["sam"], boxes=("5,6,50,30",)), CPU)
    assert np.array_equal(boxed.mask, direct(input_boxes=[[[5, 6, 50, 30]]]))


class TwoObjects:
    """In place of SAM: a large box where the left half is asked, a small one on the right, a vague one above."""

    def __init__(self, image):
        self.image = image

    def ask(self, input_points):
        points = np.array(input_points)[0, :, 0]
        logits = torch.full((len(points), 24, 24), -9.0)
        scores = torch.full((len(points),), 0.95)
        for mask, (x, y), i in zip(logits, points, range(len(points)), strict=True):
            if y < 10:
                mask[0:4, 0:20], scores[i] = 9.0, 0.5
            elif x < W / 2:
                mask[4:16, 2:12] = 9.0
                mask[4, 2] = 9.0 if x < 10 else -9.0
            else:
                mask[8:12, 16:20] = 9.0
        return logits, scores


def test_everything_keeps_each_object_once_the_largest_first(image):
    found = find_everything(TwoObjects(image), ProposalConfig())
    assert [int((mask > 0).sum()) for mask in found] == [120, 16]
    assert len(find_everything(TwoObjects(image), ProposalConfig(max_concepts=1))) == 1
    assert len(find_everything(TwoObjects(image), ProposalConfig(min_coverage=0.05))) == 1


def test_sam_lets_a_box_come_out_where_it_went_in(folders):
    """SAM's grid is square and padded below or beside the image."""
    model, processor = load_segmenter(METHODS["sam"], str(folders["sam"]))
    for size in ((60, 40), (40, 60)):
        with torch.no_grad():
            reader = SamReader(model, processor, Image.new("RGB", size))
        logits = torch.full((1, 16, 16), -9.0)
        logits[0, 2:6, 4:8] = 9.0
        rows, columns = np.nonzero(reader.enlarge(logits)[0].numpy() > 0)
        scale = 60 / 16
        assert (rows.min(), columns.min()) == pytest.approx((2 * scale, 4 * scale), abs=1)
        assert (rows.max() + 1, columns.max() + 1) == pytest.approx((6 * scale, 8 * scale), abs=1)


def chances(folders, image, words):
    """CLIPSeg's probabilities, from transformers directly: (n, H, W)"""
    model, processor = load_segmenter(METHODS["clipseg"], str(folders["clipseg"]))
    inputs = processor(text=words, images=[image] * len(words), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    logits = logits.reshape(len(words), 1, *logits.shape[-2:])
    return F.interpolate(logits, (H, W), mode="bilinear")[:, 0].sigmoid().numpy()


def test_clipseg_words_are_those_of_transformers(folders, image):
    direct = chances(folders, image, ["bowl", "stone"])
    threshold = float(np.median(direct[0]))
    found = propose("clipseg", image, settings(folders["clipseg"], words=("bowl", "stone"), threshold=threshold), CPU)
    assert [proposal.word for proposal in found] == ["bowl", "stone"]
    assert np.array_equal(found[0].mask, direct[0] >= threshold)
    assert 0.4 < found[0].mask.mean() < 0.6
    (alone,) = propose("clipseg", image, settings(folders["clipseg"], words=("bowl",), threshold=threshold), CPU)
    assert (alone.mask == found[0].mask).mean() > 0.99


def test_mask2former_segments_are_named_and_the_largest_come_first(panoptic, image, monkeypatch):
    model, processor = panoptic
    segments = torch.zeros(H, W, dtype=torch.int64)
    segments[:20, :30], segments[25:, :], segments[0, 59] = 1, 2, 3
    rows = [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}, {"id": 3, "label_id": 0}]

    def processed(outputs, threshold, target_sizes, label_ids_to_fuse):
        assert outputs.masks_queries_logits.shape[:2] == (1, 6)
        assert (threshold, target_sizes) == (0.5, [(H, W)])
        return [{"segmentation": segments, "segments_info": rows}]

    monkeypatch.setattr(processor, "post_process_panoptic_segmentation", processed)
    with torch.no_grad():
        found = mask2former(model, processor, image, ProposalConfig())
    assert [proposal.word for proposal in found] == ["wall", "dog"]
    assert np.array_equal(found[1].mask, (segments == 1).numpy())


def test_mask2former_runs_on_a_random_model(panoptic, image):
    model, processor = panoptic
    with torch.no_grad():
        found = mask2former(model, processor, image, ProposalConfig(threshold=0.01))
    assert all(proposal.mask.shape == (H, W) and proposal.word in ("dog", "wall") for proposal in found)


# --- Masks --------------------------------------------------------------------------------------------------------


def test_growing_is_by_distance(image):
    mask = np.zeros((15, 21), bool)
    mask[4, 10] = mask[14, 0] = True
    rows, columns = np.indices(mask.shape)
    for radius in (0, 1, 3, 30):
        near = [(rows - y) ** 2 + (columns - x) ** 2 <= radius**2 for y, x in ((4, 10), (14, 0))]
        assert np.array_equal(dilate(mask, radius), near[0] | near[1]), radius


def test_shrinking_is_growing_of_what_is_outside():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    small = refine(mask, ProposalConfig(grow=-3))
    assert small.sum() == 16
    assert small[8:12, 8:12].all()


def test_smoothing_removes_specks_and_keeps_straight_edges():
    mask = np.zeros((40, 40), bool)
    mask[:, :20] = True
    mask[20, 30] = True
    smooth = refine(mask, ProposalConfig(smooth=2.0))
    assert np.array_equal(smooth, np.indices((40, 40))[1] < 20)


# --- The command --------------------------------------------------------------------------------------------------


def test_auto_writes_an_ordinary_scene(folders, image, tmp_path, capsys, caplog):
    image.save(tmp_path / "a photo.png")
    scene = tmp_path / "a photo"
    flags = ["--auto", "sam", "--segmenter", str(folders["sam"]), "--boxes", "5,6,50,30", "10,10,20,20"]
    sums = [proposal.mask.sum() for proposal in propose("sam", image, settings(folders["sam"], boxes=flags[5:]), CPU)]
    assert main(["masks", str(tmp_path / "a photo.png"), *flags, "--max_concepts", "1"]) == 0
    assert f"{scene} is ready. Look: bas masks '{scene}', or change" in capsys.readouterr().out
    reason = "every concept is named by a point, a box or a word"
    assert caplog.messages == [f"--max_concepts has no effect: {reason}"]
    assert (scene / "img.png").read_bytes() == (tmp_path / "a photo.png").read_bytes()
    assert [np.asarray(Image.open(scene / f"mask{i}.png")).sum() / 255 for i in range(2)] == sums
    assert json.loads((scene / "scene.json").read_text())["concepts"] == [
        {"handle": "<asset0>", "word": None},
        {"handle": "<asset1>", "word": None},
    ]
    assert main(["masks", str(tmp_path / "a photo.png"), *flags]) == 2
    assert capsys.readouterr().err == f"bas: {scene} has masks already: name another --output_dir\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"concepts": [{"handle": "<cat>"}], "a": 1}', "names concepts already: name another --output_dir, or move "),
        ("{concepts}", "is not valid JSON"),
        ('{"mine": 1}', None),
    ],
)
def test_names_of_others_are_not_replaced(content, message, folders, image, tmp_path, capsys):
    """A scene.json without concepts keeps its entries; one with concepts may be work of hours."""
    image.save(tmp_path / "photo.png")
    place = tmp_path / "mine"
    place.mkdir()
    (place / "scene.json").write_text(content)
    flags = ["--auto", "sam", "--segmenter", str(folders["sam"]), "--boxes", "5,6,50,30", "--output_dir", str(place)]
    assert main(["masks", str(tmp_path / "photo.png"), *flags]) == (2 if message else 0)
    if message:
        assert f"{place / 'scene.json'} {message}" in capsys.readouterr().err
        assert [path.name for path in place.iterdir()] == ["scene.json"]
        assert (place / "scene.json").read_text() == content
    else:
        notes = {"mine": 1, "concepts": [{"handle": "<asset0>", "word": None}]}
        assert json.loads((place / "scene.json").read_text()) == notes


def test_words_become_initial_words(folders, image, tmp_path, capsys):
    image.save(tmp_path / "img.png")
    threshold = float(np.median(chances(folders, image, ["bowl"])))
    flags = ["--auto", "clipseg", "--segmenter", str(folders["clipseg"]), "--words", "bowl", "--threshold", threshold]
    assert main(["masks", str(tmp_path), *map(str, flags)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[::3] == ["mask0.png", "bowl"]
    scene = load_scene(TrainConfig(instance_data_dir=str(tmp_path)))
    assert (scene.handles, scene.words) == (("<asset0>",), ("bowl",))
    assert 0.4 < scene.masks[0].mean() / 255 < 0.6


# --- What cannot be used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sam", {"words": ("toy",)}, "--words is for --auto clipseg, not sam"),
        ("clipseg", {"words": ("toy",), "points": ("1,1",)}, "--points is for --auto sam, not clipseg"),
        ("clipseg", {}, "--auto clipseg needs --words, one per concept"),
        ("sam", {"points": ("1,1",), "boxes": ("1,1,2,2",)}, "--points and --boxes: use one of them"),
        ("sam", {"points": ("1",)}, "'1': expected x,y in pixels, inside 60x40"),
        ("sam", {"points": ("a,b",)}, "'a,b': expected x,y in pixels, inside 60x40"),
        ("sam", {"points": ("50,50",)}, "'50,50': expected x,y in pixels, inside 60x40"),
        ("sam", {"points": ("nan,1",)}, "'nan,1': expected x,y in pixels, inside 60x40"),
        ("sam", {"boxes": ("1,2,3",)}, "'1,2,3': expected x0,y0,x1,y1 in pixels, inside 60x40"),
        ("sam", {"boxes": ("1,1,4,4",), "grow": -99}, "sam leaves nothing of mask 0: lower --threshold"),
        (
            "sam",
            {"boxes": ("1,1,4,4",), "grow": 99},
            "sam puts everything into mask 0: raise --threshold, or grow less",
        ),
        ("sam", {"min_coverage": 0.94}, "sam finds nothing here: lower --threshold or --min_coverage"),
    ],
)
def test_bad_requests_are_one_line(folders, image, method, changes, message):
    with refused(message):
        propose(method, image, settings(folders[method], **changes), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1.0}, "--threshold is 1.0: expected a finite number, more than 0 and less than 1"),
        ({"min_coverage": 0.0}, "--min_coverage is 0.0: expected a finite number, more than 0 and less than 1"),
        ({"smooth": -1.0}, "--smooth is -1.0: expected a finite number, 0 or more and 1000 or less"),
        ({"grow": 1001}, "--grow is 1001: expected a whole number from -1000 to 1000"),
        ({"max_concepts": 0}, "--max_concepts is 0: expected a whole number from 1"),
    ],
)
def test_settings_are_checked(changes, message):
    with refused(message):
        ProposalConfig(**changes)


@pytest.mark.parametrize("method", METHODS)
def test_without_weights_the_message_says_how_to_get_them(image, method):
    name = METHODS[method].default
    words = ("toy",) if method == "clipseg" else ()
    with refused(f"{name} is not downloaded yet: run `hf download {name}`, or name a folder with --segmenter"):
        propose(method, image, ProposalConfig(words=words), CPU)


def test_folders_that_hold_no_segmenter(folders, image, tmp_path):
    with refused("--segmenter x is neither a folder nor a hub id such as owner/model"):
        propose("sam", image, settings("x"), CPU)
    with refused(f"{folders['clipseg']} is a model of type clipseg: this method needs sam"):
        propose("sam", image, settings(folders["clipseg"]), CPU)
    with refused("config.json"):
        propose("sam", image, settings(tmp_path), CPU)
    for file in folders["sam"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with refused(f"{tmp_path} cannot be used"):
        propose("sam", image, settings(tmp_path), CPU)


def test_a_missing_package_is_named(tmp_path, image, monkeypatch):
    def no_scipy(*args, **kwargs):
        raise ImportError("\nMask2FormerLoss requires the scipy library but it was not found.\nInstall it.\n")

    monkeypatch.setattr(hf.Mask2FormerImageProcessorPil, "from_pretrained", no_scipy)
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    with refused("mask2former needs one more package: Mask2FormerLoss requires the scipy library"):
        propose("mask2former", image, settings(tmp_path), CPU)


def test_flags_of_auto_alone_are_an_error(tmp_path, capsys):
    assert main(["masks", str(tmp_path), "--words", "toy"]) == 2
    assert capsys.readouterr().err == "bas: --words needs --auto\n"
    assert main(["masks", str(tmp_path), "--auto", "sam", "--handles", "<a>"]) == 2
    assert capsys.readouterr().err == "bas: --handles cannot be combined with --auto\n"
    assert main(["masks", str(tmp_path), "--auto", "sam", "--output_path", "x.png"]) == 2
    assert capsys.readouterr().err == "bas: --output_path cannot be combined with --auto\n"
