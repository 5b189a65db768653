"""A list sorted into sections, in one pass: by C++ (csrc/reader.cpp), or by Python what a trace or a transform made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .. import _dispatch, _ops
from ..distributed import dtensor_type
from .contract import PLAIN

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# Plain tensors, and what a trace puts in their place.
KNOWN = PLAIN | {FakeTensor, FunctionalTensor}
# Who watches: each is asked at every call.
_is_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
_in_inference_mode = torch.is_inference_mode_enabled
_has_function_modes = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_profiling = torch._C._autograd._profiler_enabled
# In the order of Reason in csrc/reader.cpp: why no compiled engine takes a tensor.
_REASONS = (
    None,
    "no compiled kernels for {0.device.type}",
    "layout {0.layout} on {0.device.type}",
    "dtype {0.dtype}",
    "elements that may share memory",
    "no memory",
    "inference tensor",
)


class Section(NamedTuple):
    """Tensors that have everything in common that matters; from C++ a plain tuple."""

    views: object  # for the engine of their device; None where no compiled engine takes them
    tensors: list[Tensor]
    device: int  # index of the GPU, -1 for the CPU
    dtypes: int  # a bit for each of plain.DTYPES that is there
    reason: int  # index into _REASONS
    share: int  # index into the shares, -1 for plain tensors


class Share(NamedTuple):
    """DTensors of one mesh, and of placements of the same types: sharded, replicated or partial alike."""

    mesh: DeviceMesh
    placements: tuple  # of one of them
    owner: DTensor  # one of them: a gradient, or the parameter of one that this rank does not have
    slots: list[DTensor | None]  # for each parameter its gradient


def why_refused(reason: int, tensor: Tensor) -> str | None:
    """The reason of a section in words, for one of its tensors."""
    text = _REASONS[reason]
    return text and text.format(tensor)


def _only_device_contexts() -> bool:
    """Whether all function modes are of torch.set_default_device and its like, which watch nothing."""
    for i in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:
            return False
    return True


def is_watched() -> bool:
    """Whether ops have to be seen: by a compiler, a transform, a mode, the profiler, forward-mode AD."""
    return (
        _is_compiling()
        or _transform() is not None
        or _is_tracing()
        or _dispatch_modes() > 0
        or _is_profiling()
        or forward_ad._current_level >= 0
        or (_has_function_modes() and not _only_device_contexts())
    )


def read(
    tensors: Sequence[Tensor], gradients: bool, writes: bool, skip: Sequence[bool] | None = None
) -> tuple[Sequence[Section], Sequence[Share]] | None:
    """Sorts tensors, or the gradients of parameters.

    Args:
        tensors: the list, which stays as it is.
        gradients: whether it is of parameters.
        writes: whether what is read will be written.
        skip: for each of the list, whether it is left out; a DTensor then keeps its empty slot.

    Returns:
        sections and shares; None where torch's own functions take the list, because a tensor is of a type that is not
        known here, or torch.jit traces.
    """
    if _is_compiling() or _transform() is not None:
        return _read_in_python(tensors, gradients, skip)
    if _is_tracing():
        return None  # torch.jit drops an op whose result nobody reads: torch's own functions are right under it
    cpu, cuda = _dispatch.compiled()
    if cpu is cuda:  # neither
        return _read_in_python(tensors, gradients, skip)
    versions = writes and not _in_inference_mode()
    dtensor = dtensor_type()
    arguments = (tensors, gradients, writes, versions, cpu is not None, cuda is not None, dtensor, skip)
    modes = _has_function_modes()
    watched = (
        _dispatch_modes() > 0
        or _is_profiling()
        or forward_ad._current_level >= 0
        or (modes and not _only_device_contexts())
    )
    if modes and not watched:
        # Under a DeviceContext each look at a tensor would go through Python.
        with torch._C.DisableTorchFunction():
            found = _ops.read(*arguments)
    elif dtensor is not None and tensors and type(tensors[0]) is dtensor:
        # Else torch asks each DTensor for its __torch_function__, which it does not have.
        with torch._C.DisableTorchFunctionSubclass():
            found = _ops.read(*arguments)
    else:
        found = _ops.read(*arguments)
    if found is None:
        return _read_in_python(tensors, gradients, skip)
    sections, shares = found
    if watched:
        # Ops take what was read, for all to see.
        sections = [Section(None, *section[1:]) for section in sections]
    return sections, [Share(*share) for share in shares] if shares else shares


def _read_in_python(
    tensors: Sequence[Tensor], gradients: bool, skip: Sequence[bool] | None
) -> tuple[list[Section], list[Share]] | None:
    # What a compiler traces is torch's to trace.
    dtensor = None if _is_compiling() else dtensor_type()
    lists: dict[int, list[Tensor]] = {}
    shares: list[Share] = []
    for i, given in enumerate(tensors):
        tensor: Tensor = given.grad if gradients else given  # type: ignore[assignment]  # None is missing
        missing = (skip is not None and skip[i]) or (gradients and tensor is None)
        speaks = given if missing else tensor
        share = -1
        if dtensor is not None and type(speaks) is dtensor:
            share = _find_share(shares, speaks)
            shares[share].slots.append(None if missing else speaks)
            if not missing:
                tensor = speaks._local_tensor
                tensor = tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor
        if missing:
            continue
        if type(tensor) not in KNOWN:
            return None
        lists.setdefault(share, []).append(tensor)
    return [Section(None, found, -1, 0, 0, share) for share, found in lists.items()], shares


def _find_share(shares: list[Share], owner: DTensor) -> int:
    mesh, placements = owner._spec.mesh, owner._spec.placements
    for i, share in enumerate(shares):
        if share.mesh is mesh and list(map(type, share.placements)) == list(map(type, placements)):
            return i
    shares.append(Share(mesh, placements, owner, []))
    return len(shares) - 1
