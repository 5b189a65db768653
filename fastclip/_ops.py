"""The four ops ``torch.ops.fastclip.*``: schemas, fake kernels, autograd behaviour, and the compiled library.

Engines register their kernels for a device key; the compiled CPU library does so when it is loaded here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_SCHEMAS = (
    "norm_partial(Tensor[] tensors, float norm_type) -> Tensor",
    "scale_(Tensor(a!)[] tensors, Tensor clip_coef) -> ()",
    "clamp_(Tensor(a!)[] tensors, float min, float max) -> ()",
    "clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, *, ScalarType? dtype=None) -> Tensor",
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


def _fake_scale_(tensors, clip_coef):
    _check_one_device(tensors)


def _fake_clamp_(tensors, min, max):
    _check_one_device(tensors)


def _fake_clip_grad_norm_(grads, max_norm, norm_type, *, dtype=None):
    _check_one_device(grads)
    return grads[0].new_empty((), dtype=dtype or promoted_dtype(grads))


def _check_not_inference(tensors: Sequence[Tensor]) -> None:
    if any(map(Tensor.is_inference, tensors)):
        raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")


def write(op: torch._ops.OpOverload, tensors: list[Tensor], *args: object, **kwargs: object) -> Tensor | None:
    """Calls an op that writes to plain tensors, below autograd: what ``op`` does, without boxing the list twice."""
    if torch.is_inference_mode_enabled():
        return op(tensors, *args, **kwargs)
    _check_not_inference(tensors)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = op(tensors, *args, **kwargs)
    # torch bumps the versions of the tensors that its own kernels write; ours are ours to bump.
    torch.autograd.graph.increment_version(tensors)
    return result


def _bump_versions(op: torch._ops.OpOverload):
    def kernel(keyset, tensors, *args, **kwargs):
        _check_not_inference(tensors)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, tensors, *args, **kwargs)
        torch.autograd.graph.increment_version(tensors)
        return result

    return kernel


def define(namespace: str) -> torch.library.Library:
    """Defines the four ops in a namespace, with all that does not depend on the engine."""
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
scale_ = torch.ops.fastclip.scale_.default
clamp_ = torch.ops.fastclip.clamp_.default
clip_grad_norm_ = torch.ops.fastclip.clip_grad_norm_.default


def _load_cpu_library() -> tuple[ctypes.CDLL | None, str | None]:
    """Loads the compiled CPU kernels: (library, None), or (None, the reason why not)."""
    path = Path(__file__).with_name("libfastclip_cpu.so")
    if not path.exists():
        return None, f"{path.name} was not built (no C++ compiler at install time)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}"
    library.fastclip_cpu_init.restype = library.fastclip_cpu_isa.restype = ctypes.c_char_p
    if error := library.fastclip_cpu_init():
        raise ValueError(error.decode())
    return library, None


cpu_library, cpu_unavailable = _load_cpu_library()
# The device types whose ops a compiled library has registered.
compiled_for: frozenset[str] = frozenset() if cpu_unavailable else frozenset({"cpu"})


def cpu_isa() -> str | None:
    """The instruction set of the CPU kernels: "scalar", "avx2" or "avx512"; None without the compiled library."""
    return None if cpu_library is None else cpu_library.fastclip_cpu_isa().decode()
