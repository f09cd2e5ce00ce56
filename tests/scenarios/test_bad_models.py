"""Malformed model files, case by case and by the thousand: each is refused in one line, with little memory."""

import json
import os
import random
import re
import shutil
import sys
import tracemalloc
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bas
from bas.cli.entry import main
from bas.errors import LONGEST_MESSAGE, InputError
from bas.io.files import MAX_BYTES
from bas.io.tensors import MAX_TENSORS, read_tensors
from bas.pretrained.folder import load
from bas.pretrained.ldm_keys import CLIP, OPEN_CLIP, UNET, VAE
from bas.pretrained.single_file import save_single_file
from tests.helpers.families import TEXT_FILE, UNET_FILE, VAE_FILE, change_json, change_tensors, refusal, tiny
from tests.helpers.faults import opened, unprivileged

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
    assert refusal(path) == f"{path} holds {size} bytes, so it is not a model: copy or download it again"


HEADERS = {
    "longer than the file": (tensor_file("{}", claims=50), f"{DAMAGED} ("),
    "nothing but its length": (tensor_file("", claims=2), f"{DAMAGED} ("),
    "empty": (tensor_file(""), f"{DAMAGED} ("),
    "above the cap": (tensor_file("{}", claims=MAX_BYTES + 1), f"{DAMAGED} (its header claims 16.8 MB): "),
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
        f"{DAMAGED} ('a' appears twice): copy or download it again",
    ),
    "a field twice": (
        tensor_file('{"a": {"dtype": "I32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', BODY),
        f"{DAMAGED} ('dtype' appears twice): ",
    ),
    "metadata twice": (
        tensor_file(f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {json.dumps(ROW)}}}', BODY),
        f"{DAMAGED} ('__metadata__' appears twice): ",
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
    assert message == f"{path} holds 100000 tensors, more than any model: name another file"
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
        with path.open("r+b") as file:  # emptying a file first, as write_bytes does, makes some disks wait
            file.write(spoilt)
            file.truncate()
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


def test_twenty_thousand_mutated_headers_are_refused_or_read(tmp_path):
    with limited_memory(500_000_000):
        outcomes = refuse_or_read(tmp_path / "model.safetensors", 20_000)
    print(dict(outcomes))
    assert outcomes.total() == 20_000
    assert outcomes["refused"] > 10_000
    assert outcomes["read"] > 400


# --- Folders ------------------------------------------------------------------------------------------------------

UNET_JSON, VAE_JSON, TEXT_JSON = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
SCHEDULER_JSON, TOKENIZER_JSON = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (UNET_JSON, {"layers_per_block": 1000}, "layers_per_block is 1000: expected a whole number from 1 to 16"),
        (UNET_JSON, {"cross_attention_dim": 2**63}, "cross_attention_dim is 9223372036854775808: expected"),
        (UNET_JSON, {"sample_size": -1}, "sample_size is -1: expected"),
        (UNET_JSON, {"norm_num_groups": 0}, "norm_num_groups is 0: expected"),
        (UNET_JSON, {"attention_head_dim": 8.5}, "(the number of heads) is 8.5: expected"),
        (UNET_JSON, {"num_attention_heads": {}}, "(the number of heads) is {}: expected"),
        (UNET_JSON, {"in_channels": [4]}, "in_channels is (4,): expected"),
        (UNET_JSON, {"norm_eps": NAN}, "norm_eps is nan: expected a finite number"),
        (UNET_JSON, {"norm_eps": -1}, "norm_eps is -1: expected"),
        (UNET_JSON, {"freq_shift": INF}, "freq_shift is inf: expected"),
        (UNET_JSON, {"flip_sin_to_cos": "yes"}, "flip_sin_to_cos is 'yes': expected true or false"),
        (UNET_JSON, {"down_block_types": ["os.system"] * 3}, "down_block_types is ('os.system', 'os.system'"),
        (VAE_JSON, {"layers_per_block": 17}, "layers_per_block is 17: expected a whole number from 1 to 16"),
        (VAE_JSON, {"scaling_factor": NAN}, "scaling_factor is nan: expected"),
        (TEXT_JSON, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: expected"),
        (TEXT_JSON, {"vocab_size": True}, "vocab_size is True: expected"),
        (TEXT_JSON, {"layer_norm_eps": NAN}, "layer_norm_eps is nan: expected"),
        (TEXT_JSON, {"layer_norm_eps": None}, "layer_norm_eps is None: expected"),
        (TEXT_JSON, {"hidden_act": "os.system"}, "hidden_act is 'os.system': expected"),
        (SCHEDULER_JSON, {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000: expected"),
        (SCHEDULER_JSON, {"num_train_timesteps": True}, "num_train_timesteps is True: expected"),
        (SCHEDULER_JSON, {"steps_offset": 10**9}, "steps_offset is 1000000000: expected a whole number from 0 to 1000"),
        (SCHEDULER_JSON, {"steps_offset": 1.0}, "steps_offset is 1.0: expected a whole number"),
        (SCHEDULER_JSON, {"steps_offset": "x"}, "steps_offset is 'x': expected"),
        (SCHEDULER_JSON, {"set_alpha_to_one": "x"}, "set_alpha_to_one is 'x': expected true or false"),
        (SCHEDULER_JSON, {"beta_start": NAN}, "beta_start is nan: expected a finite number"),
        (TOKENIZER_JSON, {"model_max_length": -1}, "model_max_length is -1, expected a number from 3"),
        (TOKENIZER_JSON, {"model_max_length": NAN}, "model_max_length is nan, expected"),
        (TOKENIZER_JSON, {"model_max_length": "x"}, "model_max_length is 'x', expected"),
        (
            TOKENIZER_JSON,
            {"padding_side": "left"},
            "padding_side is 'left': bas needs a tokenizer that pads at the end",
        ),
        (TOKENIZER_JSON, {"gguf_file": "../x"}, "sets gguf_file: bas reads a tokenizer from its own folder alone"),
        (TOKENIZER_JSON, {"vocab": "/x", "merges": "/y"}, "sets merges: bas reads a tokenizer from"),
        (TOKENIZER_JSON, {"init_inputs": ["/x"]}, "sets init_inputs: bas reads a tokenizer from"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else re.sub(r"[^\w -]+", " ", value)[:40],
)
def test_absurd_settings_are_refused_before_anything_is_allocated(file, changes, reason, folder):
    change_json(folder / file, **changes)
    with little_memory(8_000_000):
        message = refusal(folder)
    assert message.startswith(f"{folder / file}")
    assert reason in message


@pytest.mark.parametrize("name", [["StableDiffusionPipeline"], None, 5])
def test_a_class_name_is_text(name, folder):
    change_json(folder / "model_index.json", _class_name=name)
    assert refusal(folder).startswith(f"{folder} has {name!r} as its _class_name: give a whole ")


def test_a_setting_that_stands_twice(folder):
    path = folder / UNET_JSON
    path.write_text(path.read_text().replace("{", '{"in_channels": 9,', 1))
    assert refusal(folder) == f"{path} is not valid JSON ('in_channels' appears twice): repair it, or copy it again"


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"])
def test_a_tokenizer_too_large_to_be_one(name, folder):
    with (folder / "tokenizer" / name).open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with little_memory(4_000_000):
        message = refusal(folder)
    assert message == f"{folder / 'tokenizer' / name} is larger than any configuration of a model: name another file"


def test_a_vocabulary_with_a_hole(folder):
    """As many tokens as rows, but one of them has the number of no row."""
    path = folder / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps(vocabulary | {next(iter(vocabulary)): 100_000}))
    assert refusal(folder) == (
        f"{path} gives {next(iter(vocabulary))!r} the number 100000: expected 0 to {len(vocabulary) - 1}, each once; "
        "copy or download it again"
    )


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
def test_weights_that_are_all_not_a_number(file, folder):
    change_tensors(folder / file, lambda tensors: [tensor.fill_(NAN) for tensor in tensors.values()])
    part, count = Path(file).parent.name, len(load_file(folder / file))
    message = refusal(folder)
    assert message.startswith(f"{folder} ({part}) holds broken weights ({count}): ")
    assert message.endswith(f"; and {count - 20} more")


@pytest.mark.parametrize("file", [UNET_FILE, UNET_JSON])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link"])
def test_what_is_no_file_in_a_folder(kind, file, folder):
    path = folder / file
    path.unlink()
    {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a link": lambda path: path.symlink_to("gone")}[kind](path)
    reason = "is a link to a file that is missing: download the model again"
    assert refusal(folder) == f"{path} {reason if kind == 'a link' else 'is not an ordinary file'}"


@pytest.mark.parametrize("file", [UNET_FILE, UNET_JSON, "model_index.json", "tokenizer/vocab.json"])
def test_a_file_that_may_not_be_read(file, saved, tmp_path_factory):
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("model") / "model"))
    with opened(folder):
        with unprivileged():
            load(folder)
        (folder / file).chmod(0)
        with unprivileged():
            message = refusal(folder)
    assert str(folder) in message
    assert "ermission denied" in message


# --- Single files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Sound single files of two families, not to be changed."""
    place = tmp_path_factory.mktemp("single")
    files = {family: place / f"{family}.safetensors" for family in ("sd1", "sd2")}
    for family, path in files.items():
        save_single_file(tiny(family, whole_vocabulary=True), path)
    return files


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (f"{UNET}input_blocks.0.0.weight", torch.zeros(4), f": {UNET}input_blocks.0.0.weight is [4], not a matrix"),
        (f"{UNET}out.2.weight", torch.zeros(()), f": {UNET}out.2.weight is [], not a matrix: it is damaged"),
        (f"{UNET}out.2.weight", torch.zeros(0, 32, 3, 3), " cannot be used: unet out_channels is 0: expected"),
        (
            f"{CLIP}text_model.embeddings.token_embedding.weight",
            torch.zeros(0, 64),
            " cannot be used: text encoder vocab_size is 0: expected",
        ),
        (
            f"{CLIP}text_model.embeddings.token_embedding.weight",
            torch.zeros(10, 64),
            ": the tokenizer has 49408 tokens, the text encoder 10 rows: they belong to different models",
        ),
        (f"{CLIP}text_model.encoder.layers.0.mlp.fc1.weight", torch.zeros(7, 64), " (text_encoder) does not hold the"),
    ],
)
def test_a_single_file_with_a_tensor_of_another_shape(name, value, reason, single, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(load_file(single["sd1"]) | {name: value}, path)
    assert refusal(path).startswith(f"{path}{reason}")


@pytest.mark.parametrize("digits", ["9" * 5000, "٣"])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{UNET}output_blocks.#.0", "unet"),
        (f"{VAE}encoder.down.#.block.0.conv1.weight", "vae"),
        (f"{CLIP}text_model.encoder.layers.#.mlp.fc1.weight", "text_encoder"),
        (f"{OPEN_CLIP}transformer.resblocks.#.mlp.c_fc.weight", "text_encoder"),
    ],
)
def test_numbers_in_names_of_tensors_are_those_of_layers(name, part, digits, single, tmp_path):
    """A name whose number is none of a layer's is unexpected, however long it is."""
    path = tmp_path / "model.safetensors"
    key = name.replace("#", digits)
    save_file(load_file(single["sd2"]) | {key: torch.zeros(1)}, path)
    message = refusal(path)
    assert message.startswith(f"{path} ({part}) does not hold the weights that its configuration describes (1): ")
    told = key.removeprefix(CLIP).removeprefix("text_model.")
    assert message.endswith(f"{told[-1000:]} is unexpected")
    assert len(message) <= LONGEST_MESSAGE + len(" ... ")


@pytest.mark.parametrize("name", ["../../x", "a\0b", "/etc/x", "x" * 5000])
def test_names_of_tensors_are_nothing_but_names(name, single, tmp_path):
    """What lies outside of the networks is left out: it makes no file and changes no weight."""
    path = tmp_path / "model.safetensors"
    save_file(load_file(single["sd1"]) | {name: torch.zeros(1)}, path)
    ours, expected = load(path), load(single["sd1"])
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(expected, part).state_dict()
        assert all(torch.equal(weights[key], tensor) for key, tensor in getattr(ours, part).state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


# --- What a file cannot make bas do -------------------------------------------------------------------------------

WATCHED: list[list] = []  # the innermost list takes every event; hooks cannot be taken away


def _note(event: str, args: tuple) -> None:
    if WATCHED:
        WATCHED[-1].append((event, args))


@pytest.fixture(scope="module")
def hook():
    sys.addaudithook(_note)


@contextmanager
def watched():
    """Everything that Python reports of the block: files opened, programs run, modules imported, pickles read."""
    WATCHED.append([])
    try:
        yield WATCHED[-1]
    finally:
        WATCHED.pop()


def assert_stayed_within(events: list, folder: Path) -> None:
    """Nothing was run, unpickled, written or connected to, and no data was read from outside the folder."""
    names = {event for event, _ in events}
    for forbidden in ("pickle.find_class", "socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.remove"):
        assert forbidden not in names
    code = {str(args[0].co_filename) for event, args in events if event == "exec"}
    assert not [name for name in code if name.startswith(str(folder))]
    own = tuple(map(str, (folder, sys.prefix, sys.base_prefix, Path(bas.__file__).parent, "/proc", "/sys")))
    files = (args for event, args in events if event == "open" and isinstance(args[0], (str, Path)))
    opened = [(os.fspath(path), flags) for path, _, flags in files]
    assert opened
    assert [path for path, _ in opened if not path.startswith(own)] == []
    assert [p for p, flags in opened if flags & (os.O_WRONLY | os.O_RDWR) and "__pycache__" not in p] == []


@pytest.mark.parametrize(
    "keys",
    [
        ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "added_tokens_file"),
        ("name_or_path", "subfolder", "cache_dir", "chat_template_file", "config_file"),
        ("gguf_file",),
        ("vocab", "merges"),
        ("tokenizer_object",),
    ],
    ids=lambda keys: keys[0],
)
def test_a_tokenizer_cannot_lead_out_of_its_folder(keys, hook, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("{}")
    change_json(folder / TOKENIZER_JSON, **dict.fromkeys(keys, str(elsewhere)))
    with watched() as events, suppress(InputError):
        load(folder)
    assert_stayed_within(events, folder)


def test_a_folder_full_of_traps_is_only_read(hook, folder, tmp_path):
    canary = tmp_path / "canary"
    for place in (folder, folder / "unet", folder / "text_encoder", folder / "tokenizer"):
        (place / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
        (place / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + bytes(canary) + b"'\ntR.")
    traps = {"auto_map": {"AutoModel": "modeling.Model"}, "_name_or_path": str(tmp_path), "architectures": ["os"]}
    change_json(folder / TEXT_JSON, **traps)
    change_json(folder / TOKENIZER_JSON, auto_map={"AutoTokenizer": ["modeling.T", None]}, tokenizer_class="modeling.T")
    change_json(folder / "model_index.json", safety_checker=["modeling", "Evil"], scheduler=["os", "system"])
    with watched() as events:
        assert load(folder).source == folder
    assert_stayed_within(events, folder)
    assert not canary.exists()
    assert "modeling" not in sys.modules


def test_a_single_file_is_only_read(hook, single):
    with watched() as events:
        load(single["sd1"])
    assert_stayed_within(events, single["sd1"].parent)


# --- The command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["header", "pipe", "pickle", "pointer", "shard", "absurd", "endless name"])
def test_the_command_says_it_in_one_line(kind, folder, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    contents = {
        "header": one(shape=[5]),
        "pickle": b"\x80\x02cos\nsystem\n.",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless name":
        path = "x" * 3000
    else:
        path = folder
        if kind == "absurd":
            change_json(folder / UNET_JSON, layers_per_block=10**9)
        else:
            (folder / UNET_FILE).unlink()
            (folder / f"{UNET_FILE}.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert main(["sample", str(path), "--prompt", "a bowl"]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("bas: ")
    assert str(path) in error
    assert error.count("\n") == 1
