"""Strengths of handles: how they are written, and what they do to the prompt's token states."""

import pytest
import torch

from bas.cli.entry import main
from bas.models.text import NAME_RULE, encode_ids, tokenize
from bas.pretrained.folder import save_model
from bas.sampling.prompt_strength import encode_prompts, read_prompt, unread_weights
from bas.sampling.sampler import sample
from bas.training.setup import check_input
from tests.helpers.tiny import refused, taught, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return taught(write_model(tmp_path_factory.mktemp("prompts") / "model"))


@torch.inference_mode()
def encode(models, *prompts):
    return encode_prompts(models.text_encoders, models.tokenizer, list(prompts)).states


def place(models, prompt, handle):
    """Where a handle stands among the prompt's tokens."""
    (ids,) = tokenize(models.tokenizer, [prompt]).tolist()
    return ids.index(models.tokenizer.convert_tokens_to_ids(handle))


@pytest.mark.parametrize(
    ("prompt", "plain", "strengths"),
    [
        ("a photo of <toy>", "a photo of <toy>", {}),
        ("a photo of (<toy>:1.3) and <bowl>", "a photo of <toy> and <bowl>", {"<toy>": 1.3}),
        ("( <toy> : 0 ), (<bowl>:.5)", "<toy>, <bowl>", {"<toy>": 0, "<bowl>": 0.5}),
        ("(<toy>:2) on (<toy>:2.0)", "<toy> on <toy>", {"<toy>": 2}),
        ("a toy (red) at 10:30 (<toy>)", "a toy (red) at 10:30 (<toy>)", {}),
        ("", "", {}),
    ],
)
def test_strengths_are_read_out_of_a_prompt(prompt, plain, strengths):
    assert (read_prompt(prompt).text, read_prompt(prompt).handles) == (plain, strengths)


@pytest.mark.parametrize("text", ["much", "", "-1", "5.1", "inf", "nan", "1,3"])
def test_a_strength_that_is_no_number_from_0_to_5_is_refused(text):
    with refused(f"(<toy>:{text})", "number from 0 to 5"):
        read_prompt(f"a photo of (<toy>:{text})")


def test_one_strength_for_one_handle():
    with refused("<toy> has two strengths, 1.2 and 0.8"):
        read_prompt("(<toy>:1.2) and (<toy>:0.8)")
    for prompt in ("(a red <toy>:1.3)", "(<toy> and <bowl>:1.3)"):
        with refused(prompt, "one handle alone"):
            read_prompt(prompt)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.4) ball", (("a", 1), ("red", 1.4), ("ball", 1))),
        ("(best quality:1.2), a bowl", (("", 1), ("best quality", 1.2), (", a bowl", 1))),
        ("(<toy>:2) and ( a bowl : .5 )", (("<toy> and", 1), ("a bowl", 0.5), ("", 1))),
        ("a photo (at 10:30) in 4:3", (("a photo (at 10:30) in 4:3", 1),)),
    ],
)
def test_phrases_have_strengths_too(prompt, parts):
    assert read_prompt(prompt).parts == parts


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("((red)) and (((blue)))", ["((red))", "(((blue)))"]),
        ("(a (red:1.2) ball)", ["(a (red:1.2) ball)"]),
        ("red++ and blue-- and (a bowl)+ and (a stone)1.3", ["red++", "blue--", "(a bowl)+", "(a stone)1.3"]),
        ("[red] [red:blue:0.5] {red}", ["[red]", "[red:blue:0.5]", "{red}"]),
        ("(red:9) and (red:-1)", ["(red:9)", "(red:-1)"]),
        ("two toys (<toy>)", ["(<toy>)"]),
        ("red+ and (red:1,4) and (red:1.4", ["red+", "(red:1,4)", "(red:1.4"]),
        ("red AND blue, BREAK \\(red\\)", ["AND", "BREAK", "\\(", "\\)"]),
        ('("red", "blue").blend(0.5, 0.5), a cat.swap(dog)', [".blend(0.5, 0.5)", ".swap(dog)"]),
        ("（red：1.4） and （a bowl:.5）", ["（red：1.4）", "（a bowl:.5）"]),
        (
            "__colours/warm__ ball, red::2, blue::-.5 --ar 16:9 --no stone",
            ["__colours/warm__", "::2", "::-.5", "--ar 16:9", "--no"],
        ),
        ("a __ of ::, well--known, C::new, （red）", []),
        ("a C++ book and 1+1, grade A+, (at 10:30", []),
        ("a toy (red) -- at 10:30 by-hand, <toy>-like", []),
    ],
)
def test_weights_of_other_tools_are_named(prompt, pieces):
    assert [piece.strip() for piece in unread_weights(prompt)] == pieces


@pytest.mark.parametrize(
    "piece",
    [
        *("((<toy>))", "<toy>++", "<toy>+", "[<toy>:0.5]", "[<toy>]", "{<toy>}", "(<toy>)1.3", "<toy>:1.4"),
        *("((<toy>:1.3))", "(<toy> and <bowl>)++", "((a <toy>))"),
    ],
)
def test_a_weight_of_another_tool_around_a_handle_is_an_error(piece):
    with refused(piece, "bas reads no"):
        read_prompt(f"a photo of {piece} at the beach")


@pytest.mark.parametrize(
    ("piece", "advice"),
    [
        ("<lora:style:0.8>", "add --lora style.safetensors:0.8"),
        ("<lora:my style>", "add --lora my style.safetensors:1"),
        ("<lyco:a_b-c:1:0.5>", "add --lora a_b-c.safetensors:1"),
        ("<hypernet:old:1>", "bas reads no hypernetworks"),
        ("<LORA:Style:0.8>", "add --lora Style.safetensors:0.8"),
    ],
)
def test_a_file_that_is_named_in_the_prompt_is_given_by_its_flag(piece, advice):
    with refused(f"{piece} is not a word of a prompt: leave it out; {advice}"):
        read_prompt(f"a photo of <toy> {piece}")


@pytest.mark.parametrize(
    "prompt", ["a ball, embedding:bad-v1.5", "(embedding:bad-v1.5:1.2), <toy>", "Embedding:bad-v1.5."]
)
def test_an_embedding_that_is_named_in_the_prompt_is_given_by_its_flag(prompt):
    with refused("bad-v1.5 is not a word of a prompt: add --embedding bad-v1.5.safetensors, and write"):
        read_prompt(prompt)


def test_a_phrase_of_strength_1_changes_nothing_and_of_0_leaves_no_trace(models):
    plain, one, gone, other = encode(models, "a photo of", "a (photo:1) of", "a (photo:0) of", "a (beach:0) of")
    assert torch.equal(plain, one)
    assert torch.equal(gone, other)
    assert (gone[2] == encode(models, "")[0, 2]).all()
    assert not torch.equal(gone[3], plain[3])


def test_strengths_of_phrases_lie_on_a_line_and_belong_to_one_place(models):
    """The same word elsewhere keeps its strength of 1; a handle's strength holds beside it."""
    prompt = "a bowl and a ({}:{}) at (<asset0>:{})"
    none, half, one, more = encode(models, *(prompt.format("bowl", s, 1) for s in (0, 0.5, 1, 1.5)))
    torch.testing.assert_close(half, (none + one) / 2)
    torch.testing.assert_close(more, one + (one - none) / 2)
    assert torch.equal(none[:5], one[:5])
    assert not torch.equal(none[5], one[5])
    both = encode(models, prompt.format("bowl", 0, 0))[0]
    empty = encode(models, "")[0]
    assert torch.equal(both[[5, 7]], empty[[5, 7]])
    assert not torch.equal(both[2], empty[2])


def test_the_command_names_weights_that_stay_text(models, tmp_path, caplog, capsys):
    save_model(models, tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--num_inference_steps", "1", "--output_path", str(tmp_path / "x.png")]
    assert main([*words, "--prompt", "a ((bowl))", "--negative_prompt", "[stone]"]) == 0
    assert [message.split(" stays text")[0] for message in caplog.messages] == ["'((bowl))'", "'[stone]'"]
    caplog.clear()
    words += ["--config", str(tmp_path / "run.toml")]
    (tmp_path / "run.toml").write_text('prompt = ["a bowl++", "a stone"]')
    assert main(words) == 0
    assert [message.split(" stays text")[0] for message in caplog.messages] == ["'bowl++'"]
    assert main([*words, "--prompt", "a <asset0>++"]) == 2
    assert "<asset0>++: bas reads no such weight" in capsys.readouterr().err


def test_strength_1_changes_nothing(models):
    plain, one = encode(models, "a photo of <asset0> at the beach", "a photo of (<asset0>:1) at the beach")
    assert torch.equal(plain, one)


def test_strength_0_leaves_no_trace_of_what_was_learnt(models):
    """Another learnt row must not change a single number, at the handle's place or behind it."""
    rows = models.text_encoder.get_input_embeddings().handles
    before = encode(models, "a photo of (<asset0>:0) at the beach", "a photo of <asset0> at the beach")
    kept = rows.data.clone()
    rows.data[0] += 1.0
    after = encode(models, "a photo of (<asset0>:0) at the beach", "a photo of <asset0> at the beach")
    rows.data.copy_(kept)
    assert torch.equal(before[0], after[0])
    here = place(models, "a photo of <asset0> at the beach", "<asset0>")
    moved = (before[1] - after[1]).abs().amax(dim=-1)
    assert (moved[:here] == 0).all()
    assert (moved[here:] > 0).all()


def test_a_removed_handle_leaves_an_empty_place(models):
    here = place(models, "a photo of <asset0>", "<asset0>")
    removed, plain, empty = encode(models, "a photo of (<asset0>:0)", "a photo of <asset0>", "")
    assert torch.equal(removed[here], empty[here])
    assert torch.equal(removed[:here], plain[:here])
    assert not torch.isclose(removed[here + 1 :], plain[here + 1 :]).all(dim=-1).any()


def test_strengths_lie_on_a_line_through_removed_and_plain(models):
    none, half, one, more = encode(models, *(f"a photo of (<asset0>:{s}) at the beach" for s in (0, 0.5, 1, 1.5)))
    torch.testing.assert_close(half, (none + one) / 2)
    torch.testing.assert_close(more, one + (one - none) / 2)


def test_each_handle_has_its_own_strength(models):
    both = "a photo of {} and {}"
    plain, weak, gone = encode(
        models,
        both.format("<asset0>", "<asset1>"),
        both.format("(<asset0>:0.5)", "<asset1>"),
        both.format("(<asset0>:0)", "(<asset1>:0)"),
    )
    first, second = (place(models, both.format("<asset0>", "<asset1>"), h) for h in ("<asset0>", "<asset1>"))
    empty = encode(models, "")[0]
    torch.testing.assert_close(weak[first], (plain[first] + empty[first]) / 2)
    assert torch.equal(gone[[first, second]], empty[[first, second]])
    assert not torch.equal(weak[second], empty[second])


def test_prompts_in_a_batch_do_not_touch_each_other(models):
    prompts = ["a photo of (<asset0>:1.5)", "a photo of <asset1>", "the (<asset1>:0) bowl"]
    together = encode(models, *prompts)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(together[i], encode(models, prompt)[0])
    plain = encode_ids(models.text_encoders, tokenize(models.tokenizer, [prompts[1]])).states
    torch.testing.assert_close(together[1:2], plain.detach())


def test_an_unknown_handle_is_refused_with_a_strength_too(models):
    with refused("unknown handle <asset7>", "<asset0>, <asset1>"):
        encode(models, "a photo of (<asset7>:1.3)")


def test_sampling_hears_strengths(models):
    fast = {"num_inference_steps": 2}
    plain, one, gone = sample(models, [f"a photo of {h}" for h in ("<asset0>", "(<asset0>:1)", "(<asset0>:0)")], **fast)
    assert plain == one
    assert plain != gone


def test_a_prompt_or_a_handle_is_no_path(bench, tmp_path, monkeypatch, capsys):
    """Files bear numbers, or the name that was given for them."""
    model, here = tmp_path / "model", tmp_path / "a" / "here"
    save_model(taught(bench.model), model)
    before = set(tmp_path.rglob("*"))
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    fast = ["--num_inference_steps", "1"]
    prompt = "../../photo/../<asset0> /etc/x.png"
    assert main(["sample", str(model), "--prompt", prompt, "../b", "--output_path", "out.png", *fast]) == 0
    assert main(["attend", str(model), "--prompt", prompt, "--words", "--output_dir", "maps", *fast]) == 0
    places = {path.relative_to(tmp_path).parent.as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert places == {".", "a", "a/here", "a/here/maps"}
    assert {path.name for path in here.iterdir()} == {"out-0.png", "out-1.png", "maps"}
    names = {path.name for path in (here / "maps").iterdir()}
    assert names >= {"map0.npy", "map0.png", "maps.json", "picture.png", "sheet.png"}
    assert all(name.isascii() and name.replace(".", "").isalnum() for name in names)
    capsys.readouterr()
    assert main(["train", str(bench.scene), "--weights", str(bench.model), "--handles", "<..>", "<b>", "<c>"]) == 2
    assert capsys.readouterr().err == f"bas: handle '<..>': expected <name> with {NAME_RULE}\n"


def test_class_prompts_are_read_before_weights(bench, tmp_path, caplog):
    """Training warns of a weight that it would read as brackets."""
    check_input(bench.config(tmp_path / "run", class_prompt=("a [photo] at the beach", "a stone")))
    assert [message.split(" stays text")[0] for message in caplog.messages] == ["'[photo]'"]


def test_a_time_of_day_beside_a_handle_is_text(models):
    prompt = "a photo (of <asset0>, at 10:30)"
    assert read_prompt(prompt).text == prompt


def test_what_is_cut_off_a_weighted_prompt_is_told_once(models, caplog):
    long = " ".join(["bowl"] * 100)
    encode_prompts(models.text_encoders, models.tokenizer, [f"{long} (a:1.4) bowl (the:1.2) a"])
    assert len(caplog.messages) == 1
