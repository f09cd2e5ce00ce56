"""The text tower against transformers, handles as trainable rows, and the tokenizer."""

import pytest
import torch

from bas.errors import InputError
from bas.models.text import (
    HandleEmbedding,
    add_handles,
    build_text_encoder,
    encode_ids,
    initial_row,
    known_handles,
    load_tokenizer,
    merged_state_dict,
    tokenize,
)
from bas.sampling.prompt_strength import encode_prompts
from tests.helpers.compare import assert_equals_live, assert_equals_stored, cases
from tools.reference.cases import REFERENCE
from tools.reference.measure import fill, uniform
from tools.reference.models import TEXT_COMMON

towers = cases("text")
TOKENIZER = REFERENCE / "official" / "model" / "tokenizer"
HANDLES = ("<toy>", "<bowl-2>")


@towers
def test_tower_equals_stored_reference(name):
    """Token states after the final norm, gradients of every parameter; both activations of SD 1 and 2."""
    assert_equals_stored(name)


@towers
def test_tower_equals_transformers(name):
    """Against a CLIPTextModel configured in the ordinary way."""
    assert_equals_live(name)


@pytest.fixture
def tokenizer():
    """The official trace's small tokenizer: 542 tokens."""
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def tower():
    """A text tower for that tokenizer."""
    config = {"vocab_size": 542, "bos_token_id": 540, "eos_token_id": 541, "hidden_act": "gelu"}
    return fill(build_text_encoder(TEXT_COMMON | {"num_hidden_layers": 2, "num_attention_heads": 2} | config))


# --- Handles ------------------------------------------------------------------------------------------------------


def test_handle_rows_are_looked_up_like_any_other():
    """Ids 0..4 are the vocabulary's rows, 5 and 6 the handles'; gradients go to the parameter each row lives in."""
    embedding = HandleEmbedding(uniform("weight", 5, 3), uniform("handles", 2, 3))
    ids = torch.tensor([[0, 5, 4], [6, 6, 1]])
    whole = torch.cat([embedding.weight, embedding.handles])
    assert torch.equal(embedding(ids), whole[ids])
    embedding(ids).sum().backward()
    assert embedding.handles.grad.tolist() == [[1.0] * 3, [2.0] * 3]
    assert embedding.weight.grad[:, 0].tolist() == [1, 1, 0, 0, 1]


def test_tower_with_handles_equals_one_with_a_longer_embedding(tower, tokenizer):
    """transformers with 544 ordinary rows gives the same states: what a saved run is to any other reader."""
    ids = torch.tensor([[540, 320, 542, 518, 543, 541] + [0] * 71])
    add_handles(tower, tokenizer, HANDLES, ("bowl", None), seed=1)
    with torch.no_grad():
        ours = encode_ids(tower, ids)
        other = build_text_encoder(
            TEXT_COMMON | {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 544, "hidden_act": "gelu"}
        )
        other.load_state_dict(merged_state_dict(tower), strict=True)
        assert torch.equal(ours, other(input_ids=ids).last_hidden_state)


def test_handles_start_from_their_word(tower, tokenizer):
    """One piece: its row. Several pieces: their mean. No word: a draw with the real rows' mean and deviation."""
    weight = tower.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(initial_row(weight, tokenizer, "bowl", generator), weight[535])
    pieces = tokenizer("asset", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    assert torch.equal(initial_row(weight, tokenizer, "asset", generator), weight[pieces].mean(0))
    draws = torch.stack([initial_row(weight, tokenizer, None, generator) for _ in range(2000)])
    torch.testing.assert_close(draws.mean(0), weight.mean(0), atol=0.1 * weight.std().item(), rtol=0)
    torch.testing.assert_close(draws.std(0), weight.std(0), atol=0.1 * weight.std().item(), rtol=0)


def test_adding_handles_leaves_the_vocabulary_alone(tower, tokenizer):
    before = tower.get_input_embeddings().weight.detach().clone()
    plain = tokenize(tokenizer, ["a photo of the bowl"])
    embedding = add_handles(tower, tokenizer, HANDLES, ("bowl", "stone"), seed=0)
    assert torch.equal(embedding.weight, before)
    assert embedding.handles.shape == (2, 32)
    assert tower.get_input_embeddings() is embedding
    assert known_handles(tokenizer) == HANDLES
    assert torch.equal(tokenize(tokenizer, ["a photo of the bowl"]), plain)
    assert tokenize(tokenizer, ["<bowl-2>and<toy>"])[0, :5].tolist() == [540, 543, 518, 542, 541]


def test_handles_keep_their_case(tower, tokenizer):
    """Prompts are lower-cased, handles are found before that: <Toy> and <toy> are two concepts."""
    add_handles(tower, tokenizer, ("<Toy>", "<toy>"), (None, None), seed=0)
    assert tokenize(tokenizer, ["A <toy> AND <Toy>"])[0, :6].tolist() == [540, 320, 543, 518, 542, 541]


@pytest.mark.parametrize(
    ("handles", "message"),
    [
        (("toy",), "expected <name>"),
        (("<a b>",), "expected <name>"),
        (("<" + "x" * 33 + ">",), "expected <name>"),
        (("<|endoftext|>",), "expected <name>"),
        (("<..>",), "expected <name>"),
        (("<a/b>",), "expected <name>"),
        (("<>",), "expected <name>"),
        (("<toy>\n",), "expected <name>"),
        (("<tóy>",), "expected <name>"),
    ],
)
def test_malformed_handles_are_refused(tower, tokenizer, handles, message):
    with pytest.raises(InputError, match=message):
        add_handles(tower, tokenizer, handles, (None,) * len(handles), seed=0)


def test_a_handle_cannot_take_a_token_of_the_vocabulary(tower, tokenizer):
    tokenizer.add_tokens("<stone>")
    with pytest.raises(InputError, match=r"^handle <stone> is already a token of this model: choose another name$"):
        add_handles(tower, tokenizer, ("<stone>",), (None,), seed=0)


def test_a_handle_cannot_be_added_twice(tower, tokenizer):
    add_handles(tower, tokenizer, ("<toy>",), (None,), seed=0)
    with pytest.raises(InputError, match="already"):
        add_handles(tower, tokenizer, ("<toy>",), (None,), seed=0)


# --- Prompts ------------------------------------------------------------------------------------------------------


def test_an_unknown_handle_names_the_known_ones(tower, tokenizer):
    add_handles(tower, tokenizer, HANDLES, (None, None), seed=0)
    with pytest.raises(InputError, match=r"unknown handle <nobody>.*<toy>, <bowl-2>"):
        tokenize(tokenizer, ["a photo of <nobody>"])


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a photo of <Toy>", "<Toy>"),
        ("a photo of <toyy>", "<toyy>"),
        ("a photo of <to y>", "<to y>"),
        ("a photo of < toy >", "< toy >"),
        ("a photo of <tóy>", "<tóy>"),
        ("a photo of <>", "<>"),
        ("a photo of <../toy>", "<../toy>"),
        ("a photo of <" + "x" * 33 + ">", "<" + "x" * 33 + ">"),
        ("a photo of <toy at the beach", "<toy"),
        ("a photo of toy> at the beach", "toy>"),
        ("<toy> and <bowl-2", "<bowl-2"),
    ],
)
def test_a_misspelt_handle_names_the_known_ones(tower, tokenizer, prompt, named):
    add_handles(tower, tokenizer, HANDLES, (None, None), seed=0)
    with pytest.raises(InputError) as error:
        tokenize(tokenizer, [prompt])
    assert str(error.value) == f"unknown handle {named} in {prompt!r}; known handles: <toy>, <bowl-2>"


def test_a_prompt_that_is_no_text_is_refused(tokenizer):
    """A byte of a shell that is no character reaches Python as half of one, which the tokenizer cannot take."""
    with pytest.raises(InputError, match=r"'a photo of \\udce9' is not UTF-8"):
        tokenize(tokenizer, ["a photo of \udce9"])


def test_a_handle_is_no_other_one_that_begins_alike(tower, tokenizer):
    """<asset1> and <asset10> are two tokens, and knowing one is not knowing the other."""
    add_handles(tower, tokenizer, ("<asset1>",), (None,), seed=0)
    with pytest.raises(InputError, match=r"unknown handle <asset10> .*; known handles: <asset1>$"):
        tokenize(tokenizer, ["<asset10>"])
    with pytest.raises(InputError, match=r"unknown handle <asset> .*; known handles: <asset1>$"):
        tokenize(tokenizer, ["<asset>"])
    tokenizer.add_tokens("<asset10>")
    assert tokenize(tokenizer, ["<asset10><asset1> <asset10>"])[0, :5].tolist() == [540, 543, 542, 543, 541]


@pytest.mark.parametrize(
    "prompt", ["{},", "({})", '"{}"', "{}'s", "x{}y", "{}.", "-{}-", "a/{}/b", "{}{}", "{}!?", "<{}>", "\n{}\t"]
)
def test_punctuation_beside_a_handle_leaves_it_whole(tower, tokenizer, prompt):
    """The handle is its one token, and what stands beside it reads as it does without."""
    add_handles(tower, tokenizer, HANDLES, (None, None), seed=0)
    ids = tokenize(tokenizer, [prompt.replace("{}", "<toy>")])[0].tolist()
    assert ids.count(542) == prompt.count("{}")
    around = [tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split("{}")]
    expected = [token for i, part in enumerate(around) for token in ([542] * (i > 0) + part)]
    assert ids[1 : ids.index(541)] == expected


def test_the_75th_token_is_the_last_one_read(tower, tokenizer, caplog):
    add_handles(tower, tokenizer, HANDLES, (None, None), seed=0)
    words = " ".join(["bowl"] * 74)
    assert tokenize(tokenizer, [f"{words} <toy>"])[0, 75:].tolist() == [542, 541]
    assert caplog.text == ""
    tokenize(tokenizer, [f"{words} <toy> stone, a beach"])
    ours = [record.message for record in caplog.records if record.name.startswith("bas")]
    assert ours == ["the prompt is too long; this part is not read: 'stone , a beach'"]
    prompt = f"{words} stone <toy>"
    with pytest.raises(InputError) as error:
        tokenize(tokenizer, [prompt])
    assert str(error.value) == f"a handle stands beyond the 77 tokens the model reads: shorten {prompt!r}"


def test_a_handle_that_would_be_cut_off_is_an_error(tower, tokenizer, caplog):
    """Beyond 77 tokens text is cut with a warning, a handle never in silence."""
    add_handles(tower, tokenizer, HANDLES, (None, None), seed=0)
    long = " ".join(["bowl"] * 80)
    assert tokenize(tokenizer, [f"<toy> {long}"]).shape == (1, 77)
    assert "too long" in caplog.text
    with pytest.raises(InputError, match="77 tokens"):
        tokenize(tokenizer, [f"{long} <toy>"])


def test_prompts_are_encoded_row_by_row(tower, tokenizer):
    """A prompt's states don't depend on its neighbours in the batch."""
    with torch.no_grad():
        both = encode_prompts(tower, tokenizer, ["a photo of the bowl", ""])
        assert both.shape == (2, 77, 32)
        torch.testing.assert_close(both[1:], encode_prompts(tower, tokenizer, [""]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "CLIP text model"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_attention_heads": 3}, "divisible"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ],
)
def test_a_config_bas_cannot_honour_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        build_text_encoder(TEXT_COMMON | {"num_hidden_layers": 2, "num_attention_heads": 2} | change)
