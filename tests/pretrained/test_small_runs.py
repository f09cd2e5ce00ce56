"""The files of a small run belong together, are whole, and hold what they say; else one line names the file."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bas.cli.entry import main
from bas.io.run_files import CONCEPTS, TUNED
from bas.models.bundle import is_adapter
from bas.pretrained.folder import load
from tests.helpers.small_runs import LORA, write_base, write_small_run
from tests.helpers.tiny import refused


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and a finished run of each kind on it, each with two handles."""
    place = tmp_path_factory.mktemp("small runs")
    base = write_base(place / "base", "sd1")
    write_small_run(place / "lora", base, **LORA)
    write_small_run(place / "kv", base, train="kv")
    write_small_run(place / "token", base, train="token", rank=4)
    return place


def changed(run, target, name: str, change=lambda tensors: None, **texts):
    """A copy of a run, one of whose files has other tensors or other texts, None for none."""
    run = shutil.copytree(run, target)
    tensors = load_file(run / name)
    with safe_open(run / name, "pt") as file:
        metadata = {key: text for key, text in (file.metadata() | texts).items() if text is not None}
    change(tensors)
    save_file(tensors, run / name, metadata)
    return run


def adapter(tensors: dict) -> str:
    """The name of an adapter's first matrix in the UNet."""
    return next(name for name in tensors if is_adapter(name) and name.startswith("unet."))


# --- tuned.safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(place, tmp_path, dtype):
    """Whole numbers, truth values and 8 bits without a scale."""
    run = changed(place / "lora", tmp_path / "run", TUNED, lambda t: t.update({adapter(t): t[adapter(t)].to(dtype)}))
    with refused(str(run / TUNED), "not fp16, bf16 or fp32", "copy the run again"):
        load(run)


@pytest.mark.parametrize("kind", ["lora", "kv", "token"])
@pytest.mark.parametrize("part", ["down_blocks", ""])
def test_a_file_that_lacks_tensors_is_refused(place, tmp_path, kind, part):
    """What another program left out, or all of it. The line names both numbers."""

    def leave_out(tensors: dict) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    whole = len(load_file(place / kind / TUNED))
    run = changed(place / kind, tmp_path / "run", TUNED, leave_out)
    with refused(str(run / TUNED), f"holds {len(load_file(run / TUNED))} of the {whole} tensors"):
        load(run)


def test_a_file_of_an_earlier_version_is_read(place, tmp_path):
    """It does not say how many tensors it was written with: the same weights."""
    run = changed(place / "lora", tmp_path / "run", TUNED, tensors=None)
    before, after = load(place / "lora").unet.state_dict(), load(run).unet.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("lora", {"scale": "nan"}),
        ("lora", {"scale": "-inf"}),
        ("lora", {"scale": "1e400"}),
        ("lora", {"tensors": "many"}),
        ("token", {"token_ranks": "[-1, 9]"}),
        ("token", {"token_ranks": "[[4], [4]]"}),
        ("token", {"token_ranks": "[" * 100_000}),
    ],
)
def test_texts_that_bas_does_not_write_are_refused(place, tmp_path, kind, texts):
    with refused("was not written by bas, or by a later version: copy the run again"):
        load(changed(place / kind, tmp_path / "run", TUNED, **texts))


@pytest.mark.parametrize(
    ("kind", "other", "part"),
    [
        ("lora", "kv", "holds whole weights, but the run was trained with --train lora"),
        ("kv", "lora", "holds adapters, but the run was trained with --train kv"),
        ("token", "lora", "adapters for 0 handles' own tokens, but the run was trained with --train token and has 2"),
        ("lora", "token", "adapters for 2 handles' own tokens, but the run was trained with --train lora"),
    ],
)
def test_the_file_of_a_run_of_another_kind_is_refused(place, tmp_path, kind, other, part, capsys):
    """By sampling, exporting and merging; it would change other words than it was trained for."""
    run = shutil.copytree(place / kind, tmp_path / "run")
    shutil.copy(place / other / TUNED, run / TUNED)
    with refused(str(run / TUNED), part):
        load(run)
    assert main(["merge", str(run), str(place / kind), "--output_dir", str(tmp_path / "both")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "both").exists()
    if kind != "token":
        assert main(["export", str(run), str(tmp_path / "a.safetensors")]) == 2
        assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("ranks", ["[8]", "[4, 2, 2]", None])
def test_ranks_that_are_not_one_for_each_handle_are_refused(place, tmp_path, ranks):
    """Without the ranks the adapters would act at every token."""
    with refused("handles' own tokens, but the run was trained with --train token and has 2 handles"):
        load(changed(place / "token", tmp_path / "run", TUNED, token_ranks=ranks))


def test_info_names_a_matrix_without_sides(place, tmp_path, capsys):
    """`loads` is no, and the problem names the tensor."""
    run = changed(place / "lora", tmp_path / "run", TUNED, lambda t: t.update({adapter(t): torch.tensor(1.0)}))
    assert main(["info", str(run), "--json"]) == 0
    details = json.loads(capsys.readouterr().out)
    assert details["loads"] is False
    assert "no fitting lora_B" in details["problem"]
    assert details["ranks"] == [3, 4]


def test_the_inputs_of_a_matrix_in_another_order_are_refused(place, tmp_path):
    """64 inputs as 16 x 2 x 2: as many numbers, but no change of a linear layer."""

    def fold(tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith("attn2.to_k.lora_A.weight"))
        tensors[name] = tensors[name].view(-1, 16, 2, 2)

    with refused("no fitting lora_B"):
        load(changed(place / "lora", tmp_path / "run", TUNED, fold))


# --- concepts.safetensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.update(handles=t["handles"].int()), "the rows of its handles is int32, not fp16"),
        (lambda t: t.update(masks=torch.full((2, 8, 8), torch.nan)), "does not hold a mask of 8 bits for each"),
        (lambda t: t.update(masks=t["masks"][:1]), "does not hold a mask of 8 bits for each"),
        (lambda t: t.update(masks=t["masks"][:, :0]), "does not hold a mask of 8 bits for each"),
    ],
)
def test_concepts_of_another_kind_are_refused(place, tmp_path, change, part):
    run = changed(place / "lora", tmp_path / "run", CONCEPTS, change)
    with refused(str(run / CONCEPTS), part, "copy the run again"):
        load(run)


def test_a_handle_that_stands_twice_is_refused(place, tmp_path):
    """Its second row would never be used."""
    run = changed(place / "lora", tmp_path / "run", CONCEPTS, handles='["<asset0>", "<asset0>"]')
    with refused(str(run / CONCEPTS), "handles holds <asset0> twice"):
        load(run)
