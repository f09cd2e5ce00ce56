"""Exports of other tools in a scene folder without masks: each is named with what to do."""

import json

import numpy as np
import pytest
from PIL import Image

from bas.config import TrainConfig
from bas.data.mask_formats import mask_file
from bas.data.scene_folder import load_scene
from tests.helpers.tiny import refused, write_scene

UNKNOWN = "may be an export of another tool: export the masks as COCO and name the file coco.json"
AS_COCO = "holds COCO annotations: keep those of this image and name it coco.json"
LABELME = {"version": "5.4", "shapes": [{"label": "toy", "points": [[1, 2], [3, 4], [5, 6]]}], "imagePath": "img.jpg"}
STUDIO = [{"id": 1, "annotations": [{"result": [{"type": "polygonlabels", "value": {"points": [[1.5, 2.5]]}}]}]}]
SAM = {"image": {"width": 32, "height": 32}, "annotations": [{"segmentation": {"size": [32, 32], "counts": "0"}}]}


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("annotations.xml", "<annotations/>", "is not read: export the masks as COCO and name the file coco.json"),
        ("img.xml", "<annotation/>", "is not read: export the masks as COCO"),
        ("_annotations.coco.json", "{}", AS_COCO),
        ("instances_default.json", "{}", AS_COCO),
        ("annotations.json", "{}", AS_COCO),
        ("result.json", "{}", AS_COCO),
        ("result_coco.json", "{}", AS_COCO),
        ("anything.json", {"images": [], "annotations": []}, AS_COCO),
        ("sa_223750.json", SAM, AS_COCO),
        ("img.json", LABELME, "is labelme's: write its points into regions.json"),
        ("project-1-at-2026-01-01.json", STUDIO, "is Label Studio's own JSON, in percent: export as COCO"),
        ("via_region_data.json", "{}", "is VIA's own JSON: export as COCO"),
        ("masks.npz", "", "is not read: save its masks with numpy.save as masks.npy"),
        ("mask.npy", "", "would not be read: name it masks.npy"),
        ("mask0.npy", "", "is not read: save its masks with numpy.save as masks.npy"),
        ("masks.pt", "", "is not read: save its masks with numpy.save"),
        ("img-masklabel.png", "", "may be a mask: name it mask0.png if it shows one concept in white, labels.png if"),
        ("img_mask.png", "", "may be a mask: name it mask0.png"),
        ("mask.png", "", "may be a mask: name it mask0.png"),
        ("mask0 (1).png", "", "may be a mask: name it mask0.png"),
        ("toy-alpha.png", "", "may be a mask"),
        ("task-1-annotation-3-by-1-tag-toy-0.png", "", "may be a mask"),
        ("label.png", "", "would not be read: name it labels.png, saved without loss"),
        ("Labels.PNG", "", "would not be read: name it labels.png"),
        ("labels.jpg", "", "would not be read: name it labels.png, saved without loss"),
        ("region.json", "{}", "would not be read: name it regions.json"),
        ("COCO.JSON", "{}", "would not be read: name it coco.json"),
        ("img.txt", "0 0.1 0.2 0.3 0.4 0.5 0.6\n", "holds fractions of the sides, as YOLO writes them"),
        ("img.txt", "12 0.5 0.5 0.2 0.25", "holds fractions of the sides, as YOLO writes them"),
        ("broken.json", "{", UNKNOWN),
        ("deep.json", "[" * 100_000, UNKNOWN),
        ("darwin.json", {"annotations": [{"polygon": {"paths": []}}]}, UNKNOWN),
        ("datumaro.json", {"items": [{"annotations": []}]}, UNKNOWN),
        ("_annotations.csv", "filename,class", UNKNOWN),
        ("export.ndjson", "{}", UNKNOWN),
        ("project.zip", "PK", UNKNOWN),
        ("0.png", "", "may be a mask: name it mask0.png if it shows one concept in white"),
        ("asset0.webp", "", "may be a mask: name it mask0.png"),
        ("img.psd", "", "is not read: export each concept in white on black as mask0.png"),
    ],
)
def test_each_export_is_named_with_what_to_do(tmp_path, name, content, advice):
    folder = write_scene(tmp_path / "s", concepts=0)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with refused(f"{folder} has no mask0.png: {name} {advice}"):
        load_scene(TrainConfig(instance_data_dir=str(folder)))


@pytest.mark.parametrize("name", ["masks", "SegmentationClass", "SegmentationObject", "labels", "annotations"])
def test_folders_of_exports_are_named(tmp_path, name):
    folder = write_scene(tmp_path / "s", concepts=0)
    write_scene(folder / name)
    with refused(f"{folder} has no mask0.png: {name} is a folder that is not read: put its masks beside the image"):
        load_scene(TrainConfig(instance_data_dir=str(folder)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("img.txt", "a photo of 2 toys"),
        ("img.json", '{"caption": "a toy", "camera": "x"}'),
        ("notes.md", "mask"),
        (".annotations.xml", ""),
    ],
)
def test_other_files_are_no_masks(tmp_path, name, content):
    folder = write_scene(tmp_path / "s", concepts=0)
    (folder / name).write_text(content)
    with refused(f"{folder} has no mask0.png: give one mask per concept, white where the concept is"):
        load_scene(TrainConfig(instance_data_dir=str(folder)))


def test_beside_masks_they_are_passed_over(tmp_path):
    folder = write_scene(tmp_path / "s")
    for name in ("annotations.xml", "img.json", "img_mask.png", "masks.npz"):
        (folder / name).write_bytes(b"")
    assert len(load_scene(TrainConfig(instance_data_dir=str(folder)))) == 3


def test_an_extra_image_gets_the_same_answer(tmp_path):
    folder = write_scene(tmp_path / "s")
    (write_scene(folder / "1", concepts=0) / "annotations.xml").write_text("")
    named = "annotations.xml is not read here"
    with refused(f"{folder / '1'} has no mask0.png, mask1.png, ..., as an extra image needs them: {named}"):
        load_scene(TrainConfig(instance_data_dir=str(folder)))


@pytest.mark.parametrize("name", ["mask3.gif", "Mask_0.AVIF", "cutout1.heic", "mask0.JFIF"])
def test_other_endings_of_masks_are_named(tmp_path, name):
    folder = write_scene(tmp_path / "s", concepts=0)
    (folder / name).write_bytes(b"")
    with refused(f"{folder / name} would not be read: name it "):
        load_scene(TrainConfig(instance_data_dir=str(folder)))


@pytest.mark.parametrize(
    "name",
    ["mask0.png", "mask7.png", "cutout0.png", "labels.png", "Labels.png", "regions.json", "coco.json", "masks.npy"],
)
def test_a_file_of_every_source_makes_a_folder_a_scene(tmp_path, name):
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i:05d}.png")
    assert mask_file(tmp_path) is None
    (tmp_path / name).write_bytes(b"")
    assert mask_file(tmp_path) == tmp_path / name


@pytest.mark.parametrize("name", ["labels.png", "coco.json", "masks.npy", "scene.json", "mask3.png"])
def test_links_to_nowhere_are_named(tmp_path, name):
    folder = write_scene(tmp_path / "s", concepts=3 if name in ("scene.json", "mask3.png") else 0)
    (folder / name).symlink_to("nowhere")
    with refused(name, "is not a"):
        load_scene(TrainConfig(instance_data_dir=str(folder)))
