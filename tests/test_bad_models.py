"""Malformed model files, case by case and by the thousand: each is refused in one line, with little memory."""

import json
import os
import random
import re
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import refusal
from safetensors.torch import save_file

from bas.checkpoint import load
from bas.config import InputError
from bas.files import MAX_JSON_BYTES, MAX_TENSORS, read_tensors

DAMAGED = "is not a sound .safetensors file"
ROW = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
BODY = bytes(16)


def tensor_file(header: bytes | dict | str, body: bytes = b"", claims: int | None = None) -> bytes:
    """A .safetensors file with this header, which claims to be as long as it is, or another length."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text + body


def one(**changes) -> bytes:
    """A file of one tensor of four float32 zeros, but for these changes to its row of the header."""
    return tensor_file({"a": ROW | changes}, BODY)


def pair(second: list[int], length: int) -> bytes:
    """A file of two tensors of 8 bytes, the first at 0 and the second at these offsets."""
    half = {"dtype": "F32", "shape": [2]}
    return tensor_file({"a": half | {"data_offsets": [0, 8]}, "b": half | {"data_offsets": second}}, bytes(length))


@contextmanager
def little_memory(most: int):
    """The block must not make Python allocate more than `most` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# --- Headers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_a_header(size, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    assert refusal(path) == f"{path} holds {size} bytes, no model: copy or download it again"


HEADERS = {
    "longer than the file": (tensor_file("{}", claims=50), f"{DAMAGED} ("),
    "nothing but its length": (tensor_file("", claims=2), f"{DAMAGED} ("),
    "empty": (tensor_file(""), f"{DAMAGED} ("),
    "above the cap": (tensor_file("{}", claims=MAX_JSON_BYTES + 1), f"{DAMAGED} (its header claims 16.8 MB): "),
    "2^63": (tensor_file("{}", claims=2**63), f"{DAMAGED} (its header claims 9223372.0 TB): "),
    "2^64-1": (b"\xff" * 64, f"{DAMAGED} (its header claims 18446744.1 TB): "),
    "not UTF-8": (tensor_file(b'{"\xff": 1}'), f"{DAMAGED} ('utf-8' codec can't decode"),
    "not JSON": (tensor_file("{model}"), f"{DAMAGED} (Expecting property name"),
    "a list": (tensor_file("[]"), f"{DAMAGED} ("),
    "a number": (tensor_file("7"), f"{DAMAGED} ("),
    "no tensors": (tensor_file("{}"), "holds no tensors: give a whole"),
    "deep nesting of objects": (tensor_file('{"a":' * 100_000), f"{DAMAGED} (maximum recursion depth"),
    "deep nesting of lists": (tensor_file('{"a":' + "[" * 100_000), f"{DAMAGED} (maximum recursion depth"),
    "a name twice": (
        tensor_file(f'{{"a": {json.dumps(ROW)}, "a": {json.dumps(ROW)}}}', BODY),
        f"{DAMAGED} ('a' stands twice): copy or download it again",
    ),
    "a field twice": (
        tensor_file('{"a": {"dtype": "I32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', BODY),
        f"{DAMAGED} ('dtype' stands twice): ",
    ),
    "metadata twice": (
        tensor_file(f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {json.dumps(ROW)}}}', BODY),
        f"{DAMAGED} ('__metadata__' stands twice): ",
    ),
    "metadata of numbers": (tensor_file({"__metadata__": {"a": 1}, "a": ROW}, BODY), "invalid type: integer `1`"),
    "metadata that is a list": (tensor_file({"__metadata__": ["a"], "a": ROW}, BODY), "invalid type: sequence"),
    "metadata that is text": (tensor_file({"__metadata__": "a", "a": ROW}, BODY), "invalid type: string"),
    "a tensor that is a number": (tensor_file({"a": 1}), f"{DAMAGED} ("),
    "a tensor without a shape": (
        tensor_file({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, BODY),
        "missing field `shape`",
    ),
    "begin after end": (one(data_offsets=[16, 0]), "invalid offset for tensor `a`"),
    "overlap": (pair([4, 12], 12), "invalid offset for tensor `b`"),
    "a hole": (pair([12, 20], 20), "invalid offset for tensor `b`"),
    "past the end": (one(shape=[2**38], data_offsets=[0, 2**40]), "file not fully covered"),
    "a truncated body": (one()[:-1], "file not fully covered"),
    "a tail": (one() + b"\0", "file not fully covered"),
    "three offsets": (one(data_offsets=[0, 8, 16]), f"{DAMAGED} ("),
    "a negative offset": (one(data_offsets=[-16, 0]), "expected usize"),
    "shape x type below the bytes": (one(shape=[3]), "invalid shape, data type, or offset for tensor"),
    "shape x type above the bytes": (one(shape=[5]), "invalid shape, data type, or offset for tensor"),
    "a type of another width": (one(dtype="F64"), "invalid shape, data type, or offset for tensor"),
    "a size beyond 64 bits": (one(shape=[2**32] * 3), "overflow computing buffer size"),
    "a size that wraps to 0": (one(shape=[2**63, 2], data_offsets=[0, 0]), "overflow computing buffer size"),
    "a negative side": (one(shape=[-4]), "integer `-4`, expected usize"),
    "a side of 2^64": (one(shape=[2**64]), "expected usize"),
    "a side with a fraction": (one(shape=[4.5]), "expected usize"),
    "an unknown type": (one(dtype="F33"), "unknown variant `F33`"),
    "a type without PyTorch's": (
        tensor_file({"a": {"dtype": "F6_E2M3", "shape": [4, 4], "data_offsets": [0, 12]}}, bytes(12)),
        "Dtype not understood: F6_E2M3",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_refused_with_its_reason(case, tmp_path):
    content, reason = HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with little_memory(4_000_000):
        message = refusal(path)
    assert message.startswith(f"{path} ")
    assert reason in message


def test_a_hundred_thousand_tensors_are_too_many(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    path.write_bytes(tensor_file(header))
    with little_memory(150_000_000):
        message = refusal(path)
    assert message == f"{path} holds 100000 tensors, more than any model: it belongs to something else"
    path.write_bytes(tensor_file(dict(list(header.items())[:MAX_TENSORS])))
    assert len(read_tensors(path)[0]) == MAX_TENSORS


def test_a_large_header_is_not_even_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(tensor_file("{", claims=99_000_000))
        file.truncate(100_000_000)
    with little_memory(1_000_000):
        assert refusal(path).startswith(f"{path} {DAMAGED} (its header claims 99.0 MB): ")


# --- Headers by the thousand --------------------------------------------------------------------------------------

NUMBERS = (0, 1, 3, 8, 255, 2**24, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64, 10**30)


def mutated(text: bytes, body: bytes, rng: random.Random) -> bytes:
    """A file spoilt in one of four ways: bytes, a number, two strings swapped, or its end."""
    kind = rng.randrange(4)
    if kind == 0:
        spoilt = bytearray(tensor_file(text, body))
        for _ in range(rng.randint(1, 4)):
            spoilt[rng.randrange(8 + len(text))] = rng.choice([rng.randrange(256), *b'{}[]":,0123456789'])
        return bytes(spoilt)
    if kind == 1:
        number = rng.choice(list(re.finditer(rb"\d+", text)))
        value = rng.choice([*NUMBERS, int(number[0]) + 1, int(number[0]) - 1, -int(number[0])])
        return tensor_file(text[: number.start()] + str(value).encode() + text[number.end() :], body)
    if kind == 2:
        a, b = sorted(rng.sample(list(re.finditer(rb'"\w+"', text)), 2), key=re.Match.start)
        swapped = text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]
        return tensor_file(swapped, body)
    whole = tensor_file(text, body)
    return whole[: rng.randrange(len(whole))]


@contextmanager
def limited_memory(most: int):
    """While the block lasts, the whole process can take `most` further bytes; where the system has no such limit, any.

    A larger request fails at once instead of filling the machine.
    """
    resource = pytest.importorskip("resource", reason="only Unix limits the memory of a process")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("only Linux tells the address space in use")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refuse_or_read(path: Path, rounds: int) -> Counter:
    """Spoil a sound file at random, time and again: each is refused by name, or read as exactly what it holds."""
    save_file({"model.a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)}, path, {"format": "pt"})
    whole, rng, outcomes = path.read_bytes(), random.Random(0), Counter()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(rounds):
        spoilt = mutated(whole[8:begin], whole[begin:], rng)
        path.write_bytes(spoilt)
        try:
            tensors, metadata = read_tensors(path)
        except InputError as error:
            message = str(error)
            assert message.startswith(f"{path} ")
            assert "\n" not in message
            outcomes["refused"] += 1
            continue
        body = spoilt[8 + int.from_bytes(spoilt[:8], "little") :]
        parts = [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
        assert sum(map(len, parts)) == len(body)
        assert all(part in body for part in parts)
        assert all(isinstance(value, str) for value in metadata.values())
        with pytest.raises(InputError, match=re.escape(str(path))):
            load(path)
        outcomes["read"] += 1
    return outcomes


@pytest.mark.parametrize("rounds", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_headers_are_refused_or_read(rounds, tmp_path):
    with limited_memory(500_000_000):
        outcomes = refuse_or_read(tmp_path / "model.safetensors", rounds)
    print(dict(outcomes))
    assert outcomes.total() == rounds
    assert outcomes["refused"] > rounds // 2
    assert outcomes["read"] > rounds // 50
