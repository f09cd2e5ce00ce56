"""The miniature's tokenizer: byte-level BPE in CLIP's file format, learnt from the captions of its world."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.mini_world.captions import describe
from tools.mini_world.layouts import compose
from tools.train_mini.recipe import SEED, TEXT_LENGTH, Recipe


def byte_alphabet() -> list[str]:
    """One printable character for each byte, in the order of GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def learn_merges(words: Counter) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016), most frequent first, until each of the words is one symbol."""
    spellings = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while any(len(symbols) > 1 for symbols in spellings.values()):
        pairs = Counter()
        for word, symbols in spellings.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, symbols in spellings.items():
            merged, i = [], 0
            while i < len(symbols):
                together = symbols[i : i + 2] == best
                merged.append("".join(best) if together else symbols[i])
                i += 2 if together else 1
            spellings[word] = tuple(merged)
    return merges


def make_tokenizer(recipe: Recipe, run: Path, device: torch.device) -> None:
    """Write run/tokenizer in CLIP's format: every word of the captions is one token, any other text is bytes."""
    folder = run / "tokenizer"
    if (folder / "tokenizer_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    captions = (describe(compose(rng), rng) for _ in range(20_000))
    merges = learn_merges(Counter(word for caption in captions for word in caption.lower().split()))
    alphabet = byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "do_lower_case": True, **special}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Captions -> (b, 77) token ids, padded with <|endoftext|>."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
