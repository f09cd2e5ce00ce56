"""What the studio does with a finished run: images and their attention, edits, exports, comparisons."""

import base64
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bas.cli.entry import main
from bas.io.images import save_image
from bas.io.json_files import read_json, write_json
from bas.io.run_files import SETTINGS
from bas.io.tensors import write_tensors
from bas.pretrained.embedding_files import write_embedding
from bas.web.studio import jobs, tasks
from bas.web.studio.app import STATIC
from bas.web.studio.runs import maps_of, marks
from bas.web.studio.tiles import pack
from tests.helpers.small_runs import LORA, write_base, write_small_run

PROMPT = "a photo of <asset0> and <asset1>"
FEW = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run whose base can be exported."""
    place = tmp_path_factory.mktemp("made")
    return write_small_run(
        place / "toy", write_base(place / "base", "sd1", whole_vocabulary=True), **LORA | {"attention_grid": 8}
    )


@pytest.fixture
def run(studio, made):
    """The run in the studio's folder."""
    return shutil.copytree(made, studio.home.folder / "runs" / "toy")


def do(studio, **body):
    """Ask for a job and run its command here. Returns the job's folder."""
    folder = studio.home.folder / "jobs" / studio.post("api/jobs", {"run": "toy", **body})["id"]
    assert main(read_json(folder / jobs.JOB)["command"]) == 0
    write_json(folder / jobs.EXIT, {"code": 0, "line": "", "ended": 0})
    return folder


def test_variations_and_every_combination_are_drawn_as_the_commands_draw_them(studio, run):
    """All concepts from three seeds; three combinations in one place; each with its settings, and the sheets."""
    do(studio, kind="vary", settings=FEW | {"num_images": 3, "seed": 4})
    do(studio, kind="explore", settings=FEW, places=["in a box"])
    rows = {row["file"].split("/")[0]: [] for row in studio.get("api/runs/toy/pictures")["pictures"]}
    for row in reversed(studio.get("api/runs/toy/pictures")["pictures"]):
        made = row["settings"]
        rows[row["file"].split("/")[0]].append((row["file"].split("/")[2], made.get("prompt"), made.get("seed")))
    assert rows["variations"] == [(f"000{i}.png", PROMPT, 4 + i) for i in range(3)] + [("grid.png", None, None)]
    prompts = [f"a photo of {what} in a box" for what in ("<asset0>", "<asset1>", "<asset0> and <asset1>")]
    assert rows["exploration"] == [(f"000{i}.png", prompts[i], 0) for i in range(3)] + [("grid.png", None, None)]
    (found,) = studio.get("api/state")["runs"]
    assert found["pictures"] == 8
    assert found["cover"].endswith("/0002.png")  # the newest that is no sheet
    for places in ([], ["-x"], ["x"] * 21, "beach"):
        answer = studio.ask("POST", "api/jobs", {"kind": "explore", "run": "toy", "places": places})
        assert (answer.status_code, answer.json()["field"]) == (422, "places")


def test_what_is_asked_for_in_vain_is_said(studio, run):
    """The warnings of the checks come back with the job; requests of one second have files of their own."""
    body = {"kind": "sample", "run": "toy", "prompt": "a photo of <asset0>", "settings": FEW | {"separate": True}}
    first, second = (studio.post("api/jobs", body) for _ in range(2))
    (line,) = first["asked"]["warnings"]
    assert line.endswith("it names fewer than two handles")
    words = [read_json(studio.home.folder / "jobs" / job["id"] / jobs.JOB)["command"] for job in (first, second)]
    targets = [word for command in words for word in command if word.startswith("--output_path=")]
    assert len({*targets}) == 2


def test_the_gallery_changes_its_version(studio, run):
    """With each new, marked, or deleted image, each file of an attention map, and with no question."""
    (run / "pictures").mkdir()
    versions = [studio.get("api/state")["runs"][0]["gallery"]]

    def changed():
        versions.append(studio.get("api/state")["runs"][0]["gallery"])
        return versions[-1] != versions[-2]

    assert not changed()
    Image.new("RGB", (16, 16)).save(run / "pictures" / "new.png")
    assert changed()
    maps = run / "attention" / "pictures-new.png"
    maps.mkdir(parents=True)
    assert changed()
    for name in ("map0.png", "maps.json"):  # `bas attend` writes them one by one
        (maps / name).write_bytes(b"")
        assert changed()
    studio.ask("PATCH", "api/runs/toy/pictures", {"file": "pictures/new.png", "star": True})
    assert changed()
    studio.ask("DELETE", "api/runs/toy/pictures", {"file": "pictures/new.png"})
    assert changed()
    assert not changed()


def test_a_folder_that_is_unchanged_is_not_read_again(studio, run, monkeypatch):
    """A new image is seen all the same, and so is one that was changed in its place."""
    for folder in ("pictures", "variations/a"):
        (run / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16)).save(run / folder / f"{i}.png")
            os.utime(run / folder / f"{i}.png", (i, i))
        os.utime(run / folder, (9, 9))
    read = []
    scandir = os.scandir
    monkeypatch.setattr("bas.web.studio.runs.os.scandir", lambda place: (read.append(place.name), scandir(place))[1])

    def found():
        read.clear()
        (row,) = studio.get("api/state")["runs"]
        return row["pictures"], row["cover"], "pictures" in read, "a" in read

    assert found() == (6, "variations/a/2.png", True, True)
    assert found() == (6, "variations/a/2.png", False, False)
    Image.new("RGB", (16, 16)).save(run / "pictures" / "new.png")
    assert found() == (7, "pictures/new.png", True, False)
    os.utime(run / "variations" / "a" / "0.png", (2**32, 2**32))
    assert studio.get("api/runs/toy/pictures")["pictures"][0]["file"] == "variations/a/0.png"


def pixels(path):
    """An image as numbers that can be subtracted."""
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("boxes", [{}, {"<asset0>": [0, 0, 0.5, 1]}])
def test_where_the_handles_of_an_image_looked(studio, run, boxes):
    """The image of the maps is the one that was asked about, with its seed and boxes; each handle has a map."""
    do(studio, kind="sample", prompt=PROMPT, settings=FEW | {"num_images": 2, "seed": 5}, boxes=boxes)
    chosen = next(row for row in studio.get("api/runs/toy/pictures")["pictures"] if row["settings"]["seed"] == 6)
    assert chosen["maps"] == []
    do(studio, kind="attend", file=chosen["file"])
    rows = {row["settings"]["seed"]: row for row in studio.get("api/runs/toy/pictures")["pictures"]}
    assert rows[5]["maps"] == []
    folder = f"attention/{chosen['file'].replace('/', '-')}"
    assert rows[6]["maps"] == [
        {"name": "<asset0>", "file": f"{folder}/map0.png"},
        {"name": "<asset1>", "file": f"{folder}/map1.png"},
    ]
    assert np.abs(pixels(run / chosen["file"]) - pixels(run / folder / "picture.png")).max() <= 1
    for each in rows[6]["maps"]:
        answer = studio.ask("GET", f"api/runs/toy/file/{each['file']}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")

    picture, notes = run / chosen["file"], run / folder / "maps.json"
    os.utime(picture, ns=(0, notes.stat().st_mtime_ns + 1))
    assert maps_of(run, chosen["file"]) == []  # of an older image of this name
    os.utime(picture, ns=(0, 0))
    assert maps_of(run, chosen["file"]) == rows[6]["maps"]
    notes.write_text("{damaged")
    assert maps_of(run, chosen["file"]) == []


def test_an_image_that_does_not_say_how_it_was_drawn_has_no_maps(studio, run):
    """Nor has one without a handle, one of other files, or one whose boxes are gone."""
    whole = {"prompt": PROMPT, "num_inference_steps": 2}
    for name, made_by, status in (
        ("unknown", None, 422),
        ("plain", whole | {"prompt": "a photo"}, 422),
        *((name, whole | {name: ["x.safetensors"]}, 422) for name in ("lora", "embedding")),
        *((name, whole | {name: "x"}, 422) for name in ("vae", "base")),
        ("boxes", whole | {"layout": str(studio.home.folder / "jobs" / "gone" / "layout.json")}, 409),
    ):
        (run / "pictures").mkdir(exist_ok=True)
        save_image(Image.new("RGB", (16, 16)), run / "pictures" / f"{name}.png", made_by)
        asked = {"kind": "attend", "run": "toy", "file": f"pictures/{name}.png"}
        assert studio.ask("POST", "api/jobs", asked).status_code == status, name
    assert studio.get("api/state")["jobs"] == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_terminals_image_shows_its_settings_in_any_format(studio, run, suffix):
    (run / "pictures").mkdir()
    save_image(Image.new("RGB", (8, 8)), run / "pictures" / f"a{suffix}", {"prompt": PROMPT, "seed": 3})
    (row,) = studio.get("api/runs/toy/pictures")["pictures"]
    assert row["settings"] == {"prompt": PROMPT, "seed": 3, "size": [8, 8]}


def test_an_image_is_looked_at_with_the_model_that_drew_it(studio, run):
    """How the model was read and computed for the image is in the command, so the same image is drawn again."""
    (run / "pictures").mkdir()
    flags = ["--clip_skip=2", "--prediction_type=v_prediction", "--precision=fp32"]
    words = ["sample", str(run), f"--prompt={PROMPT}", "--num_inference_steps=2", *flags]
    assert main([*words, f"--output_path={run / 'pictures' / 'a.png'}"]) == 0
    job = do(studio, kind="attend", file="pictures/a.png")
    assert set(flags) <= {*jobs.words_of(job)}
    assert np.abs(pixels(run / "pictures/a.png") - pixels(run / "attention/pictures-a.png/picture.png")).max() <= 1
    save_image(Image.new("RGB", (16, 16)), run / "pictures" / "b.png", {"prompt": PROMPT, "precision": "bf16"})
    job = studio.post("api/jobs", {"kind": "attend", "run": "toy", "file": "pictures/b.png"})
    assert "--precision=bf16" in jobs.words_of(studio.home.folder / "jobs" / job["id"])


def test_favourites_of_one_moment_are_all_kept(studio, run):
    """Requests of several threads: each mark is there afterwards, and none of them fails."""
    (run / "pictures").mkdir()
    files = [f"pictures/{i}.png" for i in range(24)]
    for file in files:
        Image.new("RGB", (8, 8)).save(run / file)

    def star(file):
        return studio.ask("PATCH", "api/runs/toy/pictures", {"file": file, "star": True}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(star, files)] == [200] * len(files)
    assert sorted(marks(run)) == sorted(files)


def test_previews_of_a_baseline_are_never_of_phase_1(studio, run):
    """It has one phase and trains from its first step; another method shows no concept before phase 2."""
    place = run / "previews" / "pictures" / "step-000005"
    place.mkdir(parents=True)
    for path in (place / "sample-0.png", run / "previews" / "step-000005.png"):
        Image.new("RGB", (8, 8)).save(path)
    record = read_json(run / SETTINGS)
    for method, trained in (("bas", False), ("db", True)):
        write_json(run / SETTINGS, record | {"config": record["config"] | {"method": method}})
        (found,) = studio.get("api/runs/toy")["previews"]
        assert (found["step"], found["trained"]) == (5, trained)


def test_an_edit_beside_what_it_was_made_from(studio, run):
    """The image before comes back as it was, and the changed pixels outside of the mask are counted: none, then 3."""
    (run / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "pictures" / "before.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    body = {"of": "toy", "file": "pictures/before.png", "prompt": PROMPT, "mask": base64.b64encode(pack(mask)).decode()}
    job = do(studio, kind="edit", settings=FEW | {"num_images": 2}, **body)
    files = sorted(row["file"] for row in studio.get("api/runs/toy/pictures")["edits"])
    assert len(files) == 2
    for file in files:
        assert studio.get(f"api/runs/toy/edited?file={file}") == {"job": job.name, "outside": 0}
    before = studio.ask("GET", f"api/jobs/{job.name}/image")
    (run / "before.png").write_bytes(before.content)
    assert np.array_equal(pixels(run / "before.png"), noise)

    after = pixels(run / files[0]).astype(np.uint8)
    assert (after != noise).any(axis=2).sum() > 100
    after[0, :3] ^= 1
    after[10, 10] ^= 1  # inside
    Image.fromarray(after).save(run / files[0])
    assert studio.get(f"api/runs/toy/edited?file={files[0]}")["outside"] == 3
    assert studio.ask("GET", "api/runs/toy/edited?file=pictures/before.png").status_code == 404


def test_a_deleted_image_comes_back(studio, run):
    """To its run, with its bytes; not while that run is in the trash itself."""
    (run / "pictures").mkdir()
    Image.new("RGB", (16, 16), "red").save(run / "pictures" / "red.png")
    data = (run / "pictures" / "red.png").read_bytes()
    name = studio.ask("DELETE", "api/runs/toy/pictures", {"file": "pictures/red.png"}).json()["trash"]
    assert studio.get("api/runs/toy/pictures")["pictures"] == []
    gone = studio.ask("DELETE", "api/runs/toy").json()["trash"]
    refused = studio.ask("POST", f"api/trash/{name}")
    assert (refused.status_code, refused.json()["code"]) == (409, "missing")
    studio.post(f"api/trash/{gone}")
    assert studio.post(f"api/trash/{name}") == {"was": "runs/toy/pictures/red.png"}
    assert (run / "pictures" / "red.png").read_bytes() == data
    assert studio.get("api/trash") == []


def test_a_concept_is_cut_out_of_the_photograph(studio, run):
    """Its pixels where its mask is white, no more than its box, and nothing for a concept that the run has not."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[5:25, 10:40], mask[5:15, 10:20] = 255, 0
    scene = run / "scene"
    shutil.rmtree(scene, ignore_errors=True)
    (scene / "1").mkdir(parents=True)
    Image.fromarray(pixels).save(scene / "img.png")
    Image.fromarray(mask).save(scene / "mask0.png")
    Image.fromarray(pixels[::-1].copy()).save(scene / "1" / "img.png")
    Image.fromarray(mask[::-1].copy()).save(scene / "1" / "mask1.png")  # as in a merged run: an image of its own
    for number, turn in ((0, 1), (1, -1)):
        answer = studio.ask("GET", f"api/runs/toy/cutout/{number}")
        found = np.asarray(Image.open(io.BytesIO(answer.content)))[::turn]
        assert np.array_equal(found[..., 3], mask[5:25, 10:40])
        assert np.array_equal(found[..., :3], pixels[5:25, 10:40])
    assert studio.ask("GET", "api/runs/toy/cutout/2").status_code == 404
    assert studio.ask("GET", "api/runs/toy/cutout/x").status_code == 400


@pytest.mark.parametrize(
    ("form", "names", "said"),
    [
        ("single", ["asset0", "asset1", "toy"], "ComfyUI: CheckpointLoaderSimple toy; a photo of embedding:asset0"),
        ("kohya", ["asset0", "asset1", "toy"], "A1111, Forge: a photo of asset0 <lora:toy:1>"),
    ],
)
def test_a_run_is_taken_away(studio, run, capsys, form, names, said):
    """The files of an export are listed with their sizes, are those of the command, and what to type is printed."""
    before = {row["form"]: row for row in studio.get("api/runs/toy/exports")}
    assert (before[form]["problem"], before[form]["files"]) == (None, [])
    do(studio, kind="export", form=form)
    printed = capsys.readouterr().out
    assert said in printed
    (row,) = [row for row in studio.get("api/runs/toy/exports") if row["form"] == form]
    assert said in [f"{use['program']}: {use['line']}" for use in row["uses"]]
    assert all(f"{use['program']}: {use['line']}\n" in printed for use in row["uses"])
    found = row["files"]
    tensors = [row for row in found if row["file"].endswith(".safetensors")]
    assert [row["file"] for row in tensors] == [f"exports/{form}/{name}.safetensors" for name in names]
    assert all(row["bytes"] == (run / row["file"]).stat().st_size for row in found)
    own = load_file(run / "concepts.safetensors")["handles"]
    (row,) = load_file(run / tensors[0]["file"]).values()
    assert np.abs((row.float() - own[:1]).numpy()).max() < 1e-3  # an export of a small run is in fp16


def test_an_export_says_what_it_was_trained_on_top_of(studio, run, capsys):
    """As the command does: another run's adapters are no part of this one's."""
    write_small_run(run.parent / "second", run, ("<toy>",), **LORA)
    do(studio, kind="export", form="kohya", run="second")
    line = f"The run was trained on top of {run}: export that too, and add it there"
    assert line in capsys.readouterr().out.splitlines()
    rows = studio.get("api/runs/second/exports")
    assert {row["form"]: row["needs"] for row in rows} == {"single": [], "kohya": [line], "peft": []}


def test_a_merged_run_has_no_scene_to_train_again(studio, run):
    """It was trained on none itself: the page leaves out "Change settings"."""
    (found,) = studio.get("api/state")["runs"]
    assert found["scene"] == "scene"
    record = read_json(run / SETTINGS)
    write_json(run / SETTINGS, record | {"merged": {"runs": ["a", "b"], "weights": [1.0, 1.0], "drift": {}}})
    (found,) = studio.get("api/state")["runs"]
    assert found["scene"] is None


def test_what_to_type_is_that_of_the_export_which_lies_there(studio, run):
    """Also of one that a terminal made, with other names, and of differences with a LoRA beside them."""
    place = run / "exports" / "kohya"
    place.mkdir(parents=True)
    write_tensors(place / "toy.safetensors", {"a": torch.zeros(1)})
    write_embedding(place / "my-bowl.safetensors", [torch.zeros(1, 8)], {"bas.handle": "<asset0>"})

    def uses():
        return {use["program"]: use["line"] for use in tasks.uses_of(run, "kohya")}

    assert studio.get("api/runs/toy/exports")[1]["uses"] == tasks.uses_of(run, "kohya")
    assert uses()["InvokeAI"] == "LoRA toy; a photo of <my-bowl>"
    assert 'weight_name="toy.safetensors"' in uses()["diffusers"]
    assert uses()["diffusers"].endswith('"my-bowl.safetensors", token="<asset0>"); "a photo of <asset0>"')
    shutil.copy(place / "toy.safetensors", place / "toy-lora.safetensors")
    assert 'weight_name="toy-lora.safetensors"' in uses()["diffusers"]
    (place / "my-bowl.safetensors").write_text("damaged")
    assert uses() == {}


@pytest.mark.parametrize(
    ("single", "small", "reasons"),
    [(None, False, ["whole"]), ("vocabulary", False, ["whole", "vocabulary"]), ("tokens", True, ["tokens"])],
)
def test_a_form_that_a_run_cannot_have_names_a_card_of_the_page(studio, run, monkeypatch, single, small, reasons):
    """And no flag of the command line; never one that the card beside refuses."""

    def plan(_run, _target, form, _prefix):
        if reason := single if form == "single" else reasons[0]:
            raise tasks.Unsuited("this is for --format users", reason)

    monkeypatch.setattr(tasks, "plan_export", plan)
    if not small:
        (run / "tuned.safetensors").unlink()
    page = (STATIC / "runs.js").read_text()
    for row in studio.get("api/runs/toy/exports"):
        if row["problem"] is None:
            assert row["form"] == "single"
            continue
        assert "--" not in row["problem"]
        card = row["problem"].split('"')[-2]
        assert f'"{card}"' in page
        assert card == ("One file" if single is None else f"The {'run' if small else 'model'} as a folder")


def test_runs_are_compared_by_the_settings_that_differ(studio, run):
    """Those alone, each with the values of the runs in their order."""
    settings = json.loads((run / "settings.json").read_text())
    other = shutil.copytree(run, run.parent / "other")
    settings["config"] |= {"rank": 2, "seed": 9}
    (other / "settings.json").write_text(json.dumps(settings))
    rows = [
        {"phase": phase, "step": step, "loss": 0.5} for step, phase in ((1, "phase1"), (2, "phase1"), (3, "phase2"))
    ]
    (other / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = studio.get("api/compare?runs=toy|other")
    assert found["runs"] == ["toy", "other"]
    assert found["differs"] == [{"name": "rank", "values": ["4", "2"]}, {"name": "seed", "values": ["0", "9"]}]
    none, curves = found["metrics"]
    assert none == {"steps": [], "starts": [], "curves": []}
    assert (curves["steps"], curves["starts"]) == ([1, 2, 3], [3])  # the second phase alone has a line
    assert [each["name"] for each in curves["curves"]] == ["loss"]
    assert studio.get("api/compare?runs=toy|toy")["differs"] == []
    assert studio.ask("GET", "api/compare?runs=toy|nothing").status_code == 404
