"""Prompts with strengths: `a photo of (<asset0>:1.3) and a (red:1.4) ball`, `(<asset1>:0)` to remove a handle.

A strength s scales what a handle or a phrase does to the prompt's token states: c = c0 + s (c1 - c0), where c1 are the
states with its tokens and c0 those without them. In c0 no other token attends to these tokens, and their own places
hold what an empty prompt has there. So 1 changes nothing, 0 removes every trace while all other words stay in their
places, and values above 1 extrapolate. The strength of a handle holds wherever it stands, that of a phrase only there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bas.errors import InputError
from bas.models.bundle import Models
from bas.models.text import BRACKETED, HANDLE, Conditioning, encode_ids, expand_vectors, handle_ids, join, tokenize

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from bas.models.text import TextEncoder

STRONGEST = 5.0  # images fall apart far below
NAME = HANDLE.pattern
NUMBERED = re.compile(r".*[A-Za-z].*\d")  # the name of a handle of a pattern, as asset1
STRENGTH = re.compile(rf"\(\s*({NAME})\s*:\s*([^()]*?)\s*\)")
COLON = r":(?!(?<=\d:)\d\d\b)"  # but that of a time of day, as 10:30
LOOKS_LIKE = re.compile(rf"\([^()]*{NAME}[^()]*{COLON}[^()]*\)")
PHRASE = re.compile(r"\(\s*([^()\[\]{}<>:]*[^\W\d_][^()\[\]{}<>:]*?)\s*:\s*(\d+\.?\d*|\.\d+)\s*\)")
END = r"(?=[\s,.;:!?)]|$)"
UNREAD = re.compile(  # weights as A1111, ComfyUI, InvokeAI and Compel write them
    rf"\(+(?:[^()]*\([^()]*:\s*[-+.\d]+\s*\)[^()]*|\s*\([^()]*\)\s*)\)+"  # ((red)), (a (red:1.2) ball)
    rf"|\([^()]*{COLON}\s*[-+]?[.\d]+\s*\)"  # (red:9)
    rf"|\([^()]*\)(?:\++|-+|\d*\.?\d+){END}"  # (red ball)++, (red ball)1.3
    r"|\[[^\[\]]*\]|\{[^{}]*\}"  # [red], [red:blue:0.5], {red}
    rf"|{NAME}(?:\++|-+|\d*\.\d+|:\d+\.?\d*){END}"  # <toy>+, <toy>:1.3
    rf"|\b[^\W\d_]{{2,}}(?:\++|--+){END}"  # red++, red+
    rf"|\(\s*{NAME}\s*\)"  # (<toy>)
    r"|\([^()]*:\s*\d*,\d+\s*\)"  # (red:1,4)
    r"|\([^()]*:\s*\d*\.\d+\s*$"  # (red:1.4
    r"|\b(?:BREAK|AND)\b|\\[()]"  # of A1111: parts of a prompt, a bracket that is a character
    r"|\.(?:and|blend|swap)\([^()]*\)"  # of Compel: ("red", "blue").blend(0.5, 0.5), cat.swap(dog)
    r"|（[^（）]*[:：]\s*[.\d]+\s*）"  # (red:1.4) in the full-width brackets of Chinese and Japanese keyboards
    r"|__[\w/-]+__"  # wildcards
    rf"|::\s*-?[.\d]+{END}|(?<!\S)--[a-z]+(?:\s+[\d.:]+)?(?!\S)"  # of Midjourney: red::2, --ar 16:9
)
NETWORK = re.compile(  # of A1111: a file and its weight
    r"<(lora|lyco|hypernet):([^<>:]+):?([^<>:]*)[^<>]*>", re.IGNORECASE
)
EMBEDDED = re.compile(r"\bembedding:([\w.-]*[\w-])", re.IGNORECASE)  # of ComfyUI


@dataclass(frozen=True)
class Prompt:
    """A prompt without its strengths, and the strengths."""

    parts: tuple[tuple[str, float], ...]  # in order, each with the strength of its phrase; 1 for ordinary text
    handles: dict[str, float]  # strengths by handle

    @property
    def text(self) -> str:
        """The prompt as the tokenizer reads it."""
        return " ".join(text for text, _ in self.parts)

    @property
    def has_strengths(self) -> bool:
        """Whether anything has a strength."""
        return bool(self.handles) or len(self.parts) > 1


def bare_handles(prompt: str, handles: tuple[str, ...]) -> list[str]:
    """Return the handles whose names a prompt contains as mere words, outside of any < >.

    A name with a number at its end, as those of a pattern have, is no ordinary word: it counts in every prompt and in
    any case. Other names count in a prompt without a handle alone.
    """
    words = set(re.findall(r"[\w-]+", BRACKETED.sub(" ", prompt)))
    lower, alone = {word.lower() for word in words}, not any(handle in prompt for handle in handles)

    def is_bare(name: str) -> bool:
        return (alone and name in words) or (NUMBERED.fullmatch(name) is not None and name.lower() in lower)

    return [handle for handle in handles if is_bare(handle[1:-1])]


def read_prompt(prompt: str) -> Prompt:
    """Split a prompt into its text and its strengths.

    InputError for a handle's strength that is not a number from 0 to 5, that holds more than one handle or contradicts
    another, for weights in other tools' syntax around a handle, and for the file of a LoRA or an embedding.
    """
    if found := NETWORK.search(prompt):
        kind, name, weight = found.groups()
        flag = (
            f"add --lora {name}.safetensors:{weight or 1}"
            if kind.lower() != "hypernet"
            else "bas reads no hypernetworks"
        )
        raise InputError(f"{found[0]} is not a word of a prompt: leave it out; {flag}")
    if found := EMBEDDED.search(prompt):
        flag = f"add --embedding {found[1]}.safetensors"
        raise InputError(f"{found[0]} is not a word of a prompt: {flag}, and write the name of the file in < >")
    handles: dict[str, float] = {}
    for handle, number in STRENGTH.findall(prompt):
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= STRONGEST:
            raise InputError(f"({handle}:{number}): a strength is a number from 0 to {STRONGEST:g}")
        if handles.setdefault(handle, value) != value:
            raise InputError(f"{handle} has two strengths, {handles[handle]:g} and {value:g}")
    if nested := re.search(rf"\(\s*{STRENGTH.pattern}\s*\)", prompt):
        raise InputError(
            f"{nested[0]}: bas reads no nested strengths; write {nested[0].strip('( )')} in one pair of ( )"
        )
    plain = STRENGTH.sub(r"\1", prompt)
    if found := LOOKS_LIKE.search(plain):
        raise InputError(f"{found[0]}: a strength belongs to one handle alone, as (<asset0>:1.3)")
    parts = read_phrases(plain)
    for text, _ in parts:
        for piece in UNREAD.findall(text):
            if HANDLE.search(piece) and not re.fullmatch(rf"\(\s*{NAME}\s*\)", piece):
                raise InputError(f"{piece}: bas reads no such weight; write (<asset0>:1.3) with the handle in it")
    return Prompt(parts, handles)


def read_phrases(text: str) -> tuple[tuple[str, float], ...]:
    """Cut a text at its weighted phrases that stand in no other brackets.

    "a (red:1.4) ball" -> ("a", 1), ("red", 1.4), ("ball", 1)
    """
    parts, end = [], 0
    for found in PHRASE.finditer(text):
        before = text[: found.start()]
        if (
            float(found[2]) <= STRONGEST
            and before.count("(") == before.count(")")
            and before.count("[") == before.count("]")
        ):
            parts += [(text[end : found.start()], 1.0), (found[1], float(found[2]))]
            end = found.end()
    if not parts:
        return ((text, 1.0),)
    return tuple((part.strip(), strength) for part, strength in [*parts, (text[end:], 1.0)])


def unread_weights(prompt: str) -> list[str]:
    """Return the pieces of a prompt that look like weights of other tools and stay text."""
    return [piece for text, _ in read_prompt(prompt).parts for piece in UNREAD.findall(text)]


def encode_prompts(text_encoders: Sequence[TextEncoder], tokenizer: CLIPTokenizer, prompts: list[str]) -> Conditioning:
    """Encode prompts for the UNet, strengths applied. -> states (b, 77, d), on the text encoders' device"""
    read, device = [read_prompt(prompt) for prompt in prompts], text_encoders[0].device
    ids = tokenize(tokenizer, [prompt.text for prompt in read]).to(device)
    encoded = encode_ids(text_encoders, ids)
    if not any(prompt.has_strengths for prompt in read):
        return encoded
    empty = encode_ids(text_encoders, tokenize(tokenizer, [""]).to(device))
    rows = []
    for i, prompt in enumerate(read):
        row, one = ids[i : i + 1], encoded.each(lambda tensor, i=i: tensor[i : i + 1])
        rows.append(apply_strengths(text_encoders, row, one, empty, find_strengths(tokenizer, prompt, row)))
    return join(rows)


def encode_negative(models: Models, text: str, count: int) -> Conditioning:
    """Encode a negative prompt for `count` images. An empty one is zeros if the model was trained so."""
    encoded = encode_prompts(models.text_encoders, models.tokenizer, [text] * count)
    return encoded.each(torch.zeros_like) if models.zeros_for_empty and not text.strip() else encoded


def find_strengths(tokenizer: CLIPTokenizer, prompt: Prompt, ids: Tensor) -> list[tuple[Tensor, float]]:
    """Find the tokens of a prompt with a strength, as masks over its places, each with the strength. ids: (1, 77)"""
    changes = [
        (torch.isin(ids, torch.tensor(handle_ids(tokenizer, handle), device=ids.device)), value)
        for handle, value in prompt.handles.items()
    ]
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    for i, (_, strength) in enumerate(prompt.parts):
        if strength != 1:
            first, last = (count_tokens(tokenizer, Prompt(prompt.parts[:n], {}).text) for n in (i, i + 1))
            changes.append(((places > first) & (places <= last), strength))  # place 0 is the start token
    return changes


def count_tokens(tokenizer: CLIPTokenizer, text: str) -> int:
    """Return how many tokens a text takes, without the start and the end, of those that the model reads."""
    length = tokenizer.model_max_length
    (ids,) = tokenizer([expand_vectors(tokenizer, text)], truncation=True, max_length=length).input_ids
    return ids.index(tokenizer.eos_token_id) - 1


def apply_strengths(
    text_encoders: Sequence[TextEncoder],
    ids: Tensor,
    encoded: Conditioning,
    empty: Conditioning,
    changes: list[tuple[Tensor, float]],
) -> Conditioning:
    """Change one prompt by the strengths of masked tokens. ids, masks: (1, 77); encoded, empty: one row

    Tokens of strength 0 are removed first, together; the others are then changed one by one. A pooled text changes by
    the same rule as the states.
    """
    removed = torch.zeros_like(ids, dtype=torch.bool)
    for mask, strength in changes:
        if strength == 0:
            removed |= mask
    base = encode_without(text_encoders, ids, empty, removed) if removed.any() else encoded
    changed = base
    for mask, strength in changes:
        if strength not in (0, 1) and mask.any():
            without = encode_without(text_encoders, ids, empty, removed | mask)
            changed = changed.each(lambda c, b, w, s=strength: c + (s - 1) * (b - w), base, without)
    return changed


def encode_without(
    text_encoders: Sequence[TextEncoder], ids: Tensor, empty: Conditioning, gone: Tensor
) -> Conditioning:
    """Encode a prompt as if some tokens were not there, all others in their places. gone: (1, 77) bool"""
    encoded = encode_ids(text_encoders, ids, visible=(~gone).long())
    return encoded._replace(states=torch.where(gone[..., None], empty.states, encoded.states))
