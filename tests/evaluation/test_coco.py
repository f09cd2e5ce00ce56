"""The paper's data set from a small annotation file in COCO's real form: what is chosen, cut and written."""

import json

import numpy as np
import pytest
from PIL import Image

from bas.cli.entry import main
from bas.config import CocoConfig, TrainConfig
from bas.data.scene_folder import load_scene
from bas.evaluation.coco import choose_scenes, choose_square, read_annotations, squares, write_scenes
from tests.helpers.tiny import refused

CLASSES = {1: "person", 18: "dog", 62: "chair", 52: "banana", 200: "sky"}


def box(x, y, w, h):
    """A rectangle as COCO's polygon."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def runs(mask):
    """Run lengths, down the columns, as COCO writes crowds."""
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat.astype(int), prepend=0, append=0 if not flat[-1] else 1))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, flat.size]).tolist()}


class World:
    """An annotation file in the making, and images whose colours tell their columns and rows."""

    def __init__(self, folder):
        self.folder, self.rows, self.images = folder, [], []
        (folder / "pictures").mkdir()

    def image(self, identity, size, *objects):
        """An image and its annotations: (category, segmentation), with further entries as a dict."""
        width, height = size
        name = f"{identity:012d}.png"
        self.images.append({"id": identity, "file_name": name, "width": width, "height": height})
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8)).save(self.folder / "pictures" / name)
        for category, segmentation, *more in objects:
            row = {"id": len(self.rows) + 1, "image_id": identity, "category_id": category, "iscrowd": 0}
            self.rows.append(row | {"segmentation": segmentation} | dict(*more))

    def write(self, **changes):
        """instances.json; returns its path."""
        categories = [{"id": i, "name": name, "isthing": int(name != "sky")} for i, name in CLASSES.items()]
        content = {"info": {}, "images": self.images, "annotations": self.rows, "categories": categories}
        path = self.folder / "instances.json"
        path.write_text(json.dumps(content | changes))
        return path

    def square(self, identity=1, **settings):
        """The choice for one image."""
        config = CocoConfig(**settings)
        return choose_square(read_annotations(self.write(), config.dropped), str(identity), config)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# --- The square ---------------------------------------------------------------------------------------------------


def test_the_square_has_nine_places_along_the_longer_side():
    wide, tall = [list(squares(*size)) for size in ((200, 120), (120, 200))]
    assert [box for box, _ in wide] == [(10 * i, 0, 10 * i + 120, 120) for i in range(9)]
    assert [box for box, _ in tall] == [(0, 10 * i, 120, 10 * i + 120) for i in range(9)]
    assert [off for _, off in wide] == [80, 60, 40, 20, 0, 20, 40, 60, 80]
    assert list(squares(50, 50)) == [((0, 0, 50, 50), 0)]


def test_most_objects_then_most_area_then_the_middle(world):
    both = (1, box(0, 0, 40, 100)), (18, box(60, 0, 40, 100))
    world.image(1, (180, 100), *both)
    assert world.square().box == (0, 0, 100, 100)  # only there both are whole
    world.image(2, (180, 100), *both, (62, box(100, 0, 80, 100)))
    choice = world.square(2, max_things=4)
    # From 20 to 120 all three have 20 columns or more: 20 + 40 + 20; more to the left no chair, to the right no person.
    assert choice.box == (20, 0, 120, 100)
    assert [segment.word for segment in choice.segments] == ["dog", "person", "chair"]
    assert [segment.share for segment in choice.segments] == [0.4, 0.2, 0.2]
    world.image(3, (180, 100), (1, box(60, 0, 60, 50)), (18, box(60, 50, 60, 50)))
    assert world.square(3).box == (40, 0, 140, 100)


def test_the_masks_are_those_pixels_in_the_square(world):
    world.image(1, (180, 100), (1, box(90, 10, 40, 80)), (18, box(130, 0, 50, 60)))
    choice = world.square()
    assert choice.box == (80, 0, 180, 100)
    wanted = np.zeros((100, 100), bool)
    wanted[10:90, 10:50] = True
    assert np.array_equal(choice.segments[0].mask, wanted)


# --- The rules ----------------------------------------------------------------------------------------------------


def test_fifteen_percent_of_the_square_is_the_border(world):
    world.image(1, (100, 100), (1, box(0, 0, 50, 100)), (18, box(60, 0, 15, 100)))
    assert [segment.share for segment in world.square().segments] == [0.5, 0.15]
    world.image(2, (100, 100), (1, box(0, 0, 50, 100)), (18, box(60, 0, 15, 99)))
    assert world.square(2) is None
    assert world.square(2, min_share=0.148) is not None


def test_a_class_counts_once_and_its_largest_object_is_the_concept(world):
    world.image(1, (100, 100), (1, box(0, 0, 20, 100)), (1, box(20, 0, 40, 100)))
    assert world.square() is None
    world.image(2, (100, 100), (1, box(0, 0, 20, 100)), (1, box(20, 0, 40, 100)), (18, box(60, 0, 30, 100)))
    assert [(segment.word, segment.share) for segment in world.square(2).segments] == [("person", 0.4), ("dog", 0.3)]


@pytest.mark.parametrize(
    "other", [(52, box(50, 0, 50, 100)), (200, box(50, 0, 50, 100)), (18, box(50, 0, 50, 100), {"iscrowd": 1})]
)
def test_dropped_classes_stuff_and_crowds_are_no_concepts(world, other):
    world.image(1, (100, 100), (1, box(0, 0, 50, 100)), other)
    assert world.square() is None
    assert (world.square(dropped=()) is not None) == (other[0] == 52)  # a class that is dropped by choice alone


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/secret.png"])
def test_images_outside_their_folder_are_refused(world, name):
    path = world.write(images=[{"id": 1, "file_name": name, "width": 10, "height": 10}])
    with refused(f"image 0: {name!r} leads out of the folder of images"):
        read_annotations(path, ())


def test_run_lengths_in_both_forms_count_as_polygons_do(world):
    oracle = pytest.importorskip("pycocotools.mask", reason="pycocotools, the test oracle, is not installed")
    y, x = np.mgrid[:90, :120]
    disc, half = (x - 40) ** 2 + (y - 45) ** 2 < 900, x >= 70
    packed = oracle.encode(np.asfortranarray(half.astype(np.uint8)))
    crowd = {"iscrowd": 1}
    world.image(
        1, (120, 90), (18, runs(disc)), (1, {"size": [90, 120], "counts": packed["counts"].decode()}),
        (62, runs(np.ones((90, 120), bool)), crowd),
    )  # fmt: skip
    choice = world.square()
    left = choice.box[0]
    assert {segment.word for segment in choice.segments} == {"dog", "person"}
    by_word = {segment.word: segment.mask for segment in choice.segments}
    assert np.array_equal(by_word["dog"], disc[:, left : left + 90])
    assert np.array_equal(by_word["person"], half[:, left : left + 90])


def test_what_states_a_small_area_is_not_drawn(world):
    """The file's areas spare most of the work; a mask that cannot be drawn would be an error."""
    world.image(1, (100, 100), (1, box(0, 0, 50, 100)), (18, "nonsense", {"area": 100.0}))
    assert world.square() is None


# --- The choice ---------------------------------------------------------------------------------------------------


def many(world, count):
    for identity in range(1, count + 1):
        second = 18 if identity % 3 else 1  # every third image shows one class only
        world.image(identity, (120, 100), (1, box(0, 0, 50, 100)), (second, box(50, 0, 50, 100)))
    return world.write()


def chosen_ids(path, **settings):
    config = CocoConfig(**settings)
    return [choice.row["id"] for choice in choose_scenes(read_annotations(path, config.dropped), config)]


def test_the_choice_depends_on_the_seed_alone(world):
    path = many(world, 30)
    first = chosen_ids(path, scenes=8)
    assert len(set(first)) == 8
    assert all(identity % 3 for identity in first)
    assert chosen_ids(path, scenes=4) == first[:4]
    assert chosen_ids(path, scenes=8, seed=1) != first
    world.images.reverse()
    world.rows.reverse()
    assert chosen_ids(world.write(), scenes=8) == first
    assert first == [20, 25, 7, 4, 23, 10, 17, 26]  # on every machine


def test_fewer_scenes_than_asked_is_a_warning_and_none_an_error(world, caplog):
    path = many(world, 4)
    assert len(chosen_ids(path)) == 3
    assert "has only 3 scenes that keep the rules" in caplog.text
    with refused("has no image that keeps the rules"):
        chosen_ids(path, min_things=3)


# --- The command --------------------------------------------------------------------------------------------------


def test_the_command_writes_ordinary_scenes_and_a_manifest(world, tmp_path, capsys):
    path, out = many(world, 6), tmp_path / "out"
    arguments = ["coco", str(path), "--images", str(tmp_path / "pictures"), "--output_dir", str(out)]
    assert main([*arguments, "--scenes", "3"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rules"]["scenes"] == 3
    assert manifest["annotations"] == "instances.json"
    assert len(manifest["scenes"]) == 3
    assert "3 scenes" in capsys.readouterr().out
    for row in manifest["scenes"]:
        scene = load_scene(TrainConfig(instance_data_dir=str(out / row["scene"])))
        assert row["file_name"] == f"{row['image_id']:012d}.png"
        left, top, right, bottom = row["square"]
        pixels = np.array(scene.image)
        assert (pixels[0, 0, 0], pixels[0, -1, 0], pixels[-1, 0, 1]) == (left, right - 1, bottom - 1)
        assert scene.words == tuple(concept["word"] for concept in row["concepts"])
        assert [round(float(mask.mean() / 255), 4) for mask in scene.masks] == [c["share"] for c in row["concepts"]]
        assert scene.image.size == (100, 100)
        assert top == 0


def test_what_cannot_be_used_is_one_line_and_code_2(world, tmp_path, capsys):
    path, images = many(world, 5), tmp_path / "pictures"

    def run(source=path, images=images):
        out = tmp_path / "out"
        assert main(["coco", str(source), "--images", str(images), "--output_dir", str(out)]) == 2
        assert not out.exists() or not any(out.iterdir())
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "only" not in line]
        return line

    assert f"--images {tmp_path / 'nowhere'} is not a folder" in run(images=tmp_path / "nowhere")
    assert "none.json does not exist" in run(source=tmp_path / "none.json")
    assert 'is not {"images": [{...}, ...]}' in run(source=world.write(images=[]))
    path = world.write(images=[{"id": 1, "file_name": "a", "width": 10, "height": -1}])
    assert "image 0: height is -1" in run(source=path)
    assert "annotates image" in run(source=world.write(images=world.images[:1]))
    path = world.write()
    (images / "000000000002.png").unlink()
    assert "lacks 1 of 4 images, 000000000002.png first" in run(source=path)
    small = {**world.rows[0], "segmentation": {"size": [5, 5], "counts": [25]}}
    assert "annotation 1 is 5x5, its image 120x100" in run(source=world.write(annotations=[small, world.rows[1]]))


def test_a_image_of_another_size_is_named(world, tmp_path, capsys):
    path = many(world, 1)
    Image.new("RGB", (60, 50)).save(tmp_path / "pictures" / "000000000001.png")
    out = tmp_path / "out"
    assert main(["coco", str(path), "--images", str(tmp_path / "pictures"), "--output_dir", str(out)]) == 2
    assert "000000000001.png is 60x50, but annotated at 120x100" in capsys.readouterr().err


def test_run_lengths_that_contradict_their_bbox_are_refused(world):
    """Inverted: without the 0 that COCO begins with where the first pixel is inside."""
    mask = np.zeros((100, 100), bool)
    mask[:60, :50] = True
    counts = [run for run in runs(mask)["counts"] if run]
    inverted = {"size": [100, 100], "counts": counts}
    world.image(1, (100, 100), (1, inverted, {"bbox": [0, 0, 50, 60]}), (18, box(50, 0, 50, 100)))
    with refused("annotation 1: its mask lies in", "its run lengths are inverted, begin them with the pixels outside"):
        world.square()


def test_an_image_that_is_turned_by_its_tag_is_said(world, tmp_path, caplog):
    """COCO annotates pixels as they are stored; by 180 degrees the size does not tell."""
    world.image(1, (100, 100), (1, box(0, 0, 50, 100)), (18, box(50, 0, 50, 100)))
    path = world.folder / "pictures" / f"{1:012d}.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(path) as image:
        image.save(path, exif=exif)
    config = CocoConfig(scenes=1)
    annotations = read_annotations(world.write(), config.dropped)
    write_scenes(annotations, choose_scenes(annotations, config), world.folder / "pictures", tmp_path / "out", config)
    assert [m.partition(",")[0] for m in caplog.messages] == [f"{path} is turned by 180 degrees by its EXIF tag"]
