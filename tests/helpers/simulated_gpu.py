"""A GPU that is simulated on the CPU: import this module, and "gpu" is a device that PyTorch computes on.

Its tensors hold their numbers in the host's memory, but refuse what CUDA's refuse: to meet tensors of the CPU in one
operation, to be drawn by the CPU's generator, to be read by numpy. So programs run on it, with results, on machines
that have no GPU, and whatever they leave on the wrong device ends them. Speed, memory, streams, autocast and CUDA's own
kernels are not simulated. Once imported it is there for the whole process: tests use it in processes of its own.

    python -m tests.helpers.simulated_gpu '[["train", "SCENE", "--device", "gpu"], ["sample", ...]]'     commands of bas
"""

import json
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils import backend_registration as backend

COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_")  # go from one device to another
INDEXED = (
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_unsafe_index",
)  # at places told by the CPU, too


class Module(backend._DummyBackendModule):
    """What `torch.gpu` would be."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Precisions of autocast."""
        return [torch.float16, torch.bfloat16]


backend._setup_privateuseone_for_python_backend("gpu", Module())
DEVICE = torch.device("gpu", 0)
NESTED = (tuple, list, dict)


class OnGPU(Tensor):
    """A tensor of the simulated GPU, whose numbers are those of `held`, a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Tensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **layout)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """The same numbers without their history."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        Tensor.data.__set__(self, other)
        self.held = other.held

    def tolist(self) -> list:
        """The numbers, by way of the CPU: PyTorch has this for its own tensors alone, as the next two."""
        return self.held.tolist()

    def __format__(self, form: str) -> str:
        return format(self.held, form)

    def __repr__(self) -> str:
        return f"on {DEVICE}: {self.held}"


def leaves(value, found: list | None = None) -> list:
    """What tuples, lists and dictionaries hold. PyTorch's own way for any structure takes many times as long."""
    found = [] if found is None else found
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, NESTED):
            leaves(item, found)
        else:
            found.append(item)
    return found


def replaced(value, kind: type, make: Callable):
    """The same structure, with `make(x)` for every x of this kind."""
    if isinstance(value, kind):
        return make(value)
    if not isinstance(value, NESTED):
        return value
    if isinstance(value, dict):
        return {key: replaced(item, kind, make) for key, item in value.items()}
    return type(value)([replaced(item, kind, make) for item in value])


@cache
def name_of(operation) -> tuple[str, bool]:
    """An operation's name without its form, and whether it is made of others."""
    name = operation.name()
    return name.split(".")[0], torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def compute(operation, args: tuple, kwargs: dict):
    """What an operation on tensors of the GPU gives. Raises RuntimeError for what CUDA would refuse."""
    name, composite = name_of(operation)
    if composite:
        return operation.decompose(*args, **kwargs)  # in inference mode nobody took it apart before
    given = leaves((args, kwargs))
    refuse_mixture(name, args, kwargs, given)
    ours = {id(x.held): x for x in given if isinstance(x, OnGPU)}

    def wrap(x: Tensor) -> Tensor:
        with torch.inference_mode(False):  # PyTorch would take a wrapper of its own making for a view otherwise
            tensor = ours[id(x)] if id(x) in ours else OnGPU(x)  # what was changed in place stays itself
        if tensor.shape != x.shape:
            raise NotImplementedError(f"{name} changes the size of a tensor, which this simulation does not know")
        return tensor

    device = kwargs.get("device")
    stays = device is None or torch.device(device).type == DEVICE.type
    if device is not None:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = replaced((args, kwargs), OnGPU, lambda x: x.held)
    result = operation(*args, **kwargs)
    return replaced(result, Tensor, wrap) if stays else result


def refuse_mixture(name: str, args: tuple, kwargs: dict, given: list) -> None:
    """RuntimeError for tensors of both devices, but for copies, single numbers and places, and for CPU generators.

    given: the leaves of both.
    """
    met = leaves((args[:1] + args[2:], kwargs)) if name in INDEXED else given
    others = [x for x in met if isinstance(x, Tensor) and not isinstance(x, OnGPU) and x.dim()]
    if others and name not in COPIES:
        raise RuntimeError(f"{name}: tensors of {DEVICE} and of the CPU, {tuple(others[0].shape)}, meet")
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Generator) and x.device.type != DEVICE.type:
            raise RuntimeError(f"{name}: the generator is of the CPU, the tensor of {DEVICE}")


def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    """`torch.empty` on the GPU."""
    return OnGPU(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    """`torch.empty_strided` on the GPU."""
    return OnGPU(torch.empty_strided(size, stride, dtype=dtype))


def arange(*bounds, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    """`torch.arange` on the GPU, which else resizes an empty tensor."""
    return OnGPU(torch.arange(*bounds, dtype=dtype))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """How `torch.tensor` brings its numbers to the GPU."""
    target.held.copy_(source)
    return target


MAKERS = torch.library.Library("aten", "IMPL")  # all other ways to make a tensor end at these
MAKERS.impl("empty.memory_format", empty, "PrivateUse1")
MAKERS.impl("empty_strided", empty_strided, "PrivateUse1")
for form in ("arange", "arange.start", "arange.start_step"):
    MAKERS.impl(form, arange, "PrivateUse1")
MAKERS.impl("_copy_from", copy_from, "PrivateUse1")
FALLBACK = torch.library.Library("_", "IMPL")
FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def main() -> None:
    """Run the commands one after another; the first that fails ends them with its exit code."""
    from bas.cli.entry import main as bas_main

    for words in json.loads(sys.argv[1]):
        if code := bas_main(words):
            sys.exit(code)


if __name__ == "__main__":
    main()
