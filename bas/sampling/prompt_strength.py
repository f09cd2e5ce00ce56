"""Prompts in which a handle has a strength: `a photo of (<asset0>:1.3) and <asset1>`, `(<asset1>:0)` to remove it.

A strength s says how much of what the handle does to the prompt's token states is kept: c = c0 + s (c1 - c0), where
c1 are the states with the handle and c0 those without it. c0 hides the handle from the tokens behind it, and where
the handle itself stands puts what an empty prompt has there. So 1 changes nothing, 0 removes every trace of the
handle while all other words stay in their places, and numbers above 1 go beyond what was learnt.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bas.errors import InputError
from bas.models.text import HANDLE, encode_ids, tokenize

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

STRONGEST = 5.0  # far beyond where pictures fall apart
STRENGTH = re.compile(rf"\(\s*({HANDLE.pattern})\s*:\s*([^()]*?)\s*\)")
LOOKS_LIKE = re.compile(rf"\([^()]*{HANDLE.pattern}[^()]*:[^()]*\)")


def bare_handles(prompt: str, handles: tuple[str, ...]) -> list[str]:
    """The handles of whose names a prompt holds the mere word, where it holds no handle at all."""
    if any(handle in prompt for handle in handles):
        return []
    words = set(re.findall(r"[\w-]+", prompt))
    return [handle for handle in handles if handle[1:-1] in words]


def read_strengths(prompt: str) -> tuple[str, dict[str, float]]:
    """A prompt without its strengths, and the strengths by handle.

    `a photo of (<toy>:1.3)` -> ("a photo of <toy>", {"<toy>": 1.3}). Raises InputError for a strength that is no
    number from 0 to 5, that holds more than one handle, or that contradicts another.
    """
    strengths: dict[str, float] = {}
    for handle, text in STRENGTH.findall(prompt):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= STRONGEST:
            raise InputError(f"({handle}:{text}): a strength is a number from 0 to {STRONGEST:g}")
        if strengths.setdefault(handle, value) != value:
            raise InputError(f"{handle} has two strengths, {strengths[handle]:g} and {value:g}")
    plain = STRENGTH.sub(r"\1", prompt)
    if found := LOOKS_LIKE.search(plain):
        raise InputError(f"{found[0]}: a strength belongs to one handle alone, as (<asset0>:1.3)")
    return plain, strengths


def encode_prompts(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token states of prompts, strengths applied. -> (b, 77, d) on the tower's device"""
    plain, strengths = zip(*(read_strengths(prompt) for prompt in prompts), strict=True)
    ids = tokenize(tokenizer, list(plain)).to(text_encoder.device)
    states = encode_ids(text_encoder, ids)
    if not any(strengths):
        return states
    empty = encode_ids(text_encoder, tokenize(tokenizer, [""]).to(text_encoder.device))
    rows = []
    for row, state, by_handle in zip(ids, states, strengths, strict=True):
        by_id = {tokenizer.convert_tokens_to_ids(handle): strength for handle, strength in by_handle.items()}
        rows.append(apply_strengths(text_encoder, row[None], state[None], empty, by_id))
    return torch.cat(rows)


def apply_strengths(
    text_encoder: CLIPTextModel, ids: Tensor, states: Tensor, empty: Tensor, strengths: dict[int, float]
) -> Tensor:
    """One prompt's states with strengths by token id. ids: (1, 77); states, empty: (1, 77, d) -> (1, 77, d)

    Handles of strength 0 are taken out first, together; the others are then changed one by one.
    """
    removed = [handle for handle, strength in strengths.items() if strength == 0]
    base = encode_without(text_encoder, ids, empty, removed) if removed else states
    changed = base
    for handle, strength in strengths.items():
        if strength not in (0, 1):
            without = encode_without(text_encoder, ids, empty, [*removed, handle])
            changed = changed + (strength - 1) * (base - without)
    return changed


def encode_without(text_encoder: CLIPTextModel, ids: Tensor, empty: Tensor, hidden: list[int]) -> Tensor:
    """Token states as if these tokens were not there, all others in their places. (1, 77) -> (1, 77, d)"""
    gone = torch.isin(ids, torch.tensor(hidden, device=ids.device))
    states = text_encoder(input_ids=ids, attention_mask=(~gone).long()).last_hidden_state
    return torch.where(gone[..., None], empty, states)
