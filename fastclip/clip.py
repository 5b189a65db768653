"""What clipping means: torch's four functions, as in torch.nn.utils.clip_grad. Backends only compute."""

from __future__ import annotations

import contextlib
import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grad as _torch
from torch.utils._foreach_utils import _device_has_foreach_support

from . import _dispatch, _groups, _ops, _plan, distributed
from .backends import eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Bound at import, because patch() puts fastclip's functions in their place.
_torch_get_total_norm = _torch._get_total_norm
_torch_clip_grads_with_norm_ = _torch._clip_grads_with_norm_
_torch_clip_grad_value_ = _torch.clip_grad_value_


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None = None,
    is_duplicate: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Clips the norm of all gradients together, in place, and returns the norm that they had before.

    Every gradient is multiplied by ``min(max_norm / (total_norm + 1e-6), 1)``; where that is 1 nothing is written.
    The norm is accumulated in float64, and the coefficient is taken from it before it is rounded.

    Gradients that are DTensors, on any meshes and with any placements, count once over all ranks. Every rank of a mesh
    then has to call, with the same parameters in the same order, whichever of them have a gradient on it.

    Args:
        parameters: a Tensor or an iterable of Tensors, of any shapes, whose ``.grad`` is clipped. Gradients may be
            float32, float64, bfloat16 and float16 in any mix, complex, sparse COO, or DTensors.
        max_norm (float): the bound, in the unit of the gradients. Negative and non-finite values act as in torch.
        norm_type (float): p of the p-norm; ``inf`` for the largest magnitude.
        error_if_nonfinite (bool): raise if the total norm is not finite. This waits for the device.
        foreach (bool, optional): as in torch: True raises on a device without foreach support, else no effect.
        norm_dtype (torch.dtype, optional): floating dtype of the returned norm. Default: the promotion of the
            gradients' dtypes, as in torch.
        process_group (ProcessGroup or iterable of them, optional): ranks that hold other parts of the model, which
            DTensors do not tell: pipeline stages, Megatron's model-parallel ranks, shards of a flat buffer. What each
            rank (or its mesh) holds is added up over every group, in turn; all ranks of a group have to call.
        is_duplicate (callable, optional): true for a parameter that another rank of ``process_group`` counts, such as
            tied embeddings or replicated norms; its gradient is clipped, but not counted here.

    Returns:
        Tensor: 0-dim norm before clipping, on the device of the first gradient; ``tensor(0.)`` without gradients. A
        replicated DTensor where all gradients are DTensors on one mesh.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite; or a gradient cannot be written in place.
        TypeError, ValueError: ``max_norm``, ``norm_type`` or ``norm_dtype`` is not of its kind.
        Whatever is raised, no gradient has changed.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> fastclip.clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    Follows :func:`torch.nn.utils.clip_grad_norm_`; the method is that of Pascanu et al. (arXiv:1211.5063).
    """
    parameters = _as_list(parameters)
    norm_type = _to_float(norm_type, "norm_type")
    _check_norm_dtype(norm_dtype)
    plan = _plan.of_gradients(parameters)
    grads = (plan and plan.tensors) or _gradients(parameters)
    if spread := _spread(parameters, grads, plan, process_group, is_duplicate):
        if not error_if_nonfinite:
            max_norm = _to_float(max_norm, "max_norm")
        total_norm = _reduced_norm(spread.shards, norm_type, process_group)
        if error_if_nonfinite:
            _raise_if_nonfinite(total_norm, norm_type)
        _scale(spread.local, _clip_coef(total_norm, _to_float(max_norm, "max_norm")), foreach)
        return distributed.replicate(total_norm.to(norm_dtype or spread.dtype), spread)
    if not grads:
        _to_float(max_norm, "max_norm")
        return _norm_of_nothing(norm_dtype)
    if isinstance(plan, _plan.CpuPlan):
        total_norm = plan.total_norm(norm_type)
        if error_if_nonfinite:
            _raise_if_nonfinite(total_norm, norm_type)
        max_norm = _to_float(max_norm, "max_norm")
        if plan.prepare_write():
            plan.clip_(total_norm, max_norm)
            return _to_tensor(total_norm, norm_dtype or plan.promoted_dtype())
    if not error_if_nonfinite:
        max_norm = _to_float(max_norm, "max_norm")
        if isinstance(plan, _plan.GpuPlan) and plan.prepare_write():
            return plan.clip_grad_norm_(max_norm, norm_type, norm_dtype)
        if _may_be_one_call(grads, foreach):
            with contextlib.suppress(RuntimeError):  # raised before any write: the list needs the closer look below
                return _ops.write(_ops.clip_grad_norm_, grads, max_norm, norm_type, dtype=norm_dtype)
    if _needs_torch(grads):
        total_norm = _torch_get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
        _torch_clip_grads_with_norm_(parameters, _to_float(max_norm, "max_norm"), total_norm, foreach)
        return total_norm if norm_dtype is None else total_norm.to(norm_dtype)
    parts = _writable_parts(grads, foreach)
    if len(parts) == 1 and parts[0].backend.clip_grad_norm_ and not error_if_nonfinite:
        return parts[0].backend.clip_grad_norm_(grads, max_norm, norm_type, dtype=norm_dtype)
    total_norm = _total_norm(parts, norm_type)
    if error_if_nonfinite:
        _raise_if_nonfinite(total_norm, norm_type)
    _scale_parts(parts, _clip_coef(total_norm, _to_float(max_norm, "max_norm")))
    return total_norm.to(norm_dtype or _ops.promoted_dtype(grads))


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None = None,
    is_duplicate: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Computes the norm of all tensors together, as if they were one vector.

    Args:
        tensors: a Tensor or an iterable of Tensors, of any shapes (gradients, not parameters), of the dtypes of
            :func:`clip_grad_norm_`.
        norm_type (float): p of the p-norm; ``inf`` for the largest magnitude.
        error_if_nonfinite (bool): raise if the total norm is not finite. This waits for the device.
        foreach (bool, optional): as in :func:`clip_grad_norm_`.
        norm_dtype (torch.dtype, optional): floating dtype of the norm. Default: the promotion of the tensors' dtypes.
        process_group, is_duplicate (optional): as in :func:`clip_grad_norm_`; the predicate is asked about tensors.

    Returns:
        Tensor: 0-dim norm, on the device of the first tensor; ``tensor(0.)`` without tensors. A replicated DTensor
        where all tensors are DTensors on one mesh. Of DTensors every rank has to give its shards of the same list.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite.
        TypeError, ValueError: ``norm_type`` or ``norm_dtype`` is not of its kind.

    Example:
        >>> import torch, fastclip
        >>> fastclip.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)

    Follows :func:`torch.nn.utils.get_total_norm`.
    """
    tensors = _as_list(tensors, warn=False)
    norm_type = _to_float(norm_type, "norm_type")
    _check_norm_dtype(norm_dtype)
    plan = _plan.of_tensors(tensors)
    if spread := _spread(tensors, tensors, plan, process_group, is_duplicate):
        total_norm = _reduced_norm(spread.shards, norm_type, process_group)
        if error_if_nonfinite:
            _raise_if_nonfinite(total_norm, norm_type)
        return distributed.replicate(total_norm.to(norm_dtype or spread.dtype), spread)
    if not tensors:
        return _norm_of_nothing(norm_dtype)
    if plan:
        total_norm = plan.total_norm(norm_type)
        if error_if_nonfinite:
            _raise_if_nonfinite(total_norm, norm_type)
        return _to_tensor(total_norm, norm_dtype or plan.promoted_dtype())
    partial = _partial_in_one_call(tensors, norm_type, foreach)
    if partial is None and _needs_torch(tensors):
        total_norm = _torch_get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
        return total_norm if norm_dtype is None else total_norm.to(norm_dtype)
    if partial is None:
        parts = _groups.split(tensors)
        _check_foreach(parts, foreach)
        total_norm = _total_norm(parts, norm_type)
    else:
        total_norm = _root(partial, norm_type)
    if error_if_nonfinite:
        _raise_if_nonfinite(total_norm, norm_type)
    return total_norm.to(norm_dtype or _ops.promoted_dtype(tensors))


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Clips the gradients, in place, by a norm that is already known.

    Every gradient is multiplied by ``min(max_norm / (total_norm + 1e-6), 1)``; where that is 1 nothing is written.

    Args:
        parameters: a Tensor or an iterable of Tensors, of any shapes, whose ``.grad`` is clipped.
        max_norm (float): the bound, in the unit of the gradients.
        total_norm (Tensor): 0-dim norm, of any real dtype and on any device.
        foreach (bool, optional): as in :func:`clip_grad_norm_`.

    Raises:
        TypeError, ValueError: ``max_norm`` is not a number, ``total_norm`` not a Tensor.
        RuntimeError: a gradient cannot be written in place.
        Whatever is raised, no gradient has changed.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> total_norm = fastclip.get_total_norm([weight.grad])
        >>> fastclip.clip_grads_with_norm_([weight], 1.0, total_norm)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    Follows :func:`torch.nn.utils.clip_grads_with_norm_`.
    """
    parameters = _as_list(parameters, warn=False)
    max_norm = _to_float(max_norm, "max_norm")
    plan = _plan.of_gradients(parameters)
    grads = (plan and plan.tensors) or _gradients(parameters)
    if not grads:
        return
    if not isinstance(total_norm, Tensor):
        raise TypeError(f"total_norm: expected a Tensor, got {total_norm!r}")
    grads, total_norm = _local(grads), distributed.full(total_norm)
    if total_norm.dim() != 0 or total_norm.is_complex() or _needs_torch([*grads, total_norm]):
        _torch_clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
        return
    if isinstance(plan, _plan.CpuPlan) and total_norm.device.type == "cpu" and plan.prepare_write():
        plan.clip_(float(total_norm.detach()), max_norm)
        return
    clip_coef = _clip_coef(total_norm.detach().to(eager.wide_dtype(total_norm)), max_norm)
    _scale(grads, clip_coef, foreach)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    """Clips every element of every gradient to ``[-clip_value, clip_value]``, in place; NaN stays NaN.

    One pass over the gradients, which writes only what it changes.

    Args:
        parameters: a Tensor or an iterable of Tensors, of any shapes, whose ``.grad`` is clipped.
        clip_value (float): the bound, in the unit of the gradients; a negative one sets every element to it, as in
            torch.
        foreach (bool, optional): as in :func:`clip_grad_norm_`.

    Raises:
        TypeError, ValueError: ``clip_value`` is not a number.
        RuntimeError: ``clip_value`` overflows the dtype of a gradient, or a gradient cannot be written in place.
        NotImplementedError: a gradient is complex.
        Whatever is raised, no gradient has changed.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([-3.0, 0.5, 4.0])
        >>> fastclip.clip_grad_value_([weight], clip_value=1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000,  1.0000])

    Follows :func:`torch.nn.utils.clip_grad_value_`.
    """
    clip_value = _to_float(clip_value, "clip_value")
    parameters = _as_list(parameters, warn=False)
    plan = _plan.of_gradients(parameters)
    grads = (plan and plan.tensors) or _gradients(parameters)
    if not grads:
        return
    # A plan does not see the negative bit, under which only symmetric bounds mean the same.
    if plan and clip_value >= 0 and plan.prepare_write(clip_value):
        plan.clamp_(clip_value)
        return
    if distributed.partial_placement_in(grads):
        raise RuntimeError("clip_value: a gradient with Partial placements has no values yet; redistribute it first")
    grads = _local(grads)
    if _may_be_one_call(grads, foreach):
        with contextlib.suppress(RuntimeError):  # raised before any write: the list needs the closer look below
            return _ops.write(_ops.clamp_, grads, -clip_value, clip_value)
    if _needs_torch(grads):
        _torch_clip_grad_value_(parameters, clip_value, foreach)
        return
    parts = _writable_parts(grads, foreach)
    _check_clip_value(grads, clip_value)
    for part in parts:
        part.backend.clamp_(part.tensors, -clip_value, clip_value)


def why(parameters: Tensor | Iterable[Tensor]) -> list[_groups.Group]:
    """Tells which backend clips which gradients, and why not a faster one.

    Args:
        parameters: a Tensor or an iterable of Tensors, as for :func:`clip_grad_norm_`.

    Returns:
        list: one Group for each backend and device, with its ``reason``; printed, each is a readable line.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        >>> weight.grad = torch.zeros(2, dtype=torch.complex64)
        >>> fastclip.why([weight])[0].backend
        'eager'
    """
    grads = _gradients(_as_list(parameters, warn=False))
    if not grads:
        return []
    grads = _local(grads)
    if odd := _groups.odd_type(grads):
        reason = f"{odd.__name__} is a tensor subclass: torch's own functions take the whole list"
        return [_groups.describe(eager, grads, reason)]
    return [_groups.describe(*part) for part in _groups.split(grads)]


def _as_list(parameters: Tensor | Iterable[Tensor], warn: bool = True) -> Sequence[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if type(parameters) is list:
        return parameters
    is_generator = isinstance(parameters, types.GeneratorType)
    parameters = list(parameters)
    if warn and is_generator and not parameters:
        # Level 3 is the line that called the public function.
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return parameters


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    grads = [grad for grad in [p.grad for p in parameters] if grad is not None]
    if not grads and parameters and all(type(p) is Tensor and not p.requires_grad for p in parameters):
        warnings.warn(
            f"`parameters`: none of the {len(parameters)} tensors has a gradient or requires one, so nothing is "
            "clipped. Were gradients passed in the place of parameters?",
            stacklevel=3,
        )
    return grads


def _to_float(value: object, argument: str) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise type(error)(f"{argument}: expected a number, got {value!r}") from error


def _check_norm_dtype(norm_dtype: object) -> None:
    if norm_dtype is None:
        return
    if not isinstance(norm_dtype, torch.dtype):
        raise TypeError(f"norm_dtype: expected a floating torch.dtype or None, got {norm_dtype!r}")
    if not norm_dtype.is_floating_point:
        raise ValueError(f"norm_dtype: expected a floating torch.dtype or None, got {norm_dtype}")


def _check_foreach(parts: Sequence[_groups.Part], foreach: bool | None) -> None:
    for part in parts:
        device = part.tensors[0].device
        if foreach and not _device_has_foreach_support(device):
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")


def _check_clip_value(grads: Sequence[Tensor], clip_value: float) -> None:
    for grad in grads:
        if grad.is_complex():
            raise NotImplementedError(f"clip_value: clamp is not supported for complex gradients, got {grad.dtype}")
        if grad.is_floating_point() and torch.finfo(grad.dtype).max < abs(clip_value) < math.inf:
            raise RuntimeError(
                f"clip_value: value cannot be converted to type {grad.dtype} without overflow: {clip_value}"
            )


def _may_be_one_call(grads: Sequence[Tensor], foreach: bool | None) -> bool:
    """Whether a single op may take the list; the op itself looks at dtypes, layouts and devices, before any write."""
    return (
        not torch.compiler.is_compiling()
        and not _dispatch.in_transform()
        and _groups.all_plain(grads)
        and _dispatch.has_ops(grads[0].device.type)
        and not (foreach and not _device_has_foreach_support(grads[0].device))
    )


def _needs_torch(tensors: Sequence[Tensor]) -> bool:
    """Whether the list is for torch's own functions: they know what a tensor subclass means, and what is no tensor."""
    odd = _groups.odd_type(tensors)
    if odd and issubclass(odd, Tensor) and _dispatch.forced not in (None, eager):
        raise ValueError(f"use_backend({_dispatch.forced.NAME!r}): it cannot take a {odd.__name__}, a tensor subclass")
    return odd is not None


def _norm_of_nothing(norm_dtype: torch.dtype | None) -> Tensor:
    return torch.tensor(0.0, dtype=norm_dtype)


def _writable_parts(grads: Sequence[Tensor], foreach: bool | None) -> list[_groups.Part]:
    _groups.check_writable(grads)
    parts = _groups.split(grads)
    _check_foreach(parts, foreach)
    return parts


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """The shards of this rank in the place of DTensors; all as they are where torch has to take the list."""
    local = distributed.local(tensors) if distributed.dtensor_in(tensors) else tensors
    return local if local is tensors or _groups.all_plain(local) else tensors


def _spread(
    parameters: Sequence[Tensor],
    grads: list[Tensor],
    plan: _plan.Plan | None,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None,
    is_duplicate: Callable[[Tensor], bool] | None,
) -> distributed.Spread | None:
    """The gradients by the ranks that share them; None where no other rank counts, or torch has to take the list."""
    asked = process_group is not None or is_duplicate is not None
    if not asked and (plan or not distributed.dtensor_in(parameters)):
        return None
    local = distributed.local(grads)
    if not _groups.all_plain(local):
        if asked:
            name = "process_group" if process_group is not None else "is_duplicate"
            raise TypeError(f"{name}: not supported for gradients of type {_groups.odd_type(local).__name__}")
        return None
    return distributed.spread(parameters, grads, local, is_duplicate)


def _total_norm(parts: Sequence[_groups.Part], norm_type: float) -> Tensor:
    """The wide norm: the partials of all parts, combined and rooted on the device of the first tensor."""
    first = parts[0].tensors[0]
    if norm_type < 0 and not any(t.numel() > 0 for part in parts for t in part.tensors):
        return first.new_zeros((), dtype=eager.wide_dtype(first))
    return _root(_partial(parts, norm_type, first), norm_type)


def _reduced_norm(
    shards: Sequence[distributed.Shards],
    norm_type: float,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None,
) -> Tensor:
    """The wide norm of gradients that ranks share: each partial becomes the one of all its ranks before the root."""
    groups = distributed.as_groups(process_group)
    grads = [grad for shard in shards for grad in shard.tensors if grad is not None]
    like = grads[0] if grads else shards[0].like if shards else torch.tensor(0.0)
    partials = []
    for shard in shards:
        held = [grad for grad in shard.tensors if grad is not None]
        # Order 0 counts tensors: one that is non-zero on several ranks is still one.
        lists = [held] if norm_type != 0 else [[] if grad is None else [grad] for grad in shard.tensors]
        partials.append(torch.stack([_partial_of(grads, norm_type, like) for grads in lists]))
    partials = distributed.reduce(partials, [shard.route for shard in shards], norm_type)
    partials = [partial.count_nonzero().to(partial.dtype) if norm_type == 0 else partial[0] for partial in partials]
    partial = _combine(partials or [_partial([], norm_type, like)], norm_type)
    for group in groups:
        partial = distributed.all_reduce(partial, norm_type, group)
    return _root(partial, norm_type)


def _partial_in_one_call(tensors: Sequence[Tensor], norm_type: float, foreach: bool | None) -> Tensor | None:
    """The partial by a single op; None where the list needs the closer look of :func:`_groups.split`."""
    if tensors and norm_type >= 0 and _may_be_one_call(tensors, foreach):
        with contextlib.suppress(RuntimeError):
            return _ops.norm_partial(tensors, norm_type)
    return None


def _partial_of(grads: list[Tensor], norm_type: float, like: Tensor) -> Tensor:
    partial = _partial_in_one_call(grads, norm_type, None)
    return _partial(_groups.split(grads), norm_type, like) if partial is None else partial.to(like.device)


def _partial(parts: Sequence[_groups.Part], norm_type: float, like: Tensor) -> Tensor:
    if norm_type < 0:
        # No tensor to speak of is no term of the sum or the minimum.
        parts = [part._replace(tensors=[t for t in part.tensors if t.numel() > 0]) for part in parts]
        parts = [part for part in parts if part.tensors]
    wide = eager.wide_dtype(like)
    if not parts:
        return like.new_full((), math.inf if norm_type == -math.inf else 0.0, dtype=wide)
    partials = [part.backend.norm_partial(part.tensors, norm_type).to(like.device, wide) for part in parts]
    return _combine(partials, norm_type)


def _combine(partials: Sequence[Tensor], norm_type: float) -> Tensor:
    if len(partials) == 1:
        return partials[0]
    stacked = torch.stack(tuple(partials))
    if math.isinf(norm_type):
        return stacked.amax() if norm_type > 0 else stacked.amin()
    return stacked.sum()


def _root(partial: Tensor, norm_type: float) -> Tensor:
    if norm_type in (0, 1) or math.isinf(norm_type):
        return partial
    if norm_type == 2:
        return partial.sqrt()
    return torch.full_like(partial, math.nan) if math.isnan(norm_type) else partial.pow(1 / norm_type)


def _to_tensor(total_norm: float, dtype: torch.dtype) -> Tensor:
    return torch.scalar_tensor(total_norm, dtype=torch.float64, device="cpu").to(dtype)


def _raise_if_nonfinite(total_norm: Tensor | float, norm_type: float) -> None:
    if not (torch.isfinite(total_norm) if isinstance(total_norm, Tensor) else math.isfinite(total_norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )


def _clip_coef(total_norm: Tensor, max_norm: float) -> Tensor:
    """``min(max_norm / (total_norm + 1e-6), 1)``, rounded in torch's order: reciprocal, then product; NaN stays."""
    return ((total_norm + 1e-6).reciprocal() * max_norm).clamp(max=1.0)


def _scale(grads: list[Tensor], clip_coef: Tensor, foreach: bool | None) -> None:
    if grads and _may_be_one_call(grads, foreach):
        with contextlib.suppress(RuntimeError):  # raised before any write: the list needs the closer look below
            return _ops.write(_ops.scale_, grads, clip_coef.to(grads[0].device))
    _scale_parts(_writable_parts(grads, foreach), clip_coef)


def _scale_parts(parts: Sequence[_groups.Part], clip_coef: Tensor) -> None:
    for part in parts:
        part.backend.scale_(part.tensors, clip_coef.to(part.tensors[0].device))
