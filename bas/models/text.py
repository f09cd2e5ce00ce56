"""The text encoders (transformers' CLIP) and their tokenizer, extended by trainable handles such as `<asset0>`.

SD 1 and 2 have one text encoder, SDXL two, which read the same tokens. A handle is one new token. Its embedding row is
a parameter of its own beside the base vocabulary, so phase 1 trains N rows of each text encoder and nothing else
(paper, section 3), and the base rows stay bit-identical.

transformers is imported in functions: its networks take longer to import than PyTorch, and errors in the input are
reported without them. Only `build_text_encoder` imports the networks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bas.errors import MAX_CHANNELS, InputError, check_float, check_positive, is_utf8
from bas.io.json_files import read_json

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

log = logging.getLogger(__name__)

LONGEST_NAME = 32  # characters of a handle between its brackets
HANDLE = re.compile(rf"<[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}>")
NAME_RULE = f"1 to {LONGEST_NAME} letters a-z or A-Z, digits, _ or -"  # of a handle
BRACKETED = re.compile(r"<[^<>]*>")  # text that is meant as a handle
MAX_ADDED = 1000  # tokens beside the vocabulary; the tokenizers library takes the square of their number in time

# The config.json fields that describe the text encoder; other fields are not read.
LIMITS = {
    "vocab_size": 1_000_000,
    "hidden_size": MAX_CHANNELS,
    "intermediate_size": 4 * MAX_CHANNELS,
    "num_hidden_layers": 100,
    "num_attention_heads": 256,
    "max_position_embeddings": 1024,
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ACTIVATIONS = ("quick_gelu", "gelu")


class Conditioning(NamedTuple):
    """What the UNet reads of prompts."""

    states: Tensor  # (b, k, d), one for each token
    pooled: Tensor | None = None  # (b, p), one for the whole prompt, in SDXL alone

    def each(self, change: Callable[..., Tensor], *others: Conditioning) -> Conditioning:
        """Apply a function to the states, and to the pooled text if there is one, together with those of others."""
        states = change(self.states, *(other.states for other in others))
        pooled = None if self.pooled is None else change(self.pooled, *(other.pooled for other in others))
        return Conditioning(states, pooled)


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """Return the rows of these, one after another."""
    return parts[0].each(lambda *rows: torch.cat(rows), *parts[1:])


def build_text_encoder(config: dict, projection: bool = False) -> TextEncoder:
    """Build an uninitialised text encoder from its config.json, with a projection of its pooled output if asked.

    Raises InputError as `text_config` does.
    """
    with torch.device("cpu"):  # the caller's may be meta, on which tensors made at import would lose their values
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(text_config(config, projection))


def text_config(config: dict, projection: bool = False) -> CLIPTextConfig:
    """Read the text encoder's config.json field by field, so that nothing in it can name code.

    Raises InputError for absurd or unknown values, before anything is allocated.
    """
    if config.get("model_type", "clip_text_model") != "clip_text_model":
        raise InputError(f"the text encoder is a {config['model_type']!r}: bas needs a CLIP text model")
    chosen = {}
    for name, most in LIMITS.items():
        chosen[name] = check_positive(f"text encoder {name}", config.get(name), most)
    chosen["hidden_act"] = config.get("hidden_act", "quick_gelu")
    if chosen["hidden_act"] not in ACTIVATIONS:
        raise InputError(f"text encoder hidden_act is {chosen['hidden_act']!r}: expected one of {ACTIVATIONS}")
    if chosen["hidden_size"] % chosen["num_attention_heads"]:
        raise InputError("text encoder hidden_size is not divisible by num_attention_heads")
    chosen["layer_norm_eps"] = float(
        check_float("text encoder layer_norm_eps", config.get("layer_norm_eps", 1e-5), 0, 1)
    )
    # Token ids outside the vocabulary affect only transformers' own pooled output, which nothing here reads.
    ids = {name: config[name] for name in TOKEN_IDS if isinstance(config.get(name), int)}
    chosen |= {name: value for name, value in ids.items() if 0 <= value < chosen["vocab_size"]}
    chosen["projection_dim"] = config.get("projection_dim", chosen["hidden_size"])
    if projection:
        check_positive("text encoder projection_dim", chosen["projection_dim"], MAX_CHANNELS)
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**chosen)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer of a folder: vocab.json, merges.txt and the tokens added to them. Never from the network.

    Raises InputError as `check_vocabulary` does.
    """
    layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in layout) for layout in layouts):
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt: it holds no tokenizer")
    check_vocabulary(folder)
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def check_vocabulary(folder: Path) -> None:
    """Raise InputError unless a tokenizer's vocabulary has the numbers 0..n-1, each once, and few tokens beside it."""
    if (whole := folder / "tokenizer.json").is_file():
        content = read_json(whole)
        model = content.get("model")
        _check_numbers(whole, model.get("vocab") if isinstance(model, dict) else None)
        _check_added(whole, content.get("added_tokens"))
    if (words := folder / "vocab.json").is_file():
        _check_numbers(words, read_json(words))
    if (added := folder / "added_tokens.json").is_file():
        _check_added(added, read_json(added))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file := folder / name).is_file():
            for value in read_json(file).values():
                _check_added(file, value)


def _check_numbers(file: Path, vocabulary: object) -> None:
    """Raise InputError unless a vocabulary has the numbers 0..n-1, each once."""
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise InputError(f"{file} holds no vocabulary: copy or download it again")
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < len(vocabulary):
            raise InputError(
                f"{file} gives {token!r} the number {number!r}: expected 0 to {len(vocabulary) - 1}, each once; "
                "copy or download it again"
            )
        if number in tokens:
            raise InputError(
                f"{file} gives {tokens[number]!r} and {token!r} the same number, {number}: copy or download it again"
            )
        tokens[number] = token


def _check_added(file: Path, tokens: object) -> None:
    """Raise InputError for more tokens beside a vocabulary than any model has."""
    if isinstance(tokens, (dict, list)) and len(tokens) > MAX_ADDED:
        raise InputError(f"{file} adds {len(tokens)} tokens: bas reads up to {MAX_ADDED}")


class HandleEmbedding(nn.Module):
    """A token embedding whose last rows, the handles', are a parameter of their own."""

    def __init__(self, weight: Tensor, handles: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)  # (V, d) the base vocabulary
        self.handles = nn.Parameter(handles)  # (N, d) rows V .. V+N-1

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (b, k) in 0..V+N-1 -> (b, k, d)"""
        base = len(self.weight)
        words = F.embedding(ids.clamp(max=base - 1), self.weight)
        handles = F.embedding((ids - base).clamp(min=0), self.handles)
        return torch.where((ids >= base)[..., None], handles, words)


def check_name(handle: object) -> None:
    """Raise InputError unless it is a handle's name."""
    if not (isinstance(handle, str) and HANDLE.fullmatch(handle)):
        raise InputError(f"handle {handle!r}: expected <name> with {NAME_RULE}")


def check_handles(tokenizer: CLIPTokenizer, handles: tuple[str, ...]) -> None:
    """Raise InputError for a malformed name, or one that the vocabulary already has."""
    vocabulary = tokenizer.get_vocab()
    for handle in handles:
        check_name(handle)
        if handle in vocabulary:
            raise InputError(f"handle {handle} is already a token of this model: choose another name")


def word_pieces(tokenizer: CLIPTokenizer, word: str) -> list[int]:
    """Return the token ids of an initial word, usually one. Raises InputError for a word without any."""
    pieces = tokenizer(word, add_special_tokens=False).input_ids
    if not pieces:
        raise InputError(f"the initial word {word!r} holds no token: give an ordinary word")
    return pieces


def initial_row(weight: Tensor, tokenizer: CLIPTokenizer, word: str | None, generator: torch.Generator) -> Tensor:
    """Return a handle's first row (d,): the mean of its word's pieces, or a sample of the rows' distribution."""
    if not word:
        noise = torch.randn(weight.shape[1], generator=generator).to(weight)
        return weight.mean(dim=0) + weight.std(dim=0) * noise
    pieces = word_pieces(tokenizer, word)
    if len(pieces) > 1:
        log.info("the tokenizer splits '%s' into %d pieces: its handle starts from their mean", word, len(pieces))
    return weight[pieces].mean(dim=0)


def add_handles(
    text_encoders: Sequence[TextEncoder],
    tokenizer: CLIPTokenizer,
    handles: tuple[str, ...],
    words: tuple[str | None, ...],
    seed: int,
) -> tuple[HandleEmbedding, ...]:
    """Extend the tokenizer and the token embedding of each text encoder by handles, in place. -> the new embeddings

    Raises InputError for a malformed name, or one that the vocabulary already has.
    """
    check_handles(tokenizer, handles)
    generator, embeddings = torch.Generator().manual_seed(seed), []
    for text_encoder in text_encoders:
        weight = text_encoder.get_input_embeddings().get_parameter("weight").detach()
        if len(tokenizer) != len(weight):
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder {len(weight)} rows: they don't match"
            )
        rows = [initial_row(weight, tokenizer, word, generator) for word in words]
        embeddings.append(HandleEmbedding(weight, torch.stack(rows)))
    # Not normalized: handles are matched before the text is lower-cased, so `<Toy>` and `<toy>` stay different.
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(handle, normalized=False) for handle in handles])
    for text_encoder, embedding in zip(text_encoders, embeddings, strict=True):
        text_encoder.set_input_embeddings(embedding)
    return tuple(embeddings)


def merged_state_dict(text_encoder: TextEncoder) -> dict[str, Tensor]:
    """Return the text encoder's state dict with the handles as the last rows of one matrix, as other tools read it."""
    state = text_encoder.state_dict()
    for key in [key for key in state if key.endswith("token_embedding.handles")]:
        weight = key.removesuffix("handles") + "weight"
        state[weight] = torch.cat([state[weight], state.pop(key)])
    return state


def known_handles(tokenizer: CLIPTokenizer) -> tuple[str, ...]:
    """Return the handles among the tokenizer's added tokens, in the order of their ids."""
    added = tokenizer.get_added_vocab()
    return tuple(token for token in sorted(added, key=lambda token: added[token]) if HANDLE.fullmatch(token))


def vectors_of(tokenizer: CLIPTokenizer, token: str) -> list[str]:
    """Return the tokens of a multi-vector embedding: `<toy>`, `<toy>_1`, `<toy>_2`, ...; most have the first alone."""
    added = tokenizer.get_added_vocab()
    further = takewhile(lambda name: name in added, (f"{token}_{i}" for i in count(1)))
    return [token, *further]


def handle_ids(tokenizer: CLIPTokenizer, handle: str) -> list[int]:
    """Return the token ids of a handle: one, or several where its embedding has several vectors."""
    added = tokenizer.get_added_vocab()
    return [added[token] for token in vectors_of(tokenizer, handle)]


def expand_vectors(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """Write all vectors of a multi-vector embedding where its name stands, as diffusers does.

    `a <toy>` -> `a <toy> <toy>_1 <toy>_2`; a prompt that names the further vectors itself stays as it is.
    """
    for token in tokenizer.get_added_vocab():
        tokens = vectors_of(tokenizer, token)
        if len(tokens) > 1 and token in prompt and tokens[1] not in prompt:
            prompt = prompt.replace(token, " ".join(tokens))
    return prompt


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids, padded to the text encoder's 77 positions: (b, 77) int64.

    Raises InputError for an unknown handle, a handle without a bracket, and a handle beyond the 77 tokens. Other text
    beyond them is cut with a warning, as every Stable Diffusion does.
    """
    known, added = known_handles(tokenizer), tokenizer.get_added_vocab()
    for prompt in prompts:
        if not is_utf8(prompt):
            raise InputError(f"{prompt!r} is not UTF-8: write the prompt again")
        unknown = [name for name in BRACKETED.findall(prompt) if name not in added]
        rest = BRACKETED.sub(" ", prompt)
        unknown += [part for name in known for part in (name[:-1], name[1:]) if part in rest]
        if unknown:
            names = ", ".join(known) or "none: this is a base model"
            raise InputError(f"unknown handle {', '.join(unknown)} in {prompt!r}; known handles: {names}")
    length, prompts = tokenizer.model_max_length, [expand_vectors(tokenizer, prompt) for prompt in prompts]
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(prompts, padding=False, truncation=False).input_ids
    for prompt, row in zip(prompts, whole, strict=True):
        cut = row[length - 1 : -1]
        if any(set(cut) & set(handle_ids(tokenizer, handle)) for handle in known):
            raise InputError(f"a handle is beyond the {length} tokens that the model reads: shorten {prompt!r}")
        if cut:
            log.warning("the prompt is too long, this part is not read: %r", tokenizer.decode(cut))
    return ids


def find_words(tokenizer: CLIPTokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Find the words of a tokenized prompt with their token positions, in order. ids: (77,), from `tokenize`

    An added token, such as a handle, is a word of its own, with all its vectors if it has several.
    """
    added = tokenizer.get_added_vocab()
    owner = {number: token for token, number in added.items()}
    owner |= {number: handle for handle in known_handles(tokenizer) for number in handle_ids(tokenizer, handle)}
    words: list[tuple[str, list[int]]] = []
    word: list[int] = []

    def close() -> None:
        if word:
            words.append((str(tokenizer.decode([ids[i] for i in word])).strip(), word.copy()))
            word.clear()

    for i in range(1, ids.index(cast(int, tokenizer.eos_token_id))):
        if ids[i] in owner:
            close()
            words.append((owner[ids[i]], [i]))
        else:
            word.append(i)
            if str(tokenizer.convert_ids_to_tokens(ids[i])).endswith("</w>"):
                close()
    close()
    return words


def find_places(tokenizer: CLIPTokenizer, ids: list[int], words: bool) -> dict[str, list[int]]:
    """Find where each handle of a prompt stands, with `words` each word too. ids: (77,) -> token positions by name

    A word of several pieces has several positions, and so have a handle of several vectors and a name that stands
    twice.
    """
    handles = known_handles(tokenizer)
    found: dict[str, list[int]] = {}
    for name, positions in find_words(tokenizer, ids):
        if words or name in handles:
            found.setdefault(name, []).extend(positions)
    return found


MARKED = "marked_tokens"  # of a text encoder: the ids of tokens that have adapters of their own in the UNet


def mark_tokens(text_encoder: nn.Module, ids: tuple[int, ...]) -> None:
    """Let `encode_ids` mark these tokens, for the UNet's adapters that act at single tokens."""
    setattr(text_encoder, MARKED, ids)


def context_width(text_encoders: Sequence[TextEncoder]) -> int:
    """Return the width of `encode_ids`' states: the features of all encoders, and a column for each marked token."""
    return sum(encoder.config.hidden_size + len(getattr(encoder, MARKED, ())) for encoder in text_encoders)


def encode_ids(text_encoders: Sequence[TextEncoder], ids: Tensor, visible: Tensor | None = None) -> Conditioning:
    """Encode tokens for the UNet. ids: (b, k); visible: (b, k), 0 for tokens that no other may attend to, or None.

    One text encoder gives the states after its final norm. Of SDXL's two, the states are those before the last layer,
    side by side, and the pooled text is the second's output at the end of the text, projected (Podell et al. 2023,
    section 2.1). Padding is not masked. Of a model with adapters at single tokens, the states have a column more for
    each such token: 1 where it stands, 0 elsewhere.
    """
    if len(text_encoders) == 1:
        states = text_encoders[0](input_ids=ids, attention_mask=visible).last_hidden_state
        return Conditioning(_with_marks(text_encoders, ids, states))
    first, second = text_encoders
    end = ids.eq(cast(int, first.config.eos_token_id)).int().argmax(dim=1, keepdim=True)  # the first such token
    padding = torch.arange(ids.shape[1], device=ids.device) > end
    padded = ids.masked_fill(padding, cast(int, second.config.pad_token_id))
    outputs = [
        first(input_ids=ids, attention_mask=visible, output_hidden_states=True),
        second(input_ids=padded, attention_mask=visible, output_hidden_states=True),
    ]
    # transformers' own pooled output would be that of a handle, whose id is above the end's, where eos_token_id is 2.
    at_end = outputs[1].last_hidden_state.take_along_dim(end[..., None], dim=1)[:, 0]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = cast("CLIPTextModelWithProjection", second).text_projection(at_end)
    return Conditioning(_with_marks(text_encoders, ids, states), pooled)


def _with_marks(text_encoders: Sequence[TextEncoder], ids: Tensor, states: Tensor) -> Tensor:
    """Return the states with a column for each marked token. ids: (b, k); states: (b, k, d) -> (b, k, d + N)"""
    numbers = (number for encoder in text_encoders for number in getattr(encoder, MARKED, ()))
    marks = [(ids == number)[..., None].to(states.dtype) for number in numbers]
    return torch.cat([states, *marks], dim=-1) if marks else states
