"""The clips of TensorFlow, Keras, optax, Opacus and timm, in place on tensors.

They add no epsilon. What is within its bound keeps its bits, and the compiled kernels do not write it; what is above
becomes ``t * (bound / norm)``. The arithmetic says what a norm that is not finite does to its own unit: NaN makes the
unit NaN, infinity its finite entries 0 and its infinite ones NaN. Bounds that mean nothing are refused before a write.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor

from . import distributed, gradients
from .arithmetic import each_coef, indices, wide_dtype
from .backends import eager
from .clip import _check_norm_dtype, _to_float
from .gradients import units
from .gradients.plain import Plain
from .gradients.sharded import local_tensor

__all__ = [
    "clip_by_average_norm_",
    "clip_by_block_rms_",
    "clip_by_global_norm_",
    "clip_by_norm_",
    "clip_by_value_",
    "per_example_clip",
]


def clip_by_value_(tensors: Tensor | Iterable[Tensor | None], min: float | None, max: float | None) -> None:
    """Clips every element to ``[min, max]``, in place; NaN stays NaN. Writes only what changes.

    Args:
        tensors: a Tensor or an iterable of Tensors; None entries are skipped.
        min, max (float, optional): the bounds; None for no bound.

    Raises:
        TypeError, ValueError: a bound is NaN, a bool or no number, ``min > max``, or a bound overflows a dtype.

    Example:
        >>> import torch, fastclip
        >>> grad = torch.tensor([-3.0, 0.5, 4.0])
        >>> fastclip.functional.clip_by_value_(grad, -1.0, 2.0)
        >>> grad
        tensor([-1.0000,  0.5000,  2.0000])

    Follows ``tf.clip_by_value`` and ``optax.clip``, which return new tensors.
    """
    low = -math.inf if min is None else _to_number(min, "min")
    high = math.inf if max is None else _to_number(max, "max")
    if low > high:
        raise ValueError(f"min, max: expected min <= max, got min={min!r} and max={max!r}")
    tensors = _as_tensors(tensors)
    _check_floating(tensors)
    for name, bound in (("min", low), ("max", high)):
        for dtype in {tensor.dtype for tensor in tensors if tensor.is_floating_point()}:
            if math.isfinite(bound) and abs(bound) > torch.finfo(dtype).max:
                raise ValueError(f"{name}: {bound!r} overflows {dtype}")
    if tensors:
        read = _read(tensors, symmetric=low == -high)
        read.check_clamp(low, high)
        read.clamp_(low, high)


def clip_by_norm_(
    tensors: Tensor | Iterable[Tensor | None],
    max_norm: float,
    norm_type: float = 2.0,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor | list[Tensor]:
    """Clips each tensor by its own norm, in place.

    Args:
        tensors: a Tensor or an iterable of Tensors; None entries are skipped.
        max_norm (float): the bound of every norm.
        norm_type (float): p of the p-norm; ``inf`` for the largest magnitude.
        dim (int or tuple of them, optional): the dimensions that a norm runs over, so that every row, say, is clipped
            by itself. Rows that are runs of memory go through the compiled kernels, others through torch's ops.

    Returns:
        Tensor: (N,), the norms before clipping; with ``dim`` a list of them, which have the dimensions with size 1.

    Raises:
        TypeError, ValueError: ``max_norm`` is negative, NaN, a bool or no number; or a tensor is of integers.

    Example:
        >>> import torch, fastclip
        >>> grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.5])]
        >>> fastclip.functional.clip_by_norm_(grads, 1.0)
        tensor([5.0000, 0.5000])
        >>> grads
        [tensor([0.6000, 0.8000]), tensor([0.5000])]

    Follows ``tf.clip_by_norm`` and Keras' ``clipnorm``, which compute ``t * c / max(n, c)`` and so may change the last
    bit of what is within the bound.
    """
    max_norm, norm_type = _to_bound(max_norm, "max_norm"), _to_number(norm_type, "norm_type")
    tensors = _as_tensors(tensors)
    if dim is None:
        return _clip_each_(tensors, norm_type, max_norm)
    _check_units(tensors, "tensors[{}]")
    dims = [_to_dims(dim, tensor) for tensor in tensors]
    read = units.of(tensors, dims, writes=True) if tensors else []
    norms = units.clip_each_(read, norm_type, [max_norm] * len(read), 0.0)
    return [
        norm.to(tensor.real.dtype if tensor.is_complex() else tensor.dtype)
        for tensor, norm in zip(tensors, units.shaped(tensors, dims, read, norms), strict=True)
    ]


def clip_by_global_norm_(
    tensors: Tensor | Iterable[Tensor | None],
    max_norm: float,
    norm_type: float = 2.0,
    total_norm: Tensor | float | None = None,
) -> Tensor:
    """Clips all tensors together, in place, by the norm of all their elements.

    Args:
        tensors: a Tensor or an iterable of Tensors; None entries are skipped.
        max_norm (float): the bound.
        norm_type (float): p of the p-norm; ``inf`` for the largest magnitude.
        total_norm (Tensor or float, optional): the norm, 0-dim, where it is known already.

    Returns:
        Tensor: 0-dim norm before clipping.

    Raises:
        TypeError, ValueError: ``max_norm`` is negative, NaN, a bool or no number; or a tensor is of integers.

    Example:
        >>> import torch, fastclip
        >>> grads = [torch.tensor([3.0]), torch.tensor([4.0])]
        >>> fastclip.functional.clip_by_global_norm_(grads, 1.0)
        tensor(5.)
        >>> grads
        [tensor([0.6000]), tensor([0.8000])]

    Follows ``optax.clip_by_global_norm``, ``tf.clip_by_global_norm`` and Keras' ``global_clipnorm``. Of a norm that is
    not finite TensorFlow and Keras make every element NaN; here infinity makes finite entries 0, as in optax.
    :func:`fastclip.clip_grad_norm_` adds 1e-6 to the norm, as torch does.
    """
    max_norm, norm_type = _to_bound(max_norm, "max_norm"), _to_number(norm_type, "norm_type")
    if total_norm is not None and not isinstance(total_norm, Tensor):
        total_norm = torch.tensor(_to_bound(total_norm, "total_norm"), dtype=torch.float64, device="cpu")
    if total_norm is not None and (total_norm.dim() != 0 or total_norm.is_complex()):
        raise ValueError(f"total_norm: expected a 0-dim real Tensor, got {total_norm!r}")
    tensors = _as_tensors(tensors)
    read = _read(tensors)
    norm = read.total_norm(norm_type) if total_norm is None else distributed.full(total_norm)
    if tensors:
        read.scale_(each_coef(norm.detach().to(wide_dtype(norm.device)), max_norm))
    return read.finish(norm, None) if total_norm is None else total_norm


def clip_by_average_norm_(tensors: Tensor | Iterable[Tensor | None], max_norm: float) -> Tensor:
    """Clips each tensor, in place, by its 2-norm divided by its number of elements.

    Args:
        tensors: a Tensor or an iterable of Tensors; None entries are skipped.
        max_norm (float): the bound of every average.

    Returns:
        Tensor: (N,), the averages ``norm / numel`` before clipping, 0 of no elements.

    Raises:
        TypeError, ValueError: ``max_norm`` is negative, NaN, a bool or no number; or a tensor is of integers.

    Example:
        >>> import torch, fastclip
        >>> grad = torch.tensor([3.0, 4.0])
        >>> fastclip.functional.clip_by_average_norm_(grad, 0.5)
        tensor([2.5000])
        >>> grad
        tensor([0.6000, 0.8000])

    Follows ``tf.compat.v1.clip_by_average_norm``: the average is not the root of the mean square.
    """
    max_norm = _to_bound(max_norm, "max_norm")
    return _clip_each_(_as_tensors(tensors), 2.0, max_norm, float)


def clip_by_block_rms_(tensors: Tensor | Iterable[Tensor | None], threshold: float) -> Tensor:
    """Clips each tensor, in place, by the root of the mean of its squares.

    Args:
        tensors: a Tensor or an iterable of Tensors; None entries are skipped.
        threshold (float): the bound of every root mean square.

    Returns:
        Tensor: (N,), the root mean squares before clipping, 0 of no elements.

    Raises:
        TypeError, ValueError: ``threshold`` is negative, NaN, a bool or no number; or a tensor is of integers.

    Example:
        >>> import torch, fastclip
        >>> grad = torch.tensor([2.0, 2.0])
        >>> fastclip.functional.clip_by_block_rms_(grad, 1.0)
        tensor([2.])
        >>> grad
        tensor([1., 1.])

    Follows ``optax.clip_by_block_rms``.
    """
    threshold = _to_bound(threshold, "threshold")
    return _clip_each_(_as_tensors(tensors), 2.0, threshold, math.sqrt)


@torch.no_grad()
def per_example_clip(
    per_example_grads: Tensor | Iterable[Tensor | None], max_norm: float, *, per_layer: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Clips the gradient of every example by its norm, and adds up what is left: the step before noise is added.

    Args:
        per_example_grads: a Tensor or an iterable of Tensors of shape (batch, ...); None entries are skipped. They are
            read and stay as they are.
        max_norm (float): the bound of the norm of an example, over all tensors.
        per_layer (bool): bound each of the K tensors by itself instead, by ``max_norm / sqrt(K)``.

    Returns:
        tuple: a list of the clipped sums, without the dimension of examples; and how many examples were clipped, 0-dim,
        or (K,) per layer.

    Raises:
        TypeError, ValueError: ``max_norm`` is negative, NaN, a bool or no number; a tensor is of integers, has no
            dimension of examples or another number of them.

    Example:
        >>> import torch, fastclip
        >>> grads = [torch.tensor([[3.0, 4.0], [0.3, 0.4]])]
        >>> fastclip.functional.per_example_clip(grads, 1.0)
        ([tensor([0.9000, 1.2000])], tensor(1))

    Follows ``optax.per_example_global_norm_clip`` and ``per_example_layer_norm_clip``; Opacus adds 1e-6 to the norm.
    """
    max_norm = _to_bound(max_norm, "max_norm")
    tensors = _as_tensors(per_example_grads)
    _check_units(tensors, "per_example_grads[{}]")
    batches = {tuple(tensor.shape[:1]) for tensor in tensors}
    if len(batches) > 1 or () in batches:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"per_example_grads: expected one number of examples in the first dimension, got {shapes}")
    if not tensors:
        return [], torch.zeros(0 if per_layer else (), dtype=torch.int64)
    home, (batch,) = tensors[0].device, batches.pop()
    dims = [tuple(range(1, tensor.dim())) for tensor in tensors]
    read = units.of(tensors, dims, writes=False)
    if per_layer:
        max_norm = max_norm / math.sqrt(len(tensors))
    found = read[0].clipped_sums(max_norm, per_layer) if len(read) == 1 and isinstance(read[0], units.Units) else None
    if found is None:
        each_norms = units.shaped(tensors, dims, read, [each.norms(2.0) for each in read])
        norms = torch.stack([norm.reshape(-1).to(home) for norm in each_norms])
        norms = norms if per_layer else torch.linalg.vector_norm(norms, dim=0, keepdim=True)
        coefs = each_coef(norms, max_norm).expand(len(tensors), batch)
        found = [_weighted_sum(c, t) for c, t in zip(coefs, tensors, strict=True)], norms
    sums, norms = found
    clipped = (norms > max_norm).sum(1)
    return sums, clipped if per_layer else clipped[0]


def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    *,
    unit: str | Callable[[Tensor], int | tuple[int, ...] | None] = "output",
    exclude: Callable[[Tensor], bool] | None = None,
) -> None:
    """Clips the gradient of every unit, in place, to ``clip_factor`` of the norm of its weights.

    A unit whose gradient has a norm of ``clip_factor * max(weight norm, eps)`` or more is scaled to it. The CPU's
    kernels read weights and gradients once, and write what is clipped; a unit of more than 65,536 elements, or on a
    GPU, is read again to be scaled. Of DTensors all ranks have to call, with the same gradients.

    Args:
        parameters: a Tensor or an iterable of Tensors whose ``.grad`` is clipped.
        clip_factor (float): how large a gradient may be beside its weights.
        eps (float): the least norm of weights that is reckoned with, so that zeros can be left.
        norm_type (float): p of the p-norm.
        unit (str or callable): "output", for each index of the first dimension, and the whole tensor where it has one
            dimension or none; "tensor"; or a function from a parameter to the dimensions that its norms run over.
        exclude (callable, optional): true for a parameter that is left alone: the classifier's head.

    Raises:
        TypeError, ValueError: a number is negative, NaN, a bool or none; or ``unit`` is unknown.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> weight.grad = torch.tensor([[30.0, 40.0], [0.0, 0.001]])
        >>> fastclip.adaptive_clip_grad_(weight)
        >>> weight.grad
        tensor([[0.0300, 0.0400],
                [0.0000, 0.0010]])

    Follows ``timm.utils.agc.adaptive_clip_grad`` (Brock et al., arXiv:2102.06171), which leaves out the last two
    parameters for the head; optax has its units along the last dimension, where its weights have the outputs.
    """
    clip_factor, eps = _to_bound(clip_factor, "clip_factor"), _to_bound(eps, "eps")
    norm_type = _to_number(norm_type, "norm_type")
    if not callable(unit) and unit not in ("output", "tensor"):
        raise ValueError(f"unit: expected 'output', 'tensor' or a function, got {unit!r}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    chosen = [p for p in parameters if p.grad is not None and not (exclude is not None and exclude(p))]
    grads = [grad for p in chosen if (grad := p.grad) is not None]
    _check_units(grads, "parameters: gradient {}")
    if not chosen:
        return
    dims = [_unit_dims(unit, p) for p in chosen]
    written = units.of(grads, dims, writes=True)
    weights = units.of(chosen, dims, writes=False)
    if len(written) != len(weights):
        written = [each for one in zip(grads, dims, strict=True) for each in units.of([one[0]], [one[1]], True)]
        weights = [each for one in zip(chosen, dims, strict=True) for each in units.of([one[0]], [one[1]], False)]
    bounds = [each.norms(norm_type).clamp(min=eps) * clip_factor for each in weights]
    units.clip_each_(written, norm_type, bounds, 1e-6)


def get_tensor_norms(
    tensors: Tensor | Iterable[Tensor], norm_type: float = 2.0, *, norm_dtype: torch.dtype | None = None
) -> Tensor:
    """Computes the norm of each tensor, in one read of them all.

    Args:
        tensors: a Tensor or an iterable of Tensors (gradients, not parameters); None entries are skipped.
        norm_type (float): p of the p-norm; ``inf`` for the largest magnitude.
        norm_dtype (torch.dtype, optional): floating dtype of the norms. Default: the promotion of the tensors' dtypes.

    Returns:
        Tensor: (N,), in the order of the list, on the device of the first: of each what
        :func:`fastclip.get_total_norm` gives of it alone. For DTensors over all ranks, which all have to call.

    Raises:
        TypeError, ValueError: ``norm_type`` or ``norm_dtype`` is not of its kind, or a tensor is of integers.

    Example:
        >>> import torch, fastclip
        >>> fastclip.get_tensor_norms([torch.tensor([3.0, 4.0]), torch.tensor([-2.0])])
        tensor([5., 2.])

    Follows ``torch._foreach_norm``, which rounds in the dtype of each tensor, and for order 0 counts elements.
    """
    norm_type = _to_float(norm_type, "norm_type")
    _check_norm_dtype(norm_dtype)
    tensors = _as_tensors(tensors)
    read = _read(tensors, writes=False)
    norms = read.norms(norm_type)
    return read.finish(
        norms if (order := _order(read, tensors)) is None else norms[indices(order, norms.device)], norm_dtype
    )


# What the functions share.


def _clip_each_(
    tensors: Sequence[Tensor], norm_type: float, bound: float, divisor: Callable[[int], float] | None = None
) -> Tensor:
    """Scales each tensor whose norm, divided by what `divisor` says of its size, is above a bound; returns those."""
    read = _read(tensors)
    order = _order(read, tensors)
    divisors = None
    if divisor is not None:
        by = [divisor(max(tensor.numel(), 1)) for tensor in tensors]  # a DTensor has the size over all ranks
        if order is not None:
            by = [size for _, size in sorted(zip(order, by, strict=True))]
        divisors = torch.tensor(by, dtype=torch.float64, device="cpu")
    norms = read.clip_each_(norm_type, bound, divisors)
    return read.finish(norms if order is None else norms[indices(order, norms.device)], None)


def _order(read: gradients.Gradients, tensors: Sequence[Tensor]) -> list[int] | None:
    """Where each tensor of the list stands in what was read; None where that is the same."""
    if isinstance(read, Plain) or (len(read.tensors) == len(tensors) and all(map(operator.is_, read.tensors, tensors))):
        return None
    places: dict[int, list[int]] = {}
    for k, tensor in enumerate(read.tensors):
        places.setdefault(id(tensor), []).append(k)
    return [places[id(local_tensor(tensor))].pop(0) for tensor in tensors]


def _weighted_sum(coefs: Tensor, examples: Tensor) -> Tensor:
    """``sum_i coefs[i] * examples[i]``: in float32 of 16-bit floats, a block of columns at a time."""
    columns = examples.reshape(examples.shape[0], examples.shape[1:].numel())
    # A coefficient that float32 cannot hold is known on the CPU alone.
    tiny = coefs.device.type == "cpu" and not eager.is_ordinary(coefs)
    opmath = torch.float64 if tiny or columns.dtype in (torch.float64, torch.complex128) else torch.float32
    coefs = coefs.to(columns.device, torch.promote_types(opmath, columns.dtype))
    if coefs.dtype == columns.dtype:
        return torch.mv(columns.t(), coefs).reshape(examples.shape[1:])
    blocks = [torch.mv(block.to(coefs.dtype).t(), coefs).to(columns.dtype) for block in columns.split(1 << 16, dim=1)]
    return torch.cat(blocks).reshape(examples.shape[1:])


def _as_tensors(tensors: Tensor | Iterable[Tensor | None]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else [tensor for tensor in tensors if tensor is not None]


def _read(tensors: Sequence[Tensor], *, writes: bool = True, symmetric: bool = True) -> gradients.Gradients:
    """Reads tensors that are meant themselves. What the compiled engines take needs no second look."""
    try:
        read = gradients.of(tensors, gradients=False, writes=writes, symmetric=symmetric)
    except (AttributeError, RuntimeError):  # raised again, unless there is an error that says more
        _check_floating(tensors)
        raise
    if type(read) is not Plain:
        _check_floating(tensors)
    return read


def _check_floating(tensors: Sequence[Tensor], name: str = "tensors[{}]") -> None:
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name.format(i)}: expected a Tensor, got {tensor!r}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name.format(i)}: expected a floating-point or complex dtype, got {tensor.dtype}")


def _check_units(tensors: Sequence[Tensor], name: str) -> None:
    _check_floating(tensors, name)
    for i, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            raise TypeError(f"{name.format(i)}: expected a strided tensor, which has units, got {tensor.layout}")


def _to_number(value: SupportsFloat, argument: str) -> float:
    """A number that means one: no bool, no string, no NaN."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    if is_bool or isinstance(value, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    number = _to_float(value, argument)
    if math.isnan(number):
        raise ValueError(f"{argument}: expected a number, got {value!r}")
    return number


def _to_bound(value: SupportsFloat, argument: str) -> float:
    number = _to_number(value, argument)
    if number < 0:
        raise ValueError(f"{argument}: expected a number of at least 0, got {value!r}")
    return number


def _to_dims(dim: int | Iterable[int], tensor: Tensor) -> tuple[int, ...]:
    dims = list(dim) if isinstance(dim, Iterable) and not isinstance(dim, Tensor) else [dim]
    for each in dims:
        is_integer = isinstance(each, numbers.Integral) and not isinstance(each, bool)
        if not is_integer or not -tensor.dim() <= each < tensor.dim():
            raise ValueError(f"dim: {each!r} is no dimension of a tensor of shape {tuple(tensor.shape)}")
    return tuple(sorted({int(each) % tensor.dim() for each in dims}))


# All dimensions of a tensor, and all but the first.
_RANGES = [[tuple(range(first, dim)) for dim in range(65)] for first in (0, 1)]


def _unit_dims(unit: str | Callable, parameter: Tensor) -> tuple[int, ...]:
    if callable(unit):
        dims = unit(parameter)
        return tuple(range(parameter.dim())) if dims is None else _to_dims(dims, parameter)
    dim = parameter.dim()
    return _RANGES[1 if unit == "output" and dim > 1 else 0][dim]
