"""The short way in for plain tensors: their list is read once, in C++ (csrc/plan.cpp), and no op is dispatched."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _dispatch, _ops

# In the order of Dtype in csrc/clip.h.
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# In the order of struct Python in csrc/plan.cpp.
_FUNCTIONS = (
    "PyList_Size",
    "PyList_GetItem",
    "PyList_Append",
    "PyObject_GetAttr",
    "Py_DecRef",
    "PyErr_Clear",
)
_OBJECTS = (Tensor, torch.nn.Parameter, None, sys.intern("grad"), sys.intern("_version"))


def _load() -> tuple[ctypes.PyDLL, ctypes.CDLL] | None:
    """The library under two calling conventions, holding and releasing the GIL; None where the way is closed."""
    library = _ops.cpu_library
    # Without a GIL the list and its tensors could change while they are read.
    if library is None or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _FUNCTIONS]
    python = (ctypes.c_void_p * (len(_FUNCTIONS) + len(_OBJECTS)))(*functions, *map(id, _OBJECTS))
    library.fastclip_plan_init.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.fastclip_plan_init.restype = ctypes.c_bool
    if not library.fastclip_plan_init(python, get_pointer(capsule, b"dlpack_exchange_api")):
        return None
    holding = ctypes.PyDLL(library._name)
    holding.fastclip_plan_new.argtypes = (ctypes.py_object, ctypes.c_bool, ctypes.py_object, ctypes.c_bool)
    holding.fastclip_plan_new.restype = ctypes.c_void_p
    for name, arguments in {
        "delete": (),
        "promoted_dtype": (),
        "gpu": (),
        "is_writable": (ctypes.c_double,),
        "total_norm": (ctypes.c_double, ctypes.c_void_p),
        "clip": (ctypes.c_double, ctypes.c_double),
        "clamp": (ctypes.c_double,),
    }.items():
        function = getattr(library, f"fastclip_plan_{name}")
        function.argtypes = (ctypes.c_void_p, *arguments)
        function.restype = {"delete": None, "promoted_dtype": ctypes.c_int, "gpu": ctypes.c_int}.get(
            name, ctypes.c_bool
        )
    if _ops.cuda_library is not None:
        declare_cuda(_ops.cuda_library)
    return holding, library


def declare_cuda(library: ctypes.CDLL) -> None:
    """Tells ctypes of the functions that pass over a plan on a GPU."""
    clip, clamp = library.fastclip_cuda_plan_clip_grad_norm, library.fastclip_cuda_plan_clamp
    clip.argtypes = (ctypes.c_void_p, ctypes.c_double, ctypes.c_double, ctypes.c_void_p, ctypes.c_int)
    clamp.argtypes = (ctypes.c_void_p, ctypes.c_double)
    clip.restype = clamp.restype = ctypes.c_char_p


_libraries = _load()


class Plan:
    """Views of plain tensors of one device, which it keeps alive."""

    def __init__(self, handle: int, tensors: Sequence[Tensor]) -> None:
        self._handle = handle
        self.tensors = tensors

    def __del__(self) -> None:
        _libraries[1].fastclip_plan_delete(self._handle)

    def promoted_dtype(self) -> torch.dtype:
        return _DTYPES[_libraries[1].fastclip_plan_promoted_dtype(self._handle)]

    def prepare_write(self, bound: float = 0.0) -> bool:
        """Whether every tensor can be written in place and can hold the bound; if so, autograd is told of the write."""
        if not _libraries[1].fastclip_plan_is_writable(self._handle, bound):
            return False
        if not torch.is_inference_mode_enabled():
            torch.autograd.graph.increment_version(self.tensors)
        return True


class CpuPlan(Plan):
    """Its numbers are Python's: the CPU has no one to wait for."""

    def total_norm(self, norm_type: float) -> float:
        result = ctypes.c_double()
        if not _libraries[1].fastclip_plan_total_norm(self._handle, norm_type, ctypes.byref(result)):
            raise RuntimeError("fastclip: the norm could not be computed")
        return result.value

    def clip_(self, total_norm: float, max_norm: float) -> None:
        """Multiplies by ``min(max_norm / (total_norm + 1e-6), 1)``."""
        _libraries[1].fastclip_plan_clip(self._handle, total_norm, max_norm)

    def clamp_(self, clip_value: float) -> None:
        """Clamps to ``[-clip_value, clip_value]``."""
        _libraries[1].fastclip_plan_clamp(self._handle, clip_value)


class GpuPlan(Plan):
    """Its numbers stay on the GPU."""

    library = _ops.cuda_library

    def clip_grad_norm_(self, max_norm: float, norm_type: float, norm_dtype: torch.dtype | None) -> Tensor:
        """As the op: the norm, and the tensors multiplied by ``min(max_norm / (total_norm + 1e-6), 1)``."""
        dtype = norm_dtype or self.promoted_dtype()
        norm = torch.empty((), dtype=dtype if dtype in _DTYPES else torch.float64, device=self.tensors[0].device)
        _raise_if(
            self.library.fastclip_cuda_plan_clip_grad_norm(
                self._handle, max_norm, norm_type, norm.data_ptr(), _DTYPES.index(norm.dtype)
            )
        )
        return norm.to(dtype)

    def clamp_(self, clip_value: float) -> None:
        """Clamps to ``[-clip_value, clip_value]``."""
        _raise_if(self.library.fastclip_cuda_plan_clamp(self._handle, clip_value))


def _raise_if(error: bytes | None) -> None:
    if error:
        raise RuntimeError(error.decode())


def _is_watched() -> bool:
    """Whether someone wants to see ops: a trace, a mode, a functorch transform, the profiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def of_tensors(tensors: list[Tensor]) -> CpuPlan | None:
    """A plan of CPU tensors; None where the compiled CPU kernels are not first choice, or not for all of them."""
    return _new(tensors, False, tensors, False)


def of_gradients(parameters: list[Tensor]) -> CpuPlan | GpuPlan | None:
    """A plan of the gradients that the parameters have; None where compiled kernels are not first choice for all."""
    return _new(parameters, True, [], _dispatch.is_first("cuda"))


def _new(tensors: list[Tensor], of_gradients: bool, planned: list[Tensor], gpus: bool) -> CpuPlan | GpuPlan | None:
    cpu = _dispatch.is_first("cpu")
    if _libraries is None or not (cpu or gpus) or _is_watched():
        return None
    handle = _libraries[0].fastclip_plan_new(tensors, of_gradients, planned, gpus)
    if not handle:
        return None
    gpu = _libraries[1].fastclip_plan_gpu(handle)
    plan = (CpuPlan if gpu < 0 else GpuPlan)(handle, planned)
    return plan if (cpu if gpu < 0 else _ops.cuda_unsupported(gpu) is None) else None
