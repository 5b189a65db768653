"""The ops ``torch.ops.fastclip.*``: schemas, fake kernels, autograd behaviour, and the compiled libraries.

Engines register their kernels for a device key; the compiled libraries do so when they are loaded here.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from . import _install

_SCHEMAS = (
    "norm_partial(Tensor[] tensors, float norm_type) -> Tensor",
    "tensor_norms(Tensor[] tensors, float norm_type) -> Tensor",
    "tensor_stats(Tensor[] tensors) -> Tensor",
    "scale_(Tensor(a!)[] tensors, Tensor clip_coef, *, bool zero=False) -> ()",
    "scale_each_(Tensor(a!)[] tensors, Tensor coefs) -> ()",
    "sanitize_(Tensor(a!)[] tensors) -> ()",
    "clamp_(Tensor(a!)[] tensors, float min, float max) -> ()",
    "clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, int nonfinite=0, Tensor(b!)? found_inf=None, "
    "Tensor? inv_scale=None, *, ScalarType? dtype=None) -> Tensor",
)
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of torch's total norm: the promotion of all gradients, real where they are complex."""
    dtype = functools.reduce(torch.promote_types, {t.dtype for t in tensors})
    return _REAL.get(dtype, dtype)


def _check_one_device(tensors: Sequence[Tensor]) -> None:
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"fastclip: expected tensors of one device, got {sorted(map(str, devices))}")


def _fake_norm_partial(tensors, norm_type):
    _check_one_device(tensors)
    return tensors[0].new_empty((), dtype=torch.float64)


def _fake_tensor_norms(tensors, norm_type):
    _check_one_device(tensors)
    return tensors[0].new_empty((len(tensors),), dtype=torch.float64)


def _fake_tensor_stats(tensors):
    _check_one_device(tensors)
    return tensors[0].new_empty((len(tensors), 4), dtype=torch.float64)


def _fake_scale_(tensors, clip_coef, *, zero=False):
    _check_one_device(tensors)


def _fake_sanitize_(tensors):
    _check_one_device(tensors)


def _fake_scale_each_(tensors, coefs):
    _check_one_device(tensors)


def _fake_clamp_(tensors, min, max):
    _check_one_device(tensors)


def _fake_clip_grad_norm_(grads, max_norm, norm_type, nonfinite=0, found_inf=None, inv_scale=None, *, dtype=None):
    _check_one_device(grads)
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise RuntimeError(f"fastclip: dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    return grads[0].new_empty((), dtype=dtype or promoted_dtype(grads))


def _check_not_inference(tensors: Sequence[Tensor]) -> None:
    if any(map(Tensor.is_inference, tensors)):
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")


_eval_frame = torch._C._dynamo.eval_frame
_SKIP = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.SKIP)


def _untraced(function: Callable) -> Callable:
    """Lets Dynamo leave a function, and what it calls, to Python; torch.compiler.disable would import Dynamo for it."""
    _eval_frame.set_code_exec_strategy(function.__code__, _SKIP)
    return function


def _bump_versions(op: torch._ops.OpOverload) -> Callable:
    names = [argument.name for argument in op._schema.arguments[1:]]
    found_inf = names.index("found_inf") if "found_inf" in names else len(names)

    @_untraced
    def kernel(keyset, tensors, *args, **kwargs):
        _check_not_inference(tensors)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, tensors, *args, **kwargs)
        torch.autograd.graph.increment_version(tensors)
        if len(args) > found_inf and args[found_inf] is not None:
            torch.autograd.graph.increment_version(args[found_inf])
        return result

    return kernel


def define(namespace: str) -> torch.library.Library:
    """Defines the ops in a namespace, with all that does not depend on the engine."""
    library = torch.library.Library(namespace, "DEF")
    for schema in _SCHEMAS:
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        name = schema.partition("(")[0]
        op = getattr(getattr(torch.ops, namespace), name).default
        torch.library.register_fake(f"{namespace}::{name}", globals()[f"_fake_{name}"], lib=library)
        # Nothing is recorded: torch's clip functions run under no_grad.
        library.impl(op, torch.library.fallthrough_kernel, "Autograd")
        if op._schema.is_mutable:
            library.impl(op, _bump_versions(op), "ADInplaceOrView", with_keyset=True)
    return library


library = define("fastclip")
norm_partial = torch.ops.fastclip.norm_partial.default
tensor_norms = torch.ops.fastclip.tensor_norms.default
tensor_stats = torch.ops.fastclip.tensor_stats.default
scale_ = torch.ops.fastclip.scale_.default
scale_each_ = torch.ops.fastclip.scale_each_.default
sanitize_ = torch.ops.fastclip.sanitize_.default
clamp_ = torch.ops.fastclip.clamp_.default
clip_grad_norm_ = torch.ops.fastclip.clip_grad_norm_.default


def _load(name: str, without: str) -> tuple[ctypes.CDLL | None, str | None]:
    """Loads a compiled library: (library, None), or (None, the reason why not)."""
    path = Path(__file__).with_name(name)
    if not path.exists():
        return None, _install.why_not_built(name, without)
    try:
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"{name} cannot be loaded: {error}"


def _load_cpu_library() -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = _load("libfastclip_cpu.so", "C++ compiler")
    if library is None:
        return None, reason
    library.fastclip_cpu_init.restype = library.fastclip_cpu_isa.restype = ctypes.c_char_p
    if error := library.fastclip_cpu_init():
        raise ValueError(error.decode())
    return library, None


def _driver_version() -> int:
    """1000 * major + 10 * minor of the CUDA that the driver serves, 0 without one; asking does not start the driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _load_cuda_library() -> tuple[ctypes.CDLL | None, str | None]:
    if torch.version.cuda is None:
        return None, "this torch was not built for CUDA"
    library, reason = _load("libfastclip_cuda.so", "NVRTC, or USE_CUDA=0,")
    if library is None:
        return None, reason
    for function in (library.fastclip_cuda_open_driver, library.fastclip_cuda_init, library.fastclip_cuda_unsupported):
        function.restype = ctypes.c_char_p
    if error := library.fastclip_cuda_open_driver(b"libcuda.so.1"):
        return None, error.decode()
    if error := library.fastclip_cuda_init(b"fastclip", b"CUDA"):
        raise RuntimeError(error.decode())
    return library, None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _dlpack_exchange() -> int | None:
    """The address of torch.Tensor's DLPack exchange table; None where its version is not the one we know."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    address = get_pointer(capsule, b"dlpack_exchange_api")
    return address if ctypes.c_uint32.from_address(address).value == 1 else None


# Without a GIL a list and its tensors could change while they are read.
_HAS_GIL = not sysconfig.get_config_var("Py_GIL_DISABLED")
_exchange = _dlpack_exchange() if _HAS_GIL else None


def builtins_of(library: ctypes.CDLL | None, name: str, *arguments: object) -> SimpleNamespace | None:
    """The builtins of a library, which C++ makes for this Python; None where lists cannot be read."""
    if library is None or _exchange is None:
        return None
    make = getattr(ctypes.PyDLL(library._name), f"fastclip_{name}_functions")
    make.argtypes, make.restype = (*[ctypes.py_object] * len(arguments), ctypes.c_void_p), ctypes.py_object
    return SimpleNamespace(**make(*arguments, _exchange))


cpu_library, cpu_unavailable = _load_cpu_library()
cuda_library, cuda_unavailable = _load_cuda_library()
# The device types whose ops a compiled library has registered.
compiled_for = frozenset(
    device for device, library in (("cpu", cpu_library), ("cuda", cuda_library)) if library is not None
)


cpu_engine = builtins_of(cpu_library, "cpu")
cuda_engine = builtins_of(cuda_library, "cuda")
_reader = builtins_of(cpu_library, "reader", torch._C.TensorBase, Tensor, torch.nn.Parameter)
if _reader:
    # A finalizer may give a tensor other memory: after a collection the addresses are compared.
    gc.callbacks.append(_reader.count_collection)
# read(list, gradients, writes, versions, cpu, cuda, dtensor, skip) -> (sections, shares) or None: csrc/reader.cpp. Who
# has no compiled engine does not ask it.
read: Callable[..., tuple[list, list] | None] = _reader and _reader.read  # type: ignore[assignment]
# units(list, kept, versions) -> (views, count, device) or None, in the same file.
units: Callable[..., tuple[object, int, int] | None] | None = _reader.units if _reader else None
# tables(list, chunk, slot_for_each_tensor, with_places, in_rounds) -> tables or None, likewise, for Triton.
tables: Callable[..., list | None] | None = _reader.tables if _reader else None


def cpu_isa() -> str | None:
    """The instruction set of the CPU kernels, "scalar", "avx2", "avx512" or "neon"; None without the library."""
    return None if cpu_library is None else cpu_library.fastclip_cpu_isa().decode()


_supported: set[int] = set()


def cuda_unsupported(device: int) -> str | None:
    """Why the CUDA kernels cannot run on a device; None where they can.

    A reason is asked for again at the next call: it may be one that passes, such as a device without free memory.
    """
    if device in _supported:
        return None
    if cuda_library is None:
        return cuda_unavailable
    if reason := cuda_library.fastclip_cuda_unsupported(device):
        return reason.decode().removeprefix("fastclip: ")
    _supported.add(device)
    return None
