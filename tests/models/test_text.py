"""The text encoder against transformers, handles as trainable rows, and the tokenizer."""

import json
import shutil
import time

import pytest
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

from bas.errors import InputError
from bas.models.text import (
    HandleEmbedding,
    add_handles,
    build_text_encoder,
    encode_ids,
    expand_vectors,
    find_words,
    initial_row,
    known_handles,
    load_tokenizer,
    merged_state_dict,
    tokenize,
)
from bas.pretrained.single_file import clip_tokenizer
from bas.sampling.prompt_strength import encode_prompts
from tests.helpers.compare import assert_equals_live, assert_equals_stored, cases
from tools.reference.cases import REFERENCE
from tools.reference.measure import fill, uniform
from tools.reference.models import TEXT_COMMON

text_encoders = cases("text")
TOKENIZER = REFERENCE / "official" / "model" / "tokenizer"
HANDLES = ("<toy>", "<bowl-2>")
VECTORS = "<cat-toy> <cat-toy>_1 <cat-toy>_2"


@text_encoders
def test_text_encoder_equals_stored_reference(name):
    """Token states after the final norm, gradients of every parameter; both activations of SD 1 and 2."""
    assert_equals_stored(name)


@text_encoders
def test_text_encoder_equals_transformers(name):
    """Against a CLIPTextModel configured in the ordinary way."""
    assert_equals_live(name)


@pytest.fixture
def tokenizer():
    """The official trace's small tokenizer: 542 tokens."""
    return load_tokenizer(TOKENIZER)


@pytest.fixture
def text_encoder():
    """A text encoder for that tokenizer."""
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


def test_text_encoder_with_handles_equals_one_with_a_longer_embedding(text_encoder, tokenizer):
    """transformers with 544 ordinary rows gives the same states: what a saved run is to any other reader."""
    ids = torch.tensor([[540, 320, 542, 518, 543, 541] + [0] * 71])
    add_handles((text_encoder,), tokenizer, HANDLES, ("bowl", None), seed=1)
    with torch.no_grad():
        ours = encode_ids((text_encoder,), ids).states
        other = build_text_encoder(
            TEXT_COMMON | {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 544, "hidden_act": "gelu"}
        )
        other.load_state_dict(merged_state_dict(text_encoder), strict=True)
        assert torch.equal(ours, other(input_ids=ids).last_hidden_state)


def test_handles_start_from_their_word(text_encoder, tokenizer):
    """One piece: its row. Several pieces: their mean. No word: a draw with the real rows' mean and deviation."""
    weight = text_encoder.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(initial_row(weight, tokenizer, "bowl", generator), weight[535])
    pieces = tokenizer("asset", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    assert torch.equal(initial_row(weight, tokenizer, "asset", generator), weight[pieces].mean(0))
    draws = torch.stack([initial_row(weight, tokenizer, None, generator) for _ in range(2000)])
    torch.testing.assert_close(draws.mean(0), weight.mean(0), atol=0.1 * weight.std().item(), rtol=0)
    torch.testing.assert_close(draws.std(0), weight.std(0), atol=0.1 * weight.std().item(), rtol=0)


def test_adding_handles_leaves_the_vocabulary_alone(text_encoder, tokenizer):
    before = text_encoder.get_input_embeddings().weight.detach().clone()
    plain = tokenize(tokenizer, ["a photo of the bowl"])
    (embedding,) = add_handles((text_encoder,), tokenizer, HANDLES, ("bowl", "stone"), seed=0)
    assert torch.equal(embedding.weight, before)
    assert embedding.handles.shape == (2, 32)
    assert text_encoder.get_input_embeddings() is embedding
    assert known_handles(tokenizer) == HANDLES
    assert torch.equal(tokenize(tokenizer, ["a photo of the bowl"]), plain)
    assert tokenize(tokenizer, ["<bowl-2>and<toy>"])[0, :5].tolist() == [540, 543, 518, 542, 541]


def test_handles_keep_their_case(text_encoder, tokenizer):
    """Prompts are lower-cased, handles are found before that: <Toy> and <toy> are two concepts."""
    add_handles((text_encoder,), tokenizer, ("<Toy>", "<toy>"), (None, None), seed=0)
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
def test_malformed_handles_are_refused(text_encoder, tokenizer, handles, message):
    with pytest.raises(InputError, match=message):
        add_handles((text_encoder,), tokenizer, handles, (None,) * len(handles), seed=0)


def test_a_handle_cannot_take_a_token_of_the_vocabulary(text_encoder, tokenizer):
    tokenizer.add_tokens("<stone>")
    with pytest.raises(InputError, match=r"^handle <stone> is already a token of this model: choose another name$"):
        add_handles((text_encoder,), tokenizer, ("<stone>",), (None,), seed=0)


def test_a_handle_cannot_be_added_twice(text_encoder, tokenizer):
    add_handles((text_encoder,), tokenizer, ("<toy>",), (None,), seed=0)
    with pytest.raises(InputError, match="already"):
        add_handles((text_encoder,), tokenizer, ("<toy>",), (None,), seed=0)


# --- Prompts ------------------------------------------------------------------------------------------------------


def test_an_unknown_handle_names_the_known_ones(text_encoder, tokenizer):
    add_handles((text_encoder,), tokenizer, HANDLES, (None, None), seed=0)
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
def test_a_misspelt_handle_names_the_known_ones(text_encoder, tokenizer, prompt, named):
    add_handles((text_encoder,), tokenizer, HANDLES, (None, None), seed=0)
    with pytest.raises(InputError) as error:
        tokenize(tokenizer, [prompt])
    assert str(error.value) == f"unknown handle {named} in {prompt!r}; known handles: <toy>, <bowl-2>"


def test_a_prompt_that_is_no_text_is_refused(tokenizer):
    """A byte of a shell that is no character reaches Python as half of one, which the tokenizer cannot take."""
    with pytest.raises(InputError, match=r"'a photo of \\udce9' is not UTF-8"):
        tokenize(tokenizer, ["a photo of \udce9"])


def test_a_handle_is_no_other_one_that_begins_alike(text_encoder, tokenizer):
    """<asset1> and <asset10> are two tokens, and knowing one is not knowing the other."""
    add_handles((text_encoder,), tokenizer, ("<asset1>",), (None,), seed=0)
    with pytest.raises(InputError, match=r"unknown handle <asset10> .*; known handles: <asset1>$"):
        tokenize(tokenizer, ["<asset10>"])
    with pytest.raises(InputError, match=r"unknown handle <asset> .*; known handles: <asset1>$"):
        tokenize(tokenizer, ["<asset>"])
    tokenizer.add_tokens("<asset10>")
    assert tokenize(tokenizer, ["<asset10><asset1> <asset10>"])[0, :5].tolist() == [540, 543, 542, 543, 541]


@pytest.mark.parametrize(
    "prompt", ["{},", "({})", '"{}"', "{}'s", "x{}y", "{}.", "-{}-", "a/{}/b", "{}{}", "{}!?", "<{}>", "\n{}\t"]
)
def test_punctuation_beside_a_handle_leaves_it_whole(text_encoder, tokenizer, prompt):
    """The handle is its one token, and what stands beside it reads as it does without."""
    add_handles((text_encoder,), tokenizer, HANDLES, (None, None), seed=0)
    ids = tokenize(tokenizer, [prompt.replace("{}", "<toy>")])[0].tolist()
    assert ids.count(542) == prompt.count("{}")
    around = [tokenizer(part, add_special_tokens=False).input_ids for part in prompt.split("{}")]
    expected = [token for i, part in enumerate(around) for token in ([542] * (i > 0) + part)]
    assert ids[1 : ids.index(541)] == expected


def test_the_75th_token_is_the_last_one_read(text_encoder, tokenizer, caplog):
    add_handles((text_encoder,), tokenizer, HANDLES, (None, None), seed=0)
    words = " ".join(["bowl"] * 74)
    assert tokenize(tokenizer, [f"{words} <toy>"])[0, 75:].tolist() == [542, 541]
    assert caplog.text == ""
    tokenize(tokenizer, [f"{words} <toy> stone, a beach"])
    ours = [record.message for record in caplog.records if record.name.startswith("bas")]
    assert ours == ["the prompt is too long, this part is not read: 'stone , a beach'"]
    prompt = f"{words} stone <toy>"
    with pytest.raises(InputError) as error:
        tokenize(tokenizer, [prompt])
    assert str(error.value) == f"a handle is beyond the 77 tokens that the model reads: shorten {prompt!r}"


def test_a_handle_that_would_be_cut_off_is_an_error(text_encoder, tokenizer, caplog):
    """Beyond 77 tokens text is cut with a warning, a handle never in silence."""
    add_handles((text_encoder,), tokenizer, HANDLES, (None, None), seed=0)
    long = " ".join(["bowl"] * 80)
    assert tokenize(tokenizer, [f"<toy> {long}"]).shape == (1, 77)
    assert "too long" in caplog.text
    with pytest.raises(InputError, match="77 tokens"):
        tokenize(tokenizer, [f"{long} <toy>"])


def test_prompts_are_encoded_row_by_row(text_encoder, tokenizer):
    """A prompt's states don't depend on its neighbours in the batch."""
    with torch.no_grad():
        both = encode_prompts((text_encoder,), tokenizer, ["a photo of the bowl", ""]).states
        assert both.shape == (2, 77, 32)
        torch.testing.assert_close(both[1:], encode_prompts((text_encoder,), tokenizer, [""]).states, atol=1e-6, rtol=0)


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


# --- Embeddings of several vectors, words -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("a photo of <cat-toy>", f"a photo of {VECTORS}"),
        (
            "<cat-toy>, <bowl> and <cat-toy>",
            "<cat-toy> <cat-toy>_1 <cat-toy>_2, <bowl> and <cat-toy> <cat-toy>_1 <cat-toy>_2",
        ),
        ("a style at the <bowl>", "a style style_1 at the <bowl>"),  # a name without brackets
        ("a bowl", "a bowl"),
    ],
)
def test_an_embedding_of_several_vectors_is_written_out_as_in_diffusers(tokenizer, prompt, expanded):
    """`<bowl>_2` has no `<bowl>_1` before it, so it is no vector of `<bowl>`."""
    tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<bowl>", "<bowl>_2", "style", "style_1"])
    assert expand_vectors(tokenizer, prompt) == expanded
    assert TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer) == expanded
    assert tokenize(tokenizer, [prompt])[0].tolist() == tokenize(tokenizer, [expanded])[0].tolist()


def test_a_prompt_that_writes_the_vectors_itself_stays(tokenizer):
    tokenizer.add_tokens(["<toy>", "<toy>_1"])
    assert expand_vectors(tokenizer, "a <toy> <toy>_1") == "a <toy> <toy>_1"


def test_vectors_beyond_the_77_tokens_are_an_error(tokenizer):
    """The handle's first vector is read, its second would be cut."""
    tokenizer.add_tokens(["<toy>", "<toy>_1"])
    with pytest.raises(InputError, match="a handle is beyond the 77 tokens"):
        tokenize(tokenizer, [" ".join(["bowl"] * 74) + " <toy>"])


@pytest.mark.parametrize("pad_with_exclamation_mark", [False, True])
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("wow! <asset0>", ["wow", "!", "<asset0>"]),
        ("<asset0>!<asset0>", ["<asset0>", "!", "<asset0>"]),
        ("写真 of Zoë's café", ["写真", "of", "zoë", "'s", "café"]),
        ("naïve<cat-toy>, yes", ["naïve", "<cat-toy>", "<cat-toy>", ",", "yes"]),
    ],
)
def test_words_are_text_and_an_added_token_is_its_own(pad_with_exclamation_mark, prompt, words):
    """SD 2 pads with `!`, an added token without a mark of its end; CLIP's pieces are bytes, not characters."""
    tokenizer = clip_tokenizer(pad_with_exclamation_mark)
    tokenizer.add_tokens(["<asset0>", "<cat-toy>", "<cat-toy>_1"])
    ids = tokenize(tokenizer, [prompt])[0].tolist()
    found = find_words(tokenizer, ids)
    assert [name for name, _ in found] == words
    assert [i for _, positions in found for i in positions] == list(range(1, ids.index(tokenizer.eos_token_id)))


# --- Vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"%": 3}, r"gives '#' and '%' the same number, 3"),
        ({"%": 2**40}, r"gives '%' the number 1099511627776: expected 0 to \d+, each once"),
        ({"%": -1}, r"gives '%' the number -1"),
        ({"%": 4.0}, r"gives '%' the number 4.0"),
        ({"%": True}, r"gives '%' the number True"),
        ({"%": None}, r"gives '%' the number None"),
    ],
)
@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json"])
def test_a_vocabulary_with_wrong_numbers_is_refused(tmp_path, tokenizer, layout, change, reason):
    """Two tokens of one number, or a number that wraps around, would read prompts as other tokens."""
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert (vocabulary["#"], vocabulary["%"]) == (2, 4)
    vocabulary |= {"#": 3 if change["%"] == 3 else 2, "$": 2 if change["%"] == 3 else 3} | change
    if layout == "vocab.json":
        (folder / layout).write_text(json.dumps(vocabulary))
    else:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        whole["model"]["vocab"] = vocabulary
        (folder / layout).write_text(json.dumps(whole))
    with pytest.raises(InputError, match=reason) as error:
        load_tokenizer(folder)
    assert str(error.value).startswith(str(folder / layout))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("special_tokens_map.json", {"additional_special_tokens": [f"<t{i}>" for i in range(100_000)]}),
        ("added_tokens.json", {f"<t{i}>": 542 + i for i in range(100_000)}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(542 + i): {"content": f"<t{i}>"} for i in range(1001)}},
        ),
    ],
)
def test_thousands_of_added_tokens_are_refused_at_once(tmp_path, file, content):
    """The tokenizers library takes the square of their number in time: minutes for 100,000."""
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    (folder / file).write_text(json.dumps(content))
    begun = time.process_time()
    with pytest.raises(InputError, match=rf"{file} adds \d+ tokens: bas reads up to 1000"):
        load_tokenizer(folder)
    assert time.process_time() - begun < 5  # of the CPU, which no load of the machine changes
