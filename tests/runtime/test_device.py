"""What `auto` resolves to on each kind of machine, and what picking a GPU sets; stand-ins play the GPUs."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bas
from bas.cli.flags import Parser
from bas.cli.open_model import add_model, open_model
from bas.pretrained.loading import load_weights
from bas.runtime import device as machine
from bas.runtime.device import CPU_BF16_WEIGHTS, is_out_of_memory, pick_device, pick_precision
from tests.helpers.tiny import refused

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("has", "weights", "expected"),
    [
        ({"avx512_bf16": True}, CPU_BF16_WEIGHTS, "bf16"),
        ({"amx_bf16": True}, CPU_BF16_WEIGHTS, "bf16"),
        ({"avx512_bf16": True}, CPU_BF16_WEIGHTS - 1, "no"),
        ({"avx512_f": True}, CPU_BF16_WEIGHTS, "no"),
        ({}, CPU_BF16_WEIGHTS, "no"),
    ],
)
def test_auto_on_a_cpu_is_bf16_for_large_models_where_the_processor_has_it(monkeypatch, has, weights, expected):
    monkeypatch.setattr(machine.torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert pick_precision("auto", CPU, weights) == expected
    assert pick_precision("auto", CPU) == "no"


def test_an_older_pytorch_does_not_tell(monkeypatch):
    monkeypatch.delattr(machine.torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", CPU, CPU_BF16_WEIGHTS) == "no"


@pytest.fixture(params=[True, False])
def has_bf16(monkeypatch, request) -> bool:
    """Whether the GPU multiplies in bf16; else it emulates that."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: asked[-1] == GPU and (request.param or including_emulation),
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    machine.warn_of_emulation.cache_clear()
    return request.param


def test_auto_on_a_gpu_is_bf16_where_it_is_not_emulated(has_bf16):
    assert pick_precision("auto", GPU, 1) == ("bf16" if has_bf16 else "fp16")


def test_bf16_that_is_emulated_is_taken_with_one_warning(has_bf16, caplog):
    assert [pick_precision("bf16", GPU) for _ in range(3)] == ["bf16"] * 3
    warning = "cuda:1 (Tesla T4) only emulates bf16, slowly and in more memory than is counted: use fp16 there"
    assert [record.message for record in caplog.records] == ([] if has_bf16 else [warning])


@pytest.mark.parametrize("has", [{"avx512_bf16": True}, {"avx2": True}])
def test_bf16_that_the_processor_emulates_is_taken_with_one_warning_for_a_large_model(monkeypatch, has, caplog):
    monkeypatch.setattr(machine.torch.cpu, "get_capabilities", lambda: has, raising=False)
    machine.warn_of_emulation.cache_clear()
    assert [pick_precision("bf16", CPU, CPU_BF16_WEIGHTS - more) for more in (1, 0, 0)] == ["bf16"] * 3
    warning = "this processor only emulates bf16, many times slower than float32: leave bf16 to other machines"
    assert caplog.messages == ([] if "avx512_bf16" in has else [warning])
    machine.warn_of_emulation.cache_clear()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_memory_that_ran_out_is_known(error, told):
    """PyTorch's own allocator has a class for it; what else takes memory on a GPU only says so."""
    assert is_out_of_memory(error) == told


def test_what_is_asked_for_is_taken():
    assert [pick_precision(name, CPU, 1) for name in ("no", "fp16", "bf16")] == ["no", "fp16", "bf16"]


# --- The device -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "current", "picked"), [(None, 0, 0), ("cuda", 0, 0), ("cuda", 1, 1), ("cuda:0", 1, 0), ("cuda:1", 0, 1)]
)
def test_a_picked_gpu_is_the_current_one_and_exact(monkeypatch, name, current, picked):
    """Streams, events and Triton's kernels go to the current GPU; TF32 would round float32 to 10 bits."""
    chosen = []
    numbered = torch.device("cuda", current) if name in (None, "cuda") else torch.device(name)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: SimpleNamespace(device=numbered))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.matmul.allow_tf32 = True  # a monkeypatch cannot undo that one
    assert pick_device(name) == torch.device("cuda", picked)
    assert chosen == [torch.device("cuda", picked)]
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_without_a_gpu_the_cpu_is_picked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == CPU


def test_weights_go_to_the_gpu_of_the_thread_that_asks(monkeypatch):
    """`load_weights` converts in threads, each with a current GPU of its own: so the device has its number."""
    module, weight = nn.Linear(2, 1, bias=False, device="meta"), torch.ones(1, 2)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: SimpleNamespace(device=CPU))
    load_weights(module, {"weight": weight}, "a file", "cuda", torch.float32)
    assert torch.equal(module.weight, weight)


# --- The same machine for Python and for the commands -----------------------------------------------------------------


@pytest.mark.parametrize(("weights", "dtype"), [(1, torch.bfloat16), (10**12, torch.float32)])
def test_python_computes_as_the_command_does(monkeypatch, bench, weights, dtype):
    """bf16 pays from some number of weights on; a processor that has it is played."""
    monkeypatch.setattr(machine, "CPU_BF16_WEIGHTS", weights)
    monkeypatch.setattr(machine.torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    parser = Parser()
    add_model(parser)
    command = open_model(parser.parse_args([str(bench.model)]), lambda spec: None)
    python = bas.load(bench.model)
    assert python.unet.conv_in.weight.dtype == command.unet.conv_in.weight.dtype == dtype
    assert python.device == command.device == CPU


def test_what_python_asks_for_is_taken(monkeypatch, bench):
    monkeypatch.setattr(machine, "CPU_BF16_WEIGHTS", 1)
    monkeypatch.setattr(machine.torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for dtype in (torch.float32, torch.float16):
        assert bas.load(bench.model, device=CPU, dtype=dtype).unet.conv_in.weight.dtype == dtype
    with refused("--device nowhere cannot be used here"):
        bas.load(bench.model, device="nowhere")


def test_python_picks_the_gpu_and_turns_tf32_off_as_the_command_does(monkeypatch, bench):
    """Loading stops where a GPU would be needed."""
    asked, empty = [], torch.empty
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *a, **how: gpu if how.get("device") == "cuda" else empty(*a, **how))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(machine, "gpu_multiplies_bf16", lambda device: True)
    monkeypatch.setattr("bas.pretrained.folder.load", lambda *args: asked.append(args))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.matmul.allow_tf32 = True
    bas.load(bench.model)
    assert asked == [(bench.model, torch.device("cuda", 0), torch.bfloat16, None)]
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
