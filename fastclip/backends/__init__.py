"""The engines. Each is a module with the same names, takes tensors of one device, and never waits for a device.

- ``NAME``, and ``unavailable() -> str | None``: the reason why it cannot run here.
- ``ENGINE``: the builtins of its compiled engine, which take what csrc/reader.cpp has read; None where it has none.
- ``DEVICE``, ``unsupported(index) -> str | None``: the device type of that engine, and why it cannot run on a device.
- ``refuses(tensor) -> str | None``: the reason why it cannot take this tensor.
- ``norm_partial(tensors, norm_type) -> Tensor``: 0-dim, wide: sum of ``|x|^p``, max, min, or the number of non-zero
  tensors; the norm before its root.
- ``total_norm(tensors, norm_type) -> Tensor``: 0-dim, wide: the norm, also of an order whose powers leave float64.
- ``tensor_norms(tensors, norm_type) -> Tensor``: (N,), wide: the total norm of each tensor alone.
- ``tensor_stats(tensors) -> Tensor``: (N, 4), wide: of each tensor ``sum |x|^2``, ``max |x|``, how many elements are
  not finite, and how many are 0. A NaN makes the first two NaN.
- ``scale_(tensors, clip_coef, *, zero)``: ``x *= clip_coef`` with a 0-dim wide coefficient on the tensors' device; with
  ``zero`` a coefficient of 0 makes zeros also of inf and NaN.
- ``scale_each_(tensors, coefs)``: ``x *= coefs[i]`` for tensor i, (N,), wide.
- ``sanitize_(tensors)``: ``x = 0`` where x is not finite.
- ``clamp_(tensors, min, max)``.
- ``clip_grad_norm_(grads, max_norm, norm_type, nonfinite, found_inf, inv_scale, *, dtype)``, or None: all of it in one
  call, with numbers on the tensors' device.
"""

from __future__ import annotations

from types import ModuleType

from . import cpu, cuda, eager, triton_

# In order of preference; eager takes whatever the others refuse.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cpu, cuda, triton_, eager)}
