"""The evaluation: what is planned, drawn and scored, that it resumes and is shared, and what its tables say."""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copy, copytree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import bas
from bas.cli.entry import main
from bas.config import SampleConfig, TrainConfig
from bas.errors import RunError
from bas.evaluation import generation, runner
from bas.evaluation.baselines import PAPER, VARIANTS, training_of
from bas.evaluation.page import page
from bas.evaluation.plot import scatter
from bas.evaluation.protocol import agree_on, check_finished, plan_trials, run_trial
from bas.evaluation.runner import EvaluationContext, counted_seconds, evaluate_each, measured_seconds, write_results
from bas.evaluation.scores import score_trial, summary_of_handles
from bas.evaluation.segments import segment_by_attention
from bas.evaluation.tables import Interval, compare, interval, markdown, shown_columns, summarise, verdict
from bas.pretrained.folder import load
from bas.runtime.signals import Interrupted
from bas.sampling.attention_maps import attend
from bas.sampling.gallery import CONTEXTS
from tests.helpers.faults import before_step, heard
from tests.helpers.sdxl import XLBench
from tests.helpers.tiny import refused, write_scene

SAMPLING = SampleConfig(num_inference_steps=2, batch_size=4)
FACTS = {"base": "tiny"}
WORDS = ("cat", "dog")


class Stand:
    """Stands in for the metrics: red is what follows prompts, and likeness is that of the mean colours."""

    right = 0.5

    def prompt_similarity(self, images, prompts):
        return [np.asarray(image)[..., 0].mean() / 255 for image in images]

    def identity_similarity(self, images, image, mask, segments=None):
        wanted = np.asarray(image)[mask > 0.5].mean(axis=0)
        places = segments or [np.ones(np.asarray(image).shape[:2]) for image in images]
        means = [np.asarray(p)[place > 0.5].mean(axis=0) for p, place in zip(images, places, strict=True)]
        return [1 - np.abs(mean - wanted).mean() / 255 for mean in means]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[Path]:
    """Two scenes, of 1 and 2 concepts."""
    folder = tmp_path_factory.mktemp("evaluation")
    return [with_words(write_scene(folder / name, concepts=i), WORDS[:i]) for i, name in enumerate(("ant", "bee"), 1)]


def with_words(scene: Path, words: tuple[str | None, ...]) -> Path:
    """Name the concepts of a scene folder."""
    (scene / "scene.json").write_text(json.dumps({"concepts": [{"word": word} for word in words]}))
    return scene


@pytest.fixture(scope="module")
def explicit(bench) -> dict:
    """The bench's short training, as flags that hold for every method."""
    config, plain = vars(bench.config()), vars(TrainConfig())
    kept = {name: value for name, value in config.items() if value != plain[name]}
    return {name: kept[name] for name in kept if name not in ("instance_data_dir", "output_dir", "img_log_steps")}


def planned(folder: Path, scenes: list[Path], explicit: dict, methods=("bas", "ti-m"), seeds=(0,)):
    """A plan with two contexts."""
    return plan_trials(folder, scenes, methods, seeds, CONTEXTS[:2], explicit, None)


def workplace(bench, **changes) -> EvaluationContext:
    """What the trials share, with the stand-in for metrics."""
    return EvaluationContext(bench.model, torch.device("cpu"), SAMPLING, lambda: (Stand(), None), **changes)


@pytest.fixture(scope="module")
def done(bench, scenes, explicit, tmp_path_factory):
    """A finished evaluation of two scenes and two methods: its folder and trials."""
    folder = tmp_path_factory.mktemp("done") / "out"
    trials = planned(folder, scenes, explicit)
    outcomes = list(evaluate_each(trials, workplace(bench)))
    assert [(outcome.error, outcome.earlier) for outcome in outcomes] == [(None, False)] * 4
    write_results(folder, trials, FACTS)
    return folder, trials


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_an_sdxl_base_is_evaluated(tmp_path):
    """A trial of the method and one of a baseline that trains no text encoder: images of its size, and their scores."""
    xl = XLBench(tmp_path / "xl")
    scene = with_words(write_scene(tmp_path / "scene", concepts=2, size=(64, 64)), WORDS)
    explicit = {"pretrained_model_name_or_path": str(xl.model), "resolution": 64, "mixed_precision": "no"}
    explicit |= {"class_data_dir": str(xl.class_images), "num_class_images": 2}
    explicit |= {"phase1_train_steps": 1, "phase2_train_steps": 1}
    trials = planned(tmp_path / "out", [scene], explicit, methods=("bas", "cd-m"))
    assert [outcome.error for outcome in evaluate_each(trials, workplace(xl))] == [None, None]
    write_results(tmp_path / "out", trials, FACTS)
    images = [row for row in rows_of(tmp_path / "out") if "prompt" in row]
    assert len(images) == 2 * 3 * 2  # methods, subsets of two concepts, contexts
    assert all(0 <= row["prompt_similarity"] <= 1 for row in images)
    drawn = sorted((tmp_path / "out" / "cells").rglob("*.png"))
    assert {Image.open(path).size for path in drawn if path.stem.isdigit()} == {(64, 64)}


# --- The plan -----------------------------------------------------------------------------------------------------


def test_every_row_is_the_same_training_but_for_what_it_says(explicit):
    """Settings that hold for all reach every row, also where a baseline has none of its own of that kind."""
    plain = training_of("bas", explicit, None)
    for name, row in VARIANTS.items():
        config = training_of(name, explicit | {"lambda_attention": 0.2, "initial_learning_rate": 7e-4}, None)
        assert config.initial_learning_rate == 7e-4
        assert config.num_class_images == plain.num_class_images
        for setting, value in row.settings.items():
            assert getattr(config, setting) == value
        assert config.lambda_attention == (0.0 if row.settings.get("method") or name == "no-attention" else 0.2)
    assert len(PAPER) == 10
    with refused("--methods dreambooth", "db-m"):
        training_of("dreambooth", {}, None)


def test_ablations_are_four():
    """The paper's: without phase 1, the masked loss, the attention loss, union sampling."""
    changes = {name: row.settings for name, row in VARIANTS.items() if row.kind == "ablation"}
    assert changes == {
        "no-phase1": {"phase1_train_steps": 0},
        "no-mask": {"apply_masked_loss": False},
        "no-attention": {"lambda_attention": 0.0},
        "single": {"subset_sampling": "single"},
    }


def test_a_scene_without_words_is_refused_before_anything_is_trained(explicit, tmp_path):
    """CLIP compares an image with its prompt in words, so a concept without one has no prompt similarity."""
    scene = with_words(write_scene(tmp_path / "scene", concepts=2), ("cat", None))
    with refused(f'{scene} has no word for <asset1>: write its "word" into {scene}/scene.json'):
        planned(tmp_path / "out", [scene], explicit)
    assert not (tmp_path / "out").exists()


def test_all_scenes_that_cannot_be_used_are_named_at_once(explicit, tmp_path, caplog):
    """Before anything is trained, so that one look mends them all."""
    places = [write_scene(tmp_path / name, concepts=1) for name in ("ant", "bee", "cow")]
    with_words(places[0], ("ant",))
    Image.new("L", (32, 32)).save(places[1] / "mask0.png")
    with refused("2 of 3 scenes cannot be used, as listed above: mend or leave out bee, cow"):
        planned(tmp_path / "out", places, explicit)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [line.split(":")[0] for line in lines] == [f"{place} cannot be used" for place in places[1:]]
    assert str(places[1] / "mask0.png") in lines[0]
    assert f"{places[2]} has no word for <asset0>" in lines[1]
    assert not (tmp_path / "out").exists()


def test_scenes_behind_links_are_called_as_the_links(explicit, tmp_path):
    """The folders behind them have one name, and their trials would share a folder."""
    scenes = []
    for name in ("one", "two"):
        target = with_words(write_scene(tmp_path / name / "photo", concepts=1), ("cat",))
        (tmp_path / f"link-{name}").symlink_to(target)
        scenes.append(tmp_path / f"link-{name}")
    trials = planned(tmp_path / "out", scenes, explicit, methods=("bas",))
    assert [trial.scene for trial in trials] == ["link-one", "link-two"]
    assert [trial.folder.relative_to(tmp_path / "out/cells").as_posix() for trial in trials] == [
        "link-one/bas/seed-0",
        "link-two/bas/seed-0",
    ]


def test_trials_draw_every_subset_in_every_context(scenes, explicit, tmp_path):
    trials = planned(tmp_path, scenes, explicit, seeds=(0, 3))
    assert [(c.scene, c.method, c.seed) for c in trials] == [
        (scene, method, seed) for seed in (0, 3) for scene in ("ant", "bee") for method in ("bas", "ti-m")
    ]
    asked = [(request.prompt, request.concepts) for request in trials[2].requests]
    assert asked == [
        (f"a photo of {names} {context}", concepts)
        for names, concepts in (("<asset0>", (0,)), ("<asset1>", (1,)), ("<asset0> and <asset1>", (0, 1)))
        for context in ("at the beach", "in the jungle")
    ]
    assert [request.noise for request in trials[2].requests] == list(range(6))
    assert trials[2].requests == trials[3].requests
    assert [trial.training.seed for trial in trials] == [0] * 4 + [3] * 4
    noises = [request.noise for trial in (trials[2], trials[6]) for request in trial.requests]
    assert len(set(noises)) == 12


def test_a_folder_holds_one_kind_of_evaluation(tmp_path):
    facts = {"base": "abc", "contexts": ["x"], "sampling": {"eta": 0.0, "seed": 1}}
    agree_on(tmp_path / "out", facts)
    agree_on(tmp_path / "out", facts)
    with refused("another contexts, sampling eta (0.0 there): give the same, or name a new --output_dir"):
        agree_on(tmp_path / "out", facts | {"contexts": ["y"], "sampling": {"eta": 1.0, "seed": 1}})


def test_a_setting_that_one_call_leaves_out_differs(tmp_path):
    """Its value is then that of the method and of the base: a table of both would mix two trainings."""
    facts = {"training": {"phase1_train_steps": 100}}
    agree_on(tmp_path / "out", facts)
    with refused("another training phase1_train_steps (100 there): give the same"):
        agree_on(tmp_path / "out", {"training": {}})
    with refused("another training phase1_train_steps (100 there), training rank (not given there): give the same"):
        agree_on(tmp_path / "out", {"training": {"phase1_train_steps": 400, "rank": 4}})
    agree_on(tmp_path / "out", facts)


def test_settings_of_memory_may_differ(tmp_path):
    """As for a training that resumes, so that an evaluation goes on after it ran out of memory."""
    more = {"gradient_checkpointing": True, "sample_batch_size": 1, "log_steps": 5}
    for first, second in (({}, more), (more, {})):
        folder = tmp_path / str(len(first))
        agree_on(folder, {"sampling": {"eta": 0.0, "batch_size": 4}, "training": {"rank": 4, **first}})
        agree_on(folder, {"sampling": {"eta": 0.0, "batch_size": 1}, "training": {"rank": 4, **second}})
        assert json.loads((folder / "plan.json").read_text()) == {"sampling": {"eta": 0.0}, "training": {"rank": 4}}
        with refused("another training compile (not given there), training rank (4 there): give the same"):
            agree_on(folder, {"sampling": {"eta": 0.0}, "training": {"compile": "whole"}})
        with refused("another training class_data_dir (not given there): give the same"):
            agree_on(folder, {"sampling": {"eta": 0.0}, "training": {"rank": 4, "class_data_dir": "images"}})


def test_a_plan_of_an_earlier_version_is_gone_on_with(tmp_path):
    """It notes settings that are free or gone, and lacks those of sampling that were not known yet."""
    old = {"sampling": {"eta": 0.5, "batch_size": 4}}
    old |= {"training": {"rank": 4, "gradient_checkpointing": True, "fused_kernels": False, "unet_layers": "all"}}
    (tmp_path / "plan.json").write_text(json.dumps(old))
    agree_on(tmp_path, {"sampling": {"eta": 0.5, "guidance_rescale": 0.0}, "training": {"rank": 4}})
    with refused("another sampling guidance_rescale (0.0 there): give the same"):
        agree_on(tmp_path, {"sampling": {"eta": 0.5, "guidance_rescale": 0.7}, "training": {"rank": 4}})
    assert json.loads((tmp_path / "plan.json").read_text()) == old


def test_a_finished_trial_keeps_the_settings_that_it_was_trained_with(scenes, explicit, done):
    """Those of the base's bas.json too, which no flag names."""
    folder, trials = done
    check_finished(trials)
    check_finished(planned(folder, scenes, explicit | {"gradient_checkpointing": True}))
    changed = plan_trials(folder, scenes, ("bas", "ti-m"), (0,), CONTEXTS[:2], explicit, {"lr_num_cycles": 3})
    with refused(
        f"{trials[0].training.output_dir} was made with another --lr_num_cycles: give the same, or name a new"
    ):
        check_finished(changed)
    check_finished(plan_trials(folder, scenes, ("uniform",), (0,), CONTEXTS[:2], explicit, {"lr_num_cycles": 3}))


def test_estimates(bench, scenes, explicit, done, tmp_path):
    """Counted: twice the scenes take twice as long. Measured: the mean of what is finished."""
    trials = planned(tmp_path, scenes[:1], explicit, methods=("ti",))
    assert measured_seconds(trials) is None
    assert counted_seconds(trials, SAMPLING) > 0
    assert counted_seconds([], SAMPLING) == 0
    notes = [json.loads((trial.folder / "cell.json").read_text())["seconds"] for trial in done[1]]
    assert measured_seconds(done[1]) == pytest.approx(sum(n["training"] + n["drawing"] for n in notes) / 4)


# --- Cells --------------------------------------------------------------------------------------------------------


def test_a_trial_draws_what_a_run_of_its_own_draws(bench, scenes, explicit, done, tmp_path):
    """The same bits as `bas train` and `bas sample`, though other trials were trained from the base before."""
    trial = done[1][3]
    assert (trial.scene, trial.method) == ("bee", "ti-m")
    folder = bas.train(replace(trial.training, output_dir=str(tmp_path / "run")))
    models = load(folder)
    for i in (0, 5):
        request = trial.requests[i]
        (expected,) = bas.sample(models, request.prompt, replace(SAMPLING, seed=request.noise))
        with Image.open(trial.folder / f"{i:04d}.png") as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
            assert json.loads(image.text["bas"])["prompt"] == request.prompt


def test_tuned_weights_are_not_kept(done):
    assert not list(done[0].rglob("*.safetensors"))


def test_rows_hold_what_was_measured(scenes, done):
    folder, trials = done
    rows = rows_of(folder)
    images = [row for row in rows if row["row"] == "picture"]
    assert len(images) == 2 * (2 + 6)
    assert all((row["seed"], row["scene"]) == (0, "bee") for row in images[-6:])
    last = images[-1]
    assert last["prompt"] == "a photo of <asset0> and <asset1> in the jungle"
    assert last["text"] == "a photo of cat and dog in the jungle"
    with Image.open(trials[3].folder / last["file"]) as image:
        assert last["prompt_similarity"] == pytest.approx(np.asarray(image)[..., 0].mean() / 255)
        photo, mask = (np.asarray(Image.open(scenes[1] / name)) for name in ("img.png", "mask1.png"))
        (likeness,) = Stand().identity_similarity([image], photo, mask / 255)
    assert last["identity"].keys() == {"<asset0>", "<asset1>"}
    assert last["identity"]["<asset1>"] == pytest.approx(likeness)
    assert last["identity_similarity"] == pytest.approx(np.mean(list(last["identity"].values())))
    trial = rows[-1]
    assert trial["row"] == "cell"
    assert all(0 <= value <= 1 for value in trial["attention_iou"].values())
    alone = [row["identity"]["<asset0>"] for row in images[-6:] if row["concepts"] == [0]]
    assert trial["draws"]["<asset0>"]["<asset0>"] == pytest.approx(np.mean(alone))


def test_metrics_that_are_not_here_are_found_before_anything_is_trained(bench, scenes, explicit, tmp_path, capsys):
    assert main([*words(bench, explicit, scenes, tmp_path / "out"), "--clip", str(tmp_path), "--segments", "none"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_command_compares_all_settings_but_those_of_memory(bench, scenes, explicit, tmp_path, capsys):
    """Both the file's and the flags'. The models of the metrics are missing, so nothing is trained."""
    line = [*words(bench, explicit, scenes, tmp_path / "out"), "--clip", str(tmp_path), "--segments", "none"]
    assert main([*line, "--learning_rate", "0.001"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main([*line, "--learning_rate", "0.001", "--gradient_checkpointing", "--batch_size", "1"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(line) == 2
    said = f"{tmp_path / 'out'} holds an evaluation with another training learning_rate (0.001 there): give the same"
    assert said in capsys.readouterr().err


def test_leakage_of_handles_by_hand():
    """Handle 1 draws concept 0 more than its own; one handle alone can confuse nothing."""
    found = summary_of_handles(["<a>", "<b>"], [0.5, 0.25], np.array([[0.9, 0.2], [0.6, 0.4]]))
    assert found["leakage"] == pytest.approx(0.4)
    assert found["confused"] == 0.5
    assert found["draws"]["<b>"] == {"<a>": 0.6, "<b>": 0.4}
    alone = summary_of_handles(["<a>"], [0.5], np.array([[0.9]]))
    assert (alone["leakage"], alone["confused"]) == (None, None)


def test_segments_are_those_of_the_concepts_word(done):
    """Each concept's own images are asked for, by its word, and identity is measured there."""
    asked = []

    def segments(images, word):
        asked.append((len(images), word))
        place = np.zeros((32, 32))
        place[:4] = 1
        return [place] * len(images)

    before = rows_of(done[0])[-7:-1]
    rows = score_trial(done[1][3], Stand(), (32, 8), segments)
    assert asked == [(4, "cat"), (4, "dog")]
    assert all(a["identity"] != b["identity"] for a, b in zip(rows[:-1], before, strict=True))
    score_trial(done[1][3], Stand(), (32, 8))


def test_an_image_is_right_where_every_named_concept_is_found(done):
    """From the measure's own value on; a measure without such a value says nothing."""
    before, stand = rows_of(done[0])[-7:-1], Stand()
    least = [min(row["identity"].values()) for row in before]
    for stand.right in (sorted(least)[3], None):
        found = [row["right"] for row in score_trial(done[1][3], stand, (32, 8))[:-1]]
        assert found == [None if stand.right is None else float(value >= stand.right) for value in least]
        assert {*found} == ({None} if stand.right is None else {0.0, 1.0})
    score_trial(done[1][3], Stand(), (32, 8))


def test_segments_of_the_handles_attention_lie_beside_the_images(bench, scenes, explicit, done, tmp_path):
    """Of the same images, one file for each concept of a prompt, where `bas attend` sees its handle look."""
    (trial,) = planned(tmp_path, scenes[1:], explicit, methods=("bas",))
    bench_with_files = replace(workplace(bench), make_scorer=lambda: (Stand(), "files"))
    assert [outcome.error for outcome in evaluate_each([trial], bench_with_files)] == [None]
    same = done[1][2]
    assert (same.scene, same.method) == (trial.scene, trial.method)
    names = sorted(path.name for path in trial.folder.glob("*-mask*.png"))
    assert names == [
        *("0000-mask0.png", "0001-mask0.png", "0002-mask1.png", "0003-mask1.png"),
        *("0004-mask0.png", "0004-mask1.png", "0005-mask0.png", "0005-mask1.png"),
    ]
    for i in range(6):
        pair = [np.asarray(Image.open(c.folder / f"{i:04d}.png")).astype(int) for c in (trial, same)]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    models = load(bas.train(replace(trial.training, output_dir=str(tmp_path / "run"), resume_from_checkpoint=None)))
    request = trial.requests[4]
    seen = attend(models, request.prompt, replace(SAMPLING, seed=request.noise))
    for k in range(2):
        expected = segment_by_attention(seen.maps[k], (32, 32))
        found = np.asarray(Image.open(trial.folder / f"0004-mask{k}.png")) / 255
        assert np.abs(found - expected).mean() < 0.01
    rows = [[json.loads(text) for text in (c.folder / "rows.jsonl").read_text().splitlines()] for c in (trial, same)]
    with Image.open(trial.folder / "0004.png") as image:
        photo, mask = (np.asarray(Image.open(scenes[1] / name)) for name in ("img.png", "mask0.png"))
        place = np.asarray(Image.open(trial.folder / "0004-mask0.png")) / 255
        (likeness,) = Stand().identity_similarity([image], photo, mask / 255, [place])
    assert rows[0][4]["identity"]["<asset0>"] == pytest.approx(likeness)
    assert [row["identity"] for row in rows[0][:6]] != [row["identity"] for row in rows[1][:6]]


def test_what_is_finished_is_left_and_what_is_not_goes_on(bench, scenes, explicit, done, tmp_path, monkeypatch):
    """A signal while a trial draws ends the evaluation; the same plan again does the rest, with the same results."""
    trials = planned(tmp_path / "out", scenes, explicit)
    original, calls = generation.generate, []

    def interrupting(prompts, *args):
        calls.append(len(prompts))
        if len(calls) == 3:  # the first batch of the third trial
            os.kill(os.getpid(), 2)
        return original(prompts, *args)

    with monkeypatch.context() as patch, heard():
        patch.setattr(generation, "generate", interrupting)
        with pytest.raises(Interrupted, match="the same command goes on") as stop:
            list(evaluate_each(trials, workplace(bench)))
    assert stop.value.exit_code == 130
    again = planned(tmp_path / "out", scenes, explicit)
    assert [trial.finished for trial in again] == [True, True, False, False]
    assert [outcome.earlier for outcome in evaluate_each(again, workplace(bench))] == [True, True, False, False]
    write_results(tmp_path / "out", again, FACTS)
    assert rows_of(tmp_path / "out") == rows_of(done[0])


def test_a_trial_that_was_interrupted_leaves_no_checkpoint(bench, scenes, explicit, tmp_path, monkeypatch):
    """It takes as much room as the model and its optimizer, and what is drawn needs it no more."""
    with monkeypatch.context() as patch, heard():
        before_step(patch, 2, lambda *args: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            list(evaluate_each(planned(tmp_path, scenes[:1], explicit, methods=("ti-m",)), workplace(bench)))
    assert len(list(tmp_path.rglob("state.safetensors"))) == 1
    (trial,) = planned(tmp_path, scenes[:1], explicit, methods=("ti-m",))
    assert [outcome.error for outcome in evaluate_each([trial], workplace(bench))] == [None]
    assert trial.finished
    assert not list(tmp_path.rglob("checkpoints"))


def test_the_base_predicts_what_the_plan_says(bench, scenes, explicit, tmp_path):
    """Over what its files say: epsilon."""
    explicit = explicit | {"prediction_type": "v_prediction"}
    trials = planned(tmp_path, scenes[:1], explicit, methods=("ti-m",))
    place = workplace(bench, prediction_type="v_prediction")
    assert [outcome.error for outcome in evaluate_each(trials, place)] == [None]
    settings = json.loads((Path(trials[0].training.output_dir) / "settings.json").read_text())
    assert settings["schedule"]["prediction_type"] == "v_prediction"


def test_what_cannot_be_drawn_is_found_before_anything_is_trained(bench, scenes, explicit, tmp_path):
    trials = planned(tmp_path, scenes, explicit)
    for sampling, reason in (
        (replace(SAMPLING, num_inference_steps=1001), "1001 denoising steps"),
        (replace(SAMPLING, height=31), "--height 31"),
        (replace(SAMPLING, negative_prompt="<toy>"), "unknown handle <toy>"),
    ):
        with refused(reason):
            list(evaluate_each(trials, replace(workplace(bench), sampling=sampling)))
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_is_too_large_stops_no_other(bench, scenes, explicit, tmp_path, monkeypatch):
    def too_large(trial, *args):
        if trial.method == "ti-m":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(trial, *args)

    original = run_trial
    monkeypatch.setattr(runner, "run_trial", too_large)
    outcomes = list(evaluate_each(planned(tmp_path, scenes[:1], explicit), workplace(bench)))
    advice = "add --gradient_checkpointing or a smaller --batch_size to the same command, which goes on"
    assert [outcome.error for outcome in outcomes] == [None, f"cpu is out of memory: {advice}"]


def test_a_scene_that_changed_since_its_training_is_not_scored(bench, scenes, explicit, tmp_path):
    """Its masks and words are no longer those of the images. The other scene's trial goes on."""
    mine = [copytree(scene, tmp_path / "scenes" / scene.name) for scene in scenes]
    trials = planned(tmp_path / "out", mine, explicit, methods=("bas",))
    for trial in trials:
        run_trial(trial, workplace(bench).base, SAMPLING)
    copy(scenes[1] / "mask1.png", mine[0] / "mask1.png")
    with_words(mine[0], WORDS[:2])
    outcomes = list(evaluate_each(trials, workplace(bench)))
    assert [outcome.error is None for outcome in outcomes] == [False, True]
    assert outcomes[0].error.startswith(f"{mine[0]} was changed after the trial was trained: bring it back as it was")
    (mine[0] / "mask1.png").unlink()
    with_words(mine[0], ("stone",))
    assert "was changed after" in next(evaluate_each(trials, workplace(bench))).error
    with_words(mine[0], WORDS[:1])
    assert next(evaluate_each(trials, workplace(bench))).error is None


@pytest.mark.parametrize("seed", [2**62, -(2**62), 2**50])
def test_a_seed_without_room_for_those_of_images_is_refused(scenes, explicit, tmp_path, seed):
    """Before anything is trained: image i of a trial has the seed 10,000 x seed + i."""
    with refused(f"--seeds is {seed}"):
        planned(tmp_path / "out", scenes, explicit, seeds=(0, seed))


def test_a_trial_that_fails_stops_no_other(bench, scenes, explicit, tmp_path, monkeypatch):
    original = run_trial

    def failing(trial, *args):
        if trial.method == "ti-m":
            raise RunError("phase2 step 5: loss is nan")
        return original(trial, *args)

    monkeypatch.setattr(runner, "run_trial", failing)
    trials = planned(tmp_path, scenes, explicit)
    outcomes = list(evaluate_each(trials, workplace(bench)))
    assert [outcome.error for outcome in outcomes] == [None, "phase2 step 5: loss is nan"] * 2
    write_results(tmp_path, trials, FACTS)
    assert {row["method"] for row in rows_of(tmp_path)} == {"bas"}
    with pytest.raises(RunError, match="nothing to show"):
        write_results(tmp_path, trials[1::2], FACTS)


# --- Tables, plot, page -------------------------------------------------------------------------------------------


def row(method: str, scene: str, prompt: float, identity: float) -> dict:
    common = {"method": method, "scene": scene, "seed": 0}
    return {"row": "picture", **common, "prompt_similarity": prompt, "identity_similarity": identity}


def test_a_scene_is_the_unit():
    """Two scenes of 3 and 1 images weigh the same; the interval is Student's over the two."""
    rows = [row("bas", "a", value, 0.5) for value in (0.1, 0.2, 0.3)] + [row("bas", "b", 0.6, 0.5)]
    found = summarise(rows)["bas"]["prompt_similarity"]
    assert found.mean == pytest.approx(0.4)
    low, high = stats.t.interval(0.95, 1, loc=0.4, scale=stats.sem([0.2, 0.6]))
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-4), pytest.approx(high, rel=1e-4))
    assert interval([0.3]) == Interval(0.3)


def test_orderings_compare_the_same_scenes():
    """Scenes differ by far more than methods do; the difference, scene by scene, is what counts."""
    rows = [row("bas", str(i), 0.1 * i, 0.1 * i) for i in range(8)]
    rows += [row("db-m", str(i), 0.1 * i - 0.02 - 0.001 * i, 0.1 * i) for i in range(1, 8)]
    prompts = compare(rows, "bas", "db-m", "prompt_similarity")
    assert prompts.mean == pytest.approx(0.024)
    assert verdict(prompts) == "holds"
    assert verdict(Interval(-0.1, -0.2, -0.05)) == "reversed"
    assert verdict(compare(rows, "db-m", "bas", "identity_similarity")) == "not shown"
    assert verdict(Interval(0.1)) == "one scene"
    assert compare(rows, "bas", "ti-m", "identity_similarity") is None
    text = markdown(rows, {"base": "tiny"})
    assert "| DB-m follows prompts worse than the method | prompt similarity: bas − db-m | 0.024 [" in text
    assert "| db-m | DreamBooth on masked concepts, 7 of 8 scenes | " in text  # so the means do not compare
    assert "| bas | Break-A-Scene | " in text


def test_an_option_is_compared_where_both_were_run():
    """The method has two seeds, the option one of them: only that one counts."""
    rows = [row("bas", "a", 0.2, 0.5), row("bas", "a", 0.9, 0.9) | {"seed": 1}, row("bas", "b", 0.4, 0.5)]
    rows += [row("uniform", "a", 0.3, 0.5), row("uniform", "b", 0.7, 0.4)]
    assert summarise(rows)["bas"]["prompt_similarity"].mean == pytest.approx((0.55 + 0.4) / 2)
    low, high = stats.t.interval(0.95, 1, loc=0.2, scale=stats.sem([0.1, 0.3]))
    text = f"| uniform | every subset equally likely | 0.200 [{low:.3f}, {high:.3f}] | -0.050 ["
    assert text in markdown(rows, FACTS)
    assert "option" not in markdown(rows[:3], FACTS)
    assert "right subsets" not in text
    shown = [r | {"right": value} for r, value in zip(rows, (1.0, 1.0, 0.0, 1.0, None), strict=True)]
    assert shown_columns(shown).keys() - shown_columns(rows).keys() == {"right"}
    assert summarise(shown)["bas"]["right"].mean == 0.5
    assert compare(shown, "uniform", "bas", "right") == Interval(0.0)


def test_the_plot_shows_every_method_with_its_interval(done, monkeypatch):
    """More similarity is further right and higher up; matplotlib is asked for the means and reaches by hand."""
    summary = {
        "bas": {"prompt_similarity": Interval(0.3, 0.2, 0.4), "identity_similarity": Interval(0.5, 0.45, 0.55)},
        "no-mask": {"prompt_similarity": Interval(0.5), "identity_similarity": Interval(0.3)},
    }
    axes = importlib.import_module("matplotlib.axes").Axes
    drawn, original = [], axes.errorbar

    def recording(self, *args, **options):
        drawn.append((*args, options["xerr"], options["yerr"], options["fmt"], options["label"]))
        return original(self, *args, **options)

    monkeypatch.setattr(axes, "errorbar", recording)
    image = scatter(summary)
    assert drawn[0] == (0.3, 0.5, pytest.approx(0.1), pytest.approx(0.05), "o", "bas")
    assert drawn[1] == (0.5, 0.3, None, None, "s", "no-mask")
    assert image.size == (960, 540)
    with Image.open(done[0] / "scatter.png") as saved:
        assert saved.size == (960, 540)


def test_matplotlib_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused("pip install matplotlib, or pip install -c constraints.txt -e '.[evaluation]' in bas's folder"):
        scatter({})


def test_the_page_shows_the_images_behind_each_point(done):
    """Self-contained; every method links to images with their prompts, at most eight for a scene."""
    folder, trials = done
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert text.count('<a href="#bas">') == text.count('<a href="#ti-m">') == 1
    assert text.count("<img") == 1 + 2 * (2 + 1 + 6 + 1)
    assert text.count("a photo of &lt;asset1&gt; in the jungle (prompt") == 2 * 2  # caption, and text for the blind
    assert "http" not in text.replace("http-equiv", "")
    images = sum(row["row"] == "picture" for row in rows_of(folder))
    facts = {"trials": "4 of 4", "images": str(images), **FACTS}
    assert page(rows_of(folder), trials, facts, scatter(summarise(rows_of(folder)))) == text


# --- One command --------------------------------------------------------------------------------------------------


def words(bench, explicit: dict, scenes: list[Path], folder: Path, *more: str) -> list[str]:
    """The command line of a small evaluation on the tiny model, settings of training in a file."""
    toml = folder.with_suffix(".toml")
    toml.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in explicit.items()))
    steps = ("--prompts", "1", "--num_inference_steps", "2", "--batch_size", "4")
    return ["evaluate", *map(str, scenes), "--output_dir", str(folder), "--config", str(toml), *steps, *more]


def test_dry_run_writes_nothing(bench, scenes, explicit, tmp_path, capsys, caplog):
    """What the file says of single trials is named, as it is not read."""
    own = {"seed": 7, "method": "db", "checkpointing_steps": 50, "img_log_steps": 50}
    line = words(bench, explicit | own, scenes, tmp_path / "out")
    assert main([*line, "--dry_run", "--methods", "ti", "--seeds", "4", "5"]) == 0
    named = "checkpointing_steps, img_log_steps, method, seed"
    said = f"{tmp_path / 'out.toml'}: each trial has its own {named}, so the file's is not read"
    assert [text for text in caplog.messages if "each trial" in text] == [said]
    output = capsys.readouterr().out
    assert "4 trainings, of which 0 are finished" in output
    assert "8, of which 8 are left" in output
    assert "more than 0:" in output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_needs_no_download_of_a_known_base(scenes, tmp_path, capsys, monkeypatch):
    """Its shapes are known: one concept in two contexts is counted. The evaluation itself needs the weights."""
    monkeypatch.setattr("bas.pretrained.hub.cached", lambda *_: None)
    monkeypatch.setattr(runner, "plan_run", partial(runner.plan_run, count_operations=False))  # a third of the time
    line = [
        "evaluate",
        str(scenes[0]),
        "--weights",
        "sd21-base",
        "--output_dir",
        str(tmp_path / "out"),
        "--prompts",
        "2",
    ]
    line += ["--methods", "bas", "--resolution", "64", "--mixed_precision", "no"]
    assert main([*line, "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "1 trainings, of which 0 are finished" in output
    assert "2, of which 2 are left" in output
    assert main(line) == 2
    assert "`bas download sd21-base` fetches one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_an_evaluation(bench, scenes, explicit, tmp_path):
    """Started by torchrun with the miniature's own metrics: every trial once, one set of results."""
    line = words(bench, explicit, scenes, tmp_path / "out", "--methods", "bas", "ti-m", "--metrics", "miniature")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "bas"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(bas.__file__).parents[1])}
    process = subprocess.run([*launcher, *line], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("seed 0:") == 4
    assert process.stdout.count("index.html") == 1
    assert sum(row["row"] == "cell" for row in rows_of(tmp_path / "out")) == 4


def test_a_folder_of_something_else_is_no_place_for_an_evaluation(tmp_path):
    """Nor is it touched; one that holds a plan is gone on with."""
    (tmp_path / "mine.txt").write_text("mine")
    with refused("is not empty: name a new folder"):
        agree_on(tmp_path, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    agree_on(tmp_path / "new", FACTS)
    agree_on(tmp_path / "new", FACTS)
