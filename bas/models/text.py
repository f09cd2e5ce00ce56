"""The text tower (transformers' CLIP) and its tokenizer, extended by trainable handles such as `<asset0>`.

A handle is one new token. Its embedding row lives beside the base vocabulary as its own small parameter, so that
phase 1 trains N rows and nothing else (paper, section 3), and the base rows stay bit-identical by construction.

transformers is imported where it is used: the code of its networks takes longer to import than PyTorch, and what is
wrong with the input is told without it. So only `build_text_encoder` waits for that code.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn

from bas.errors import MAX_CHANNELS, InputError, check_float, check_positive, is_utf8

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

log = logging.getLogger(__name__)

HANDLE = re.compile(r"<[A-Za-z0-9_-]{1,32}>")
BRACKETED = re.compile(r"<[^<>]*>")  # what is meant to be a handle

# The config.json fields that describe the tower; everything else in the file is left unread.
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


def build_text_encoder(config: dict) -> CLIPTextModel:
    """An uninitialised text tower from its config.json. Raises InputError as `text_config` does."""
    with torch.device("cpu"):  # not the tower's, which may be meta: what a module makes when imported keeps its values
        from transformers import CLIPTextModel
    return CLIPTextModel(text_config(config))


def text_config(config: dict) -> CLIPTextConfig:
    """What the tower's config.json describes, read field by field: nothing in it can name code.

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
    # Token ids outside the vocabulary only matter to the pooled output, which Stable Diffusion does not use.
    ids = {name: config[name] for name in TOKEN_IDS if isinstance(config.get(name), int)}
    chosen |= {name: value for name, value in ids.items() if 0 <= value < chosen["vocab_size"]}
    chosen["projection_dim"] = config.get("projection_dim", chosen["hidden_size"])
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**chosen)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a model folder: vocab.json, merges.txt and the tokens added to them. Never from the network."""
    layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in layout) for layout in layouts):
        raise InputError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt: it holds no tokenizer")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


class HandleEmbedding(nn.Module):
    """A token embedding whose last rows, the handles, are a parameter of their own."""

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
    """InputError unless it is a handle's name."""
    if not (isinstance(handle, str) and HANDLE.fullmatch(handle)):
        raise InputError(f"handle {handle!r}: expected <name> with 1 to 32 letters, digits, _ or -")


def check_handles(tokenizer: CLIPTokenizer, handles: tuple[str, ...]) -> None:
    """Raises InputError for a malformed name, or one that the vocabulary already holds."""
    vocabulary = tokenizer.get_vocab()
    for handle in handles:
        check_name(handle)
        if handle in vocabulary:
            raise InputError(f"handle {handle} is already a token of this model: choose another name")


def word_pieces(tokenizer: CLIPTokenizer, word: str) -> list[int]:
    """The token ids that an initial word consists of; usually one. Raises InputError for a word without any."""
    pieces = tokenizer(word, add_special_tokens=False).input_ids
    if not pieces:
        raise InputError(f"the initial word {word!r} holds no token: give an ordinary word")
    return pieces


def initial_row(weight: Tensor, tokenizer: CLIPTokenizer, word: str | None, generator: torch.Generator) -> Tensor:
    """Where a handle starts: (d,) the mean of its word's pieces, or a draw from the real rows' distribution."""
    if not word:
        noise = torch.randn(weight.shape[1], generator=generator).to(weight)
        return weight.mean(dim=0) + weight.std(dim=0) * noise
    pieces = word_pieces(tokenizer, word)
    if len(pieces) > 1:
        log.info("'%s' is %d pieces for the tokenizer: its handle starts from their mean", word, len(pieces))
    return weight[pieces].mean(dim=0)


def add_handles(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    handles: tuple[str, ...],
    words: tuple[str | None, ...],
    seed: int,
) -> HandleEmbedding:
    """Extend tokenizer and token embedding by these handles. Returns the new embedding module, already in place.

    Raises InputError for a malformed name, or one that the vocabulary already holds.
    """
    check_handles(tokenizer, handles)
    weight = text_encoder.get_input_embeddings().weight.detach()
    if len(tokenizer) != len(weight):
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the text encoder {len(weight)} rows: they don't match"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [initial_row(weight, tokenizer, word, generator) for word in words]
    # Not normalized: `<Toy>` and `<toy>` stay different, and text is matched before it is lower-cased.
    tokenizer.add_tokens([AddedToken(handle, normalized=False) for handle in handles])
    embedding = HandleEmbedding(weight, torch.stack(rows))
    text_encoder.set_input_embeddings(embedding)
    return embedding


def merged_state_dict(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The tower's state with handles as the last rows of one embedding matrix, the layout every reader knows."""
    state = text_encoder.state_dict()
    for key in [key for key in state if key.endswith("token_embedding.handles")]:
        weight = key.removesuffix("handles") + "weight"
        state[weight] = torch.cat([state[weight], state.pop(key)])
    return state


def known_handles(tokenizer: CLIPTokenizer) -> tuple[str, ...]:
    """The handles among the tokenizer's added tokens, in the order of their ids."""
    added = tokenizer.get_added_vocab()
    return tuple(token for token in sorted(added, key=added.get) if HANDLE.fullmatch(token))


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids, padded to the tower's 77 positions: (b, 77) int64.

    Raises InputError for a handle that the model doesn't know or that lacks a bracket, or one that falls beyond the 77
    tokens; other text beyond them is cut with a warning, as every Stable Diffusion does.
    """
    known = known_handles(tokenizer)
    for prompt in prompts:
        if not is_utf8(prompt):
            raise InputError(f"{prompt!r} is not UTF-8: write the prompt anew")
        unknown = [name for name in BRACKETED.findall(prompt) if name not in tokenizer.get_added_vocab()]
        rest = BRACKETED.sub(" ", prompt)
        unknown += [part for name in known for part in (name[:-1], name[1:]) if part in rest]
        if unknown:
            names = ", ".join(known) or "none: this is a base model"
            raise InputError(f"unknown handle {', '.join(unknown)} in {prompt!r}; known handles: {names}")
    length = tokenizer.model_max_length
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(prompts, padding=False, truncation=False).input_ids
    for prompt, row in zip(prompts, whole, strict=True):
        cut = row[length - 1 : -1]
        if set(cut) & set(tokenizer.convert_tokens_to_ids(list(known))):
            raise InputError(f"a handle stands beyond the {length} tokens the model reads: shorten {prompt!r}")
        if cut:
            log.warning("the prompt is too long; this part is not read: %r", tokenizer.decode(cut))
    return ids


def encode_ids(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Token states after the tower's final norm, without an attention mask. ids: (b, k) -> (b, k, d)"""
    return text_encoder(input_ids=ids).last_hidden_state
