"""Merged runs: sums are exact, the closed form is the optimum, and each handle stays what it was."""

import html
import json
import shutil

import pytest
import torch
from PIL import Image

from bas.cli.entry import main
from bas.cli.inspection import describe
from bas.io.run_files import SETTINGS, read_concepts, read_settings, save_concepts, scene_mask
from bas.models.adapters import Change, Difference
from bas.pretrained.additions import Additions
from bas.pretrained.exports import about, adapters_of
from bas.pretrained.folder import load
from bas.pretrained.hashes import base_hash
from bas.pretrained.hub import trained_grid
from bas.pretrained.lora_files import as_lora
from bas.pretrained.merging import attention_outputs, closed_form, concept_states, joined
from bas.sampling.prompt_strength import encode_prompts
from tests.helpers.small_runs import LORA, write_base, write_small_run
from tests.helpers.tiny import refused

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two LoRA runs of other ranks and seeds whose handles have the same names, and runs of keys and values."""
    place = tmp_path_factory.mktemp("merging")
    base = write_base(place / "base", "sd1")
    write_small_run(place / "toys", base, **LORA)
    write_small_run(place / "mugs", base, ("<asset0>",), train="lora", rank=2, seed=3)
    write_small_run(place / "kv", base, ("<ball>",), train="kv", seed=4)
    write_small_run(place / "v", base, ("<hat>",), train="v", seed=5)
    return place


def merge(place, *words: str) -> int:
    """`bas merge`, with runs by their names in the folder."""
    return main(["merge", *(str(place / word) if (place / word).is_dir() else word for word in words)])


def weights(models) -> dict[str, torch.Tensor]:
    """All weights but the token embedding."""
    named = [*models.unet.named_parameters(), *models.text_encoder.named_parameters()]
    return {name: p.detach() for name, p in named if "token_embedding" not in name}


@torch.no_grad()
def prediction(models, prompt: str) -> torch.Tensor:
    """What a model predicts for a prompt."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return models.unet(z, 500, encode_prompts(models.text_encoders, models.tokenizer, [prompt]).states).sample


# --- LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [pytest.param((1.0, 1.0), marks=pytest.mark.slow), (0.7, -0.5), (0.0, 2.0)])
def test_joined_runs_change_each_weight_by_the_sum(place, tmp_path, factors):
    """Weights of the merged run equal the base's plus the weighted changes, to 5e-6; negative factors and 0 too."""
    assert merge(place, "toys", "mugs", "--weights", *map(str, factors), "--output_dir", str(tmp_path / "both")) == 0
    base, toys, mugs, both = (
        weights(load(folder)) for folder in (place / "base", place / "toys", place / "mugs", tmp_path / "both")
    )
    for name, weight in base.items():
        expected = weight + factors[0] * (toys[name] - weight) + factors[1] * (mugs[name] - weight)
        assert (both[name] - expected).abs().max() < 5e-6, name


def test_a_joined_adapter_has_the_sum_of_the_ranks_and_a_convolution_its_kernel():
    """Of three runs, one of weight 0: A of (6, 3, 3, 3), B of (7, 6, 1, 1).

    Its singular values give it back at full rank and the nearest below.
    """
    generator = torch.Generator().manual_seed(0)
    changes = [
        (Change(torch.randn(r, 3, 3, 3, generator=generator), torch.randn(7, r, 1, 1, generator=generator), s), w)
        for r, s, w in ((2, 0.5, 1.0), (3, 2.0, -0.4), (1, 1.0, 0.0))
    ]
    total = sum(w * change.delta() for change, w in changes)
    both = joined(changes)
    assert (both.down.shape, both.up.shape) == ((6, 3, 3, 3), (7, 6, 1, 1))
    assert (both.delta() - total).abs().max() < 5e-6
    assert (as_lora(both, 5).delta() - total).abs().max() < 5e-6
    values = torch.linalg.svdvals(total.flatten(1))
    for change in (both, Difference(total)):
        nearest = as_lora(change, 2)
        assert (nearest.down.shape, nearest.up.shape) == ((2, 3, 3, 3), (7, 2, 1, 1))
        assert abs(float((nearest.delta() - total).norm() - values[2:].norm())) < 1e-5  # Eckart and Young


def test_a_prompt_gives_what_its_own_run_gives(place, tmp_path, caplog):
    """Two runs with <asset0> become two handles; with the other run off, each predicts as in its own run, to 5e-6."""
    for factors, run, old, new in (
        (("1", "0"), "toys", "a photo of <asset0> and <asset1>", "a photo of <toys-asset0> and <asset1>"),
        (("0", "1"), "mugs", "a photo of <asset0>", "a photo of <mugs-asset0>"),
    ):
        target = tmp_path / run
        assert merge(place, "toys", "mugs", "--weights", *factors, "--output_dir", str(target)) == 0
        off = {"toys": "mugs", "mugs": "toys"}[run]
        line = f"{place / off} has --weights 0: only the embeddings of its handles are merged"
        assert [text for text in caplog.messages if "--weights" in text] == [line]
        caplog.clear()
        models = load(target)
        assert models.handles == ("<toys-asset0>", "<asset1>", "<mugs-asset0>")
        assert (prediction(models, new) - prediction(load(place / run), old)).abs().max() < 5e-6


def test_a_rank_gives_the_nearest_adapters(place, tmp_path):
    """Each adapter has the rank that is asked for, and differs from the exact sum by the singular values beyond it."""
    for name, flags in (("exact", ()), ("small", ("--rank", "2"))):
        assert merge(place, "toys", "mugs", *flags, "--output_dir", str(tmp_path / name)) == 0
    exact, small = (adapters_of(tmp_path / name)[0]["unet"][LAYER] for name in ("exact", "small"))
    assert (len(exact.down), len(small.down)) == (6, 2)
    left_out = torch.linalg.svdvals(exact.delta())[2:].norm()
    assert abs(float((exact.delta() - small.delta()).norm() - left_out)) < 1e-5
    assert read_settings(tmp_path / "small")["config"]["rank"] == 2


# --- Keys and values ----------------------------------------------------------------------------------------------


def test_the_closed_form_is_the_optimum_on_its_constraints():
    """T W^T = V to 1e-9 relative; equal to the solution of the KKT system with the same ridge, to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    o, d, n, s, ridge = 12, 16, 300, 5, 1e-6
    w0, r, t, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((o, d), (n, d), (s, d), (s, o))
    )
    r[:, 8:] *= 1e-5  # text features span few directions
    w = closed_form(w0, r, t, v, ridge)
    assert (t @ w.T - v).norm() <= 1e-9 * v.norm()
    gram = r.T @ r
    gram += ridge * gram.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    system = torch.cat([torch.cat([2 * gram, t.T], 1), torch.cat([t, torch.zeros(s, s, dtype=torch.float64)], 1)])
    solution = torch.linalg.solve(system, torch.cat([2 * gram @ w0.T, v]))[:d].T
    assert (w - solution).norm() <= 1e-6 * solution.norm()


def test_keys_and_values_of_each_runs_prompts_stay(place, tmp_path):
    """K and V of both runs' prompts are those of their own weights, to 5e-6, where the runs differ by far more."""
    assert merge(place, "kv", "v", "--output_dir", str(tmp_path / "both")) == 0
    merged = load(tmp_path / "both")
    assert merged.handles == ("<ball>", "<hat>")
    for run, handle in (("kv", "<ball>"), ("v", "<hat>")):
        own = load(place / run)
        states = concept_states(own, (handle,)).float()
        assert (states - concept_states(merged, (handle,))).abs().max() < 1e-6
        for name in (LAYER, LAYER.replace("to_v", "to_k")):
            before, after = (states @ models.unet.get_submodule(name).weight.T for models in (own, merged))
            assert (after - before).abs().max() < 5e-6
    other = [(load(place / run).unet.get_submodule(LAYER).weight @ states.T) for run in ("kv", "v")]
    assert (other[0] - other[1]).abs().max() > 1e-2


def test_runs_of_the_same_handles_have_no_closed_form(place, tmp_path, capsys):
    """Two runs whose handles have the same rows and other values: no weight gives both."""
    again = write_small_run(tmp_path / "again", place / "base", ("<ball>",), train="v", seed=4)
    rows, (tensors, metadata) = read_concepts(place / "kv")[0]["handles"], read_concepts(again)
    save_concepts(again, [rows], tensors["masks"] / 255, metadata.pop("handles"), metadata)
    assert merge(place, "kv", str(again), "--output_dir", str(tmp_path / "both")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "too alike, or too many" in line
    assert not (tmp_path / "both").exists()


def test_other_kinds_merge_into_adapters(place, tmp_path, capsys):
    """LoRA and K/V together need a rank; at full rank the weights are the sum."""
    assert merge(place, "toys", "kv", "--output_dir", str(tmp_path / "both")) == 2
    assert "give a --rank" in capsys.readouterr().err
    assert merge(place, "toys", "kv", "--rank", "64", "--output_dir", str(tmp_path / "both")) == 0
    base, toys, kv, both = (
        load(folder).unet.get_submodule(LAYER).weight
        for folder in (place / "base", place / "toys", place / "kv", tmp_path / "both")
    )
    assert (both - (toys + kv - base)).abs().max() < 5e-6


# --- Single tokens ------------------------------------------------------------------------------------------------


def test_adapters_of_single_tokens_stand_side_by_side(place, tmp_path, capsys):
    """Each prompt gives what its own run gives, to 5e-6, with a strength too; one without handles what the base gives,
    bit for bit. Such a run is no LoRA file and no whole model."""
    base, runs = place / "base", (place / "one", place / "two")
    write_small_run(runs[0], base, train="token", rank=3)
    write_small_run(runs[1], base, ("<asset0>",), train="token", rank=2, alpha=1.0, seed=6)
    assert merge(place, "one", "two", "--output_dir", str(tmp_path / "both")) == 0
    both, plain = load(tmp_path / "both"), "a photo of a creature at the beach"
    assert torch.equal(prediction(both, plain), prediction(load(base), plain))
    for run, old, new in (
        (runs[0], "a photo of <asset0> and <asset1>", "a photo of <one-asset0> and <asset1>"),
        (runs[1], "a photo of (<asset0>:0.7)", "a photo of (<two-asset0>:0.7)"),
    ):
        own = prediction(load(run), old)
        assert (prediction(both, new) - own).abs().max() < 5e-6
        assert (prediction(load(base), plain) - own).abs().max() > 1e-2
    capsys.readouterr()
    for words, part in (
        (["export", str(runs[0]), str(tmp_path / "a.safetensors")], "other programs have no adapters of single"),
        (["merge", str(runs[0]), "--into_base", "--output_dir", str(tmp_path / "a")], "no place in a whole model"),
        (
            ["merge", str(runs[0]), str(place / "toys"), "--output_dir", str(tmp_path / "a")],
            "merge only with each other",
        ),
        (["merge", *map(str, runs), "--rank", "2", "--output_dir", str(tmp_path / "a")], "without --rank"),
    ):
        assert main(words) == 2
        assert part in capsys.readouterr().err


# --- Names, records, refusals -------------------------------------------------------------------------------------


def test_a_merged_run_says_what_it_is(place, tmp_path, capsys):
    """Names, drift and sources are recorded and printed; the drift is the change of the attention's own output."""
    words = ["toys", "mugs", "--rename", "toys:<asset1>=<cat>", "--output_dir", str(tmp_path / "both")]
    assert merge(place, *words) == 0
    out = capsys.readouterr().out
    _, metadata = read_concepts(tmp_path / "both")
    assert metadata["handles"] == ["<toys-asset0>", "<cat>", "<mugs-asset0>"]
    assert metadata["merged"]["runs"] == [str(place / "toys"), str(place / "mugs")]
    assert metadata["merged"]["weights"] == [1.0, 1.0]
    own, after = load(place / "mugs"), load(tmp_path / "both")
    outputs = (attention_outputs(models, name, 16) for models, name in ((own, "<asset0>"), (after, "<mugs-asset0>")))
    pairs = zip(*outputs, strict=True)
    drift = [float((b - a).norm() / a.norm()) for a, b in pairs]
    assert len(drift) == 7
    assert metadata["merged"]["drift"]["<mugs-asset0>"] == pytest.approx(sum(drift) / 7, rel=1e-4)
    assert f"<mugs-asset0>, in {place / 'mugs'} <asset0>: its attention's output moved by" in out
    assert main(["info", str(tmp_path / "both"), "--json"]) == 0
    details = json.loads(capsys.readouterr().out)
    assert details["merged from"] == metadata["merged"]["runs"]
    assert (details["merged with weights"], details["steps"]) == ([1.0, 1.0], None)
    assert main(["report", str(tmp_path / "both")]) == 0
    page = html.unescape((tmp_path / "both" / "report.html").read_text())
    assert "its attention's output moved by" in page
    assert "Merged run:" in page
    assert not any(word in page for word in ("0 of 0", "phase 2 trains", "Fewer than two", "no previews", "{'"))
    settings = read_settings(tmp_path / "both")
    for merged in (
        {},
        {"runs": "toys", "weights": [1], "drift": {}},
        {"runs": [], "weights": ["a"], "drift": {}},
        {"runs": ["toys", "mugs"], "weights": [1], "drift": {}},
    ):
        (tmp_path / "both" / SETTINGS).write_text(json.dumps(settings | {"merged": merged}))
        with refused("settings.json is not as bas wrote it"):
            read_settings(tmp_path / "both")
    (tmp_path / "both" / SETTINGS).write_text(json.dumps(settings))
    assert main(["export", str(tmp_path / "both"), str(tmp_path / "both.safetensors")]) == 0
    texts = describe(tmp_path / "both.safetensors")["metadata"]
    assert [*texts] == sorted(texts)
    assert "ss_steps" not in texts
    words = dict.fromkeys(("toys-asset0", "cat", "mugs-asset0"), 1)
    assert json.loads(texts["ss_tag_frequency"]) == {"scene": words}


def test_the_images_of_merged_scenes_keep_their_order(place, tmp_path):
    """The first run's own image stays the scene's. Further ones are numbered: by number, then close-ups, run by run."""
    folders = {"toys": ("", "1", "2", "10", "close-up-0"), "mugs": ("", *map(str, range(1, 11)))}
    for run, names in folders.items():
        shutil.copytree(place / run, tmp_path / run)
        for level, name in enumerate(names):
            folder = tmp_path / run / "scene" / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), 100 * (run == "mugs") + level).save(folder / "img.png")
            shutil.copy(folder / "img.png", folder / "mask0.png")
    runs, both = [str(tmp_path / run) for run in folders], tmp_path / "both"
    assert main(["merge", *runs, "--output_dir", str(both)]) == 0
    levels = [0, 1, 2, 3, 4, *range(100, 111)]
    for number, level in enumerate(levels):
        folder = both / "scene" / (str(number) if number else "")
        mask = folder / f"mask{0 if level < 100 else 2}.png"
        assert [Image.open(path).getpixel((0, 0)) for path in (folder / "img.png", mask)] == [level, level]
    assert scene_mask(both / "scene", 2).parent.name == "5"
    assert len(list((both / "scene").rglob("*.png"))) == 2 * len(levels)


def test_runs_of_other_sizes_are_merged_and_told(place, tmp_path, caplog):
    """The drift is measured at one size; the merged run has the first run's resolution and grid, and says so."""
    other = write_small_run(tmp_path / "wide", place / "base", ("<hat>",), **LORA | {"resolution": 64})
    assert main(["merge", str(place / "toys"), str(other), "--output_dir", str(tmp_path / "both")]) == 0
    assert caplog.messages == ["the runs have another --resolution each, [None, 64]: the merged run takes the first"]
    assert read_settings(tmp_path / "both")["config"]["resolution"] is None


def test_what_lies_in_a_run_alone_comes_along(place, tmp_path):
    """A LoRA that the base was changed by, and that is no longer where it was: the merged run opens with it."""
    style = tmp_path / "style.safetensors"
    assert main(["export", str(place / "toys"), str(style), "--prefix", "style-"]) == 0
    own = {"lora": (str(style),)} | LORA
    runs = [write_small_run(tmp_path / name, place / "base", (f"<{name}>",), **own) for name in ("one", "two")]
    for run in runs:
        settings = read_settings(run)
        base = base_hash(place / "base", Additions.of_base(settings["config"]))
        (run / SETTINGS).write_text(json.dumps(settings | {"base": base}))
        concepts, metadata = read_concepts(run)
        rows = [concepts["handles"]]
        save_concepts(run, rows, concepts["masks"], metadata["handles"], metadata | {"base": base})
        shutil.copy(style, run)
    style.unlink()
    assert main(["merge", *map(str, runs), "--output_dir", str(tmp_path / "both")]) == 0
    assert load(tmp_path / "both").handles == ("<one>", "<two>")


def test_a_whole_model_keeps_the_grid_of_its_run(place, tmp_path):
    """Layouts read attention on it."""
    run = write_small_run(tmp_path / "run", place / "base", ("<hat>",), **LORA | {"attention_grid": 8})
    assert main(["merge", str(run), "--into_base", "--output_dir", str(tmp_path / "whole")]) == 0
    assert trained_grid(tmp_path / "whole") == trained_grid(run) == 8


def test_a_merged_run_names_each_of_its_scenes():
    scenes = {"config": {"instance_data_dir": "scenes/toys + scenes/mugs"}}
    assert about(scenes | {"merged": {}}) == "concepts of toys and mugs, learnt by bas"
    assert about(scenes) == "concepts of mugs, learnt by bas"  # one scene whose path has a plus


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["toys"], "name two runs or more"),
        (["toys", "base"], "is not a small run"),
        (["toys", "mugs", "--weights", "1"], "1 --weights for 2 runs"),
        (["toys", "mugs", "--weights", "1", "nan"], "--weights"),
        (["toys", "mugs", "--rank", "0"], "--rank is 0"),
        (["toys", "mugs", "--rename", "toys:<asset9>=<cat>"], "a handle of it"),
        (["toys", "mugs", "--rename", "toys:<asset0>=<my cat>"], "expected <name>"),
        (["toys", "kv", "--rename", "toys:<asset0>=<ball>", "kv:<ball>=<ball>"], "several runs have the handle <ball>"),
        (["toys", "--into_base", "--rank", "2"], "leave out --rank"),
        (["toys", "mugs", "toys"], "toys is named twice: name each run once"),
        (
            ["toys", "mugs", "--rename", "toys:<asset0>=<cat>", "toys:<asset0>=<dog>"],
            "<asset0> of toys is renamed twice",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(place, tmp_path, words, part, capsys):
    """One line, exit code 2, nothing written."""
    assert merge(place, *words, "--output_dir", str(tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["", "/", "/."])
def test_a_run_may_be_named_as_a_shell_completes_it(place, end):
    """With a slash at its end, as a path or by its own name."""
    from bas.pretrained.merging import read_sources

    for name in (f"{place / 'toys'}{end}", f"toys{end}"):
        first, _ = read_sources([place / "toys", place / "mugs"], [1.0, 1.0], [f"{name}:<asset0>=<cat>"])
        assert first.handles == ("<cat>", "<asset1>")


def test_names_of_long_folders_are_cut_and_stay_apart(place, tmp_path):
    """A handle has 32 characters: folders that begin alike are told apart by the number of their run."""
    from bas.pretrained.merging import prefixed, read_sources

    runs = [tmp_path / f"a_photograph_of_{'x' * 7}_{end}" for end in "abc"]
    for run in runs:
        shutil.copytree(place / "mugs", run)
    fits = shutil.copytree(place / "mugs", tmp_path / ("y" * 25))
    handles = [source.handles for source in read_sources([*runs, fits], [1.0] * 4, [])]
    assert handles == [*((f"<a_photograph_of_xxxxxxx_{end}-asset0>",) for end in "abc"), (f"<{fits.name}-asset0>",)]
    longer = [run.rename(tmp_path / f"a_long_{run.name}") for run in runs]
    first, second, third, _ = (source.handles for source in read_sources([*longer, fits], [1.0] * 4, []))
    assert first == ("<a_long_a_photograph_of_x1-asset0>",)
    assert (second, third) == (("<a_long_a_photograph_of_x2-asset0>",), ("<a_long_a_photograph_of_x3-asset0>",))
    assert len(first[0]) == 34
    assert prefixed(f"<{'n' * 30}>", tmp_path / "z", 10) == f"<z-{'n' * 30}>"
    assert prefixed(f"<{'n' * 30}>", longer[0], 2) == f"<2-{'n' * 30}>"
    with refused("several runs have the handle <n", f"--rename {longer[0].name}:<{'n' * 31}>=<new>"):
        prefixed(f"<{'n' * 31}>", longer[0], 2)


def test_runs_on_other_bases_are_refused(place, tmp_path):
    from bas.pretrained.merging import read_sources

    base = write_base(tmp_path / "base", "sd2")
    other = write_small_run(tmp_path / "other", base, train="v")
    with refused("another base"):
        read_sources([place / "toys", other], [1.0, 1.0], ())
