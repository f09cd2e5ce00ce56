"""Class images: made once for what they depend on, continued where they stopped, taken from the user as they are."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import bas
from bas.config import SampleConfig, TrainConfig
from bas.io.files import cache_dir
from bas.pretrained.folder import load
from bas.training import class_images as module
from bas.training.class_images import cache_key, check_class_folder, class_images, find_folder
from tests.helpers.tiny import refused, write_class_images


@pytest.fixture(scope="module")
def models(bench):
    return load(bench.model)


@pytest.fixture
def asked(monkeypatch):
    """Images are drawn from noise instead of being denoised; the list holds (prompt, seed) of each."""
    jobs = []

    def generate(prompts, seeds, models, settings, on_step):
        jobs.extend(zip(prompts, seeds, strict=True))
        shape = (4, settings.height // 2, settings.width // 2)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    monkeypatch.setattr("bas.training.class_images.generate", generate)
    return jobs


def names(folder) -> list[str]:
    """The images in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".png")


def test_class_images_have_the_guidance_of_the_models_other_images(models, bench, tmp_path, monkeypatch):
    """As the key says: 7.5 where the model has none of its own, and 3 for one that says 3."""
    taken = []
    monkeypatch.setattr(
        "bas.training.class_images.generate",
        lambda prompts, seeds, models, settings, on_step: (
            taken.append(settings.guidance_scale) or torch.zeros(len(seeds), 4, 16, 16)
        ),
    )
    for own in (7.5, 3.0):
        folder = tmp_path / f"{own}"
        config = bench.config(class_data_dir=str(folder), sample_batch_size=8)
        class_images(replace(models, guidance_scale=own), config, "base", (32, 32))
        assert json.loads((folder / "key.json").read_text())["guidance_scale"] == own
        with refused("made with another guidance_scale"):
            check_class_folder(config, replace(models, guidance_scale=5.0), (32, 32))
    assert taken == [7.5, 3.0]


def test_cache_key_depends_on_everything_that_decides_an_image(models):
    """Each change gives another folder; the scene, the count and the batch size do not matter."""
    base = {"config": TrainConfig(), "base_hash": "a", "schedule": models.schedule, "settings": SampleConfig(height=32)}

    def folder(**changes):
        return find_folder(TrainConfig(), cache_key(**base | changes))

    others = [
        {"base_hash": "b"},
        {"schedule": replace(models.schedule, prediction_type="v_prediction")},
        {"schedule": replace(models.schedule, steps_offset=0)},
        {"config": TrainConfig(class_prompt=("a bowl",))},
        {"config": TrainConfig(class_prompt=("a photo at the beach", "a bowl"))},
        {"config": TrainConfig(mixed_precision="bf16")},
        {"settings": SampleConfig(height=40)},
        {"settings": SampleConfig(height=32, width=40)},
        {"settings": SampleConfig(height=32, seed=1)},
        {"settings": SampleConfig(height=32, num_inference_steps=20)},
        {"settings": SampleConfig(height=32, guidance_scale=5.0)},
    ]
    folders = [folder(), *(folder(**change) for change in others)]
    assert len(set(folders)) == len(folders)
    assert all(path.parent == cache_dir() / "class_images" for path in folders)
    free = TrainConfig(num_class_images=7, instance_data_dir="elsewhere", sample_batch_size=2)
    assert folder(config=free) == folder(settings=SampleConfig(height=32, batch_size=9, num_images=3)) == folders[0]


def test_the_key_holds_what_auto_came_to(bench, tmp_path, asked, monkeypatch):
    """So images of one arithmetic are never taken for those of another, on a machine where auto is something else."""
    folder = tmp_path / "keyed"
    config = bench.config(tmp_path / "first", class_data_dir=str(folder), phase1_train_steps=0, phase2_train_steps=1)
    bas.train(config)
    assert json.loads((folder / "key.json").read_text())["precision"] == "no"
    bas.train(replace(config, output_dir=str(tmp_path / "second"), mixed_precision="no"))
    monkeypatch.setattr("bas.training.setup.pick_precision", lambda *args: "bf16")
    with refused("keyed holds class images made with another precision"):
        bas.train(replace(config, output_dir=str(tmp_path / "third")))


def test_images_are_generated_once_and_more_are_added(models, bench, tmp_path, asked):
    """Seeds count up, prompts take turns, and a larger number keeps the images that are there."""
    prompts = ("a photo at the beach", "a bowl")
    config = bench.config(class_data_dir=str(tmp_path / "new"), class_prompt=prompts, num_class_images=3, seed=5)
    first, _ = class_images(models, config, "base", (32, 40))
    assert asked == [(prompts[0], 5), (prompts[1], 6), (prompts[0], 7)]
    assert first.posterior.mean.shape == (3, 4, 16, 20)
    again, _ = class_images(models, config, "base", (32, 40))
    assert len(asked) == 3
    assert torch.equal(first.posterior.mean, again.posterior.mean)
    more, _ = class_images(models, replace(config, num_class_images=5), "base", (32, 40))
    assert asked[3:] == [(prompts[1], 8), (prompts[0], 9)]
    assert torch.equal(more.posterior.mean[:3], first.posterior.mean)
    fewer, _ = class_images(models, replace(config, num_class_images=2), "base", (32, 40))
    assert torch.equal(fewer.posterior.mean, first.posterior.mean[:2])


def test_interrupted_generation_continues(models, bench, tmp_path, asked, monkeypatch):
    """Cut off in the third batch of two, with a half-written file: the rest is made, the images are the same."""
    config = bench.config(class_data_dir=str(tmp_path / "cut"), num_class_images=6, sample_batch_size=2)
    original, calls = Image.Image.save, iter(range(1, 100))

    def dying(image, path, **options):
        if next(calls) == 5:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        original(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            class_images(models, config, "base", (32, 32))
    assert names(tmp_path / "cut") == [f"{i:05d}.png" for i in range(4)]
    (tmp_path / "cut" / "00001.png").unlink()
    asked.clear()
    resumed, _ = class_images(models, config, "base", (32, 32))
    assert [seed for _, seed in asked] == [1, 4, 5]
    whole, _ = class_images(models, replace(config, class_data_dir=str(tmp_path / "whole")), "base", (32, 32))
    assert torch.equal(resumed.posterior.mean, whole.posterior.mean)


def test_folder_of_the_user_is_taken_as_it_is(models, bench, tmp_path, asked):
    """No key is written, nothing generated; images of another shape are cut to the middle and resized."""
    folder = write_class_images(tmp_path / "mine", count=3, size=(64, 32))
    config = bench.config(class_data_dir=str(folder), num_class_images=2)
    found, _ = class_images(models, config, "any base", (32, 32))
    assert asked == []
    assert found.posterior.mean.shape == (2, 4, 16, 16)
    assert names(folder) == ["0.png", "1.png", "2.png"]
    assert not (folder / "key.json").exists()
    with torch.no_grad():
        middle = np.asarray(Image.open(folder / "0.png"))[:, 16:48]
        pixels = torch.from_numpy(middle.copy()).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(found.posterior.mean[0], models.vae.encode(pixels[None]).mean[0])


def test_images_of_the_user_are_never_replaced(models, bench, tmp_path, asked):
    """One of them bears a name that a generated image would have."""
    folder = write_class_images(tmp_path / "mine", count=2)
    (folder / "1.png").rename(folder / "00002.png")
    mine = (folder / "00002.png").read_bytes()
    class_images(models, bench.config(class_data_dir=str(folder), num_class_images=4), "base", (32, 32))
    assert names(folder) == ["0.png", "00000.png", "00001.png", "00002.png"]
    assert (folder / "00002.png").read_bytes() == mine
    assert [seed for _, seed in asked] == [0, 1]


def test_images_generated_beside_those_of_the_user_have_a_key(models, bench, tmp_path, asked):
    """Later settings are compared with it: else images of one prompt would stand for another."""
    folder = write_class_images(tmp_path / "mine", count=1)
    config = bench.config(class_data_dir=str(folder), num_class_images=3, class_prompt=("a stone",))
    class_images(models, config, "base", (32, 32))
    assert json.loads((folder / "key.json").read_text())["prompts"] == ["a stone"]
    with refused("mine holds class images made with another prompts, seed: name another folder"):
        class_images(models, replace(config, class_prompt=("a bowl",), seed=5), "base", (32, 32))


def test_names_of_the_users_images_are_no_prompts(models, bench, tmp_path, asked):
    """00003.png and 00007.png without a key were made elsewhere: they have the prompts of their places."""
    folder = write_class_images(tmp_path / "mine", count=2)
    for old, new in (("0.png", "00003.png"), ("1.png", "00007.png")):
        (folder / old).rename(folder / new)
    found, _ = class_images(models, bench.config(class_data_dir=str(folder), num_class_images=2), "base", (32, 32))
    assert found.prompts == (0, 1)


def test_what_another_process_generated_meanwhile_is_compared(models, bench, tmp_path, asked, monkeypatch):
    """It waits for the other one, which was first with other settings, and then refuses its images."""
    config = bench.config(class_data_dir=str(tmp_path / "class"), class_prompt=("a bowl",))

    @contextmanager
    def after_another(folder):
        monkeypatch.setattr(module, "taking_turns", lambda folder: nullcontext())
        class_images(models, replace(config, class_prompt=("a stone",)), "base", (32, 32))
        yield

    monkeypatch.setattr(module, "taking_turns", after_another)
    with refused("class holds class images made with another prompts: name another folder"):
        class_images(models, config, "base", (32, 32))


def test_each_image_has_the_prompt_that_it_was_generated_with(bench, tmp_path, asked):
    """Beside images of the user, which have the prompts of their places, and after a generated one was removed."""
    prompts = ("a photo at the beach", "a bowl", "a photo in the snow")
    folder = write_class_images(tmp_path / "class")
    own = {"class_data_dir": str(folder), "class_prompt": prompts, "seg_mix_probability": 0.5}

    def prompts_and_places(count):
        models, data = bench.prepared(bench.config(**own, num_class_images=count))
        ids = models.tokenizer(list(prompts), padding="max_length", max_length=77, return_tensors="pt").input_ids
        numbers = [int((ids == row).all(dim=1).nonzero()) for row in data.class_ids]
        return numbers, [place for _, place in data.seg_mix.backgrounds]

    numbers, places = prompts_and_places(6)
    assert names(folder) == ["0.png", "00000.png", "00001.png", "00002.png", "00003.png", "1.png"]
    assert [prompt for prompt, _ in asked] == [prompts[i] for i in (0, 1, 2, 0)]
    assert numbers == [0, 0, 1, 2, 0, 5 % 3]
    assert places == ["at the beach", "at the beach", "in the snow", "at the beach", "in the snow"]
    (folder / "00001.png").unlink()
    assert prompts_and_places(5) == (
        [0, 0, 2, 0, 4 % 3],
        ["at the beach", "at the beach", "in the snow", "at the beach"],
    )


def test_folder_made_with_other_settings_is_refused_by_name(models, bench, tmp_path, asked):
    config = bench.config(class_data_dir=str(tmp_path / "keyed"))
    class_images(models, config, "base", (32, 32))
    key = json.loads((tmp_path / "keyed" / "key.json").read_text())
    assert key["base"] == "base"
    cases = [
        ((config, "other", (32, 32)), ["another base"]),
        ((config, "base", (40, 32)), ["another height"]),
        ((replace(config, class_prompt=("a bowl",), seed=1), "base", (32, 32)), ["prompts, ", "seed"]),
    ]
    for args, words in cases:
        with refused("keyed holds class images made with another", *words):
            class_images(models, *args)
        with refused("keyed", *words) if words != ["another base"] else nullcontext():  # which takes the weights
            check_class_folder(args[0], models, args[2])
    moved = replace(models, schedule=replace(models.schedule, steps_offset=0))  # none is to be generated
    assert torch.equal(
        class_images(moved, config, "base", (32, 32))[0].posterior.mean,
        class_images(models, config, "base", (32, 32))[0].posterior.mean,
    )
    check_class_folder(config, moved, (32, 32))
    more = replace(config, num_class_images=3)
    with refused("keyed holds class images made with another schedule: name another folder"):
        class_images(moved, more, "base", (32, 32))
    with refused("keyed holds class images made with another schedule: name another folder"):
        check_class_folder(more, moved, (32, 32))
    (tmp_path / "keyed" / "key.json").write_text("{")
    with refused("key.json", "is not valid JSON"):
        class_images(models, config, "base", (32, 32))


def test_a_file_is_no_folder_and_a_broken_image_is_named(models, bench, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("--class_data_dir", "not a folder"):
        check_class_folder(bench.config(class_data_dir=str(tmp_path / "file")), models, (32, 32))
    with refused("--class_data_dir: in ~/mine/key.json no shell has put your home folder"):
        check_class_folder(bench.config(class_data_dir="~/mine"), models, (32, 32))
    folder = write_class_images(tmp_path / "mine")
    (folder / "0.png").write_bytes(b"nothing")
    with refused("0.png", "not a readable"):
        check_class_folder(bench.config(class_data_dir=str(folder)), models, (32, 32))


# --- Folders of the user ----------------------------------------------------------------------------------------------


MASKS = {  # a file of each mask source, and of exports that bas does not read
    "mask0.png": None,
    "mask 1.jpg": None,
    "cutout0.png": None,
    "labels.png": None,
    "regions.json": "{}",
    "coco.json": "{}",
    "masks.npy": "",
    "scene.json": "{}",
    "annotations.xml": "",
    "img-masklabel.png": None,
}


@pytest.mark.parametrize("name", MASKS)
def test_a_scene_is_no_folder_of_class_images(models, bench, tmp_path, name):
    """Whatever its masks are called; nothing is written there."""
    folder = write_class_images(tmp_path / "scene", count=1)
    (folder / "0.png").rename(folder / "img.png")
    if MASKS[name] is None:
        Image.new("L", (32, 32)).save(folder / name)
    else:
        (folder / name).write_text(MASKS[name])
    before = sorted(folder.iterdir())
    told = "masks of another tool" if name in ("annotations.xml", "img-masklabel.png") else name
    with refused(f"--class_data_dir {folder} is a scene, it has {told}: name a folder of class images"):
        check_class_folder(bench.config(class_data_dir=str(folder)), models, (32, 32))
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["1.psd", "1.jxl", "1.tga", "no suffix", "1.cr2"])
def test_images_that_are_not_read_are_named_before_others_are_generated(models, bench, tmp_path, name, caplog):
    folder = write_class_images(tmp_path / "mine", count=1)
    (folder / name).write_bytes(b"an image")
    for beside in ("0.txt", "0.json", "notes.md", ".DS_Store"):
        (folder / beside).touch()
    config = bench.config(class_data_dir=str(folder), num_class_images=2)
    with refused(f"{folder} has 1 of 2 class images", f"but {name} cannot be read"):
        check_class_folder(config, models, (32, 32))
    check_class_folder(replace(config, num_class_images=1), models, (32, 32))
    assert [record.getMessage() for record in caplog.records] == [f"{folder}: {name} are not read as class images"]
    (folder / name).unlink()
    check_class_folder(config, models, (32, 32))


def test_images_in_a_folder_within_are_named_before_others_are_generated(models, bench, tmp_path):
    """As a data set keeps them, in a folder for each class."""
    folder = write_class_images(tmp_path / "mine", count=1)
    write_class_images(folder / "dogs", count=3)
    config = bench.config(class_data_dir=str(folder), num_class_images=2)
    with refused(f"{folder} has 1 of 2 class images, and others in dogs, a folder that is not read"):
        check_class_folder(config, models, (32, 32))
    check_class_folder(replace(config, num_class_images=1), models, (32, 32))


def test_what_a_killed_process_left_is_removed(models, bench, tmp_path, asked):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".00001.png.999999.tmp").write_bytes(b"half")
    (folder / ".mine.999999.tmp").touch()
    class_images(models, bench.config(class_data_dir=str(folder)), "base", (32, 32))
    assert not (folder / ".00001.png.999999.tmp").exists()
    assert (folder / ".mine.999999.tmp").exists()


def test_the_progress_of_class_images_counts_steps(models, bench, tmp_path, monkeypatch):
    """Each of the 50 denoising steps of the missing images, in batches."""
    seen = []

    class Bar:
        def __init__(self, images, steps, stage, done):
            seen.append((images, steps, stage, done))

        def step(self, images):
            seen.append(images)

    monkeypatch.setattr("bas.training.class_images.ImageProgress", Bar)
    config = bench.config(class_data_dir=str(tmp_path / "new"), num_class_images=3, sample_batch_size=2)
    class_images(models, config, "base", (32, 32))
    assert seen == [(3, 50, "class images", 0), *[2] * 50, *[1] * 50]
