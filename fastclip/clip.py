"""What clipping means: torch's four functions, as in torch.nn.utils.clip_grad. Backends only compute."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, SupportsFloat

import torch
from torch import Tensor

from . import distributed, gradients
from .distributed import ProcessGroup
from .gradients import PROPAGATE, SANITIZE, ZERO, Clip


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
    nonfinite: str = "propagate",
    found_inf: Tensor | None = None,
    inv_scale: float | Tensor | None = None,
) -> Tensor:
    """Clips the norm of all gradients together, in place, and returns the norm that they had before.

    Every gradient is multiplied by ``min(max_norm / (total_norm + 1e-6), 1)``; where that is 1 nothing is written.
    The norm is accumulated in float64, and the coefficient is taken from it before it is rounded.

    Gradients that are DTensors, on any meshes and with any placements, count once over all ranks. Every rank of a mesh
    then has to call, with the same parameters in the same order, whichever of them have a gradient on it.

    Args:
        parameters: a Tensor or an iterable of Tensors, of any shapes, whose ``.grad`` is clipped. Gradients may be
            float32, float64, bfloat16 and float16 in any mix, complex, sparse COO, or DTensors.
        max_norm (float): the bound, in the unit of the gradients. Negative values and NaN act as in torch; with ``inf``
            nothing is clipped, whatever the norm.
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
        nonfinite (str): what becomes of inf and NaN, decided on the device: ``"propagate"``, torch's arithmetic;
            ``"raise"``, as ``error_if_nonfinite=True``; ``"zero"``, all gradients become zero where the norm is not
            finite; ``"sanitize"``, each element that is not finite becomes zero first. An optimizer with momentum or
            weight decay still moves by a gradient of zeros: to skip the step give it ``found_inf``.
        found_inf (Tensor, optional): one float32, on any device, which becomes 1.0 where the norm is not finite, else
            0.0: fused optimizers read it, and skip the step without a wait.
        inv_scale (float or 0-dim Tensor, optional): meant are the gradients times ``inv_scale``, such as the inverse
            of a loss scale or of a number of tokens: their norm is returned, and one pass applies it with the
            coefficient. A tensor is not waited for.

    Returns:
        Tensor: 0-dim norm before clipping, on the device of the first gradient; ``tensor(0.)`` without gradients. A
        replicated DTensor where all gradients are DTensors on one mesh.

    Raises:
        RuntimeError: ``error_if_nonfinite`` and the norm is not finite; or a gradient cannot be written in place.
        TypeError, ValueError, OverflowError: ``max_norm`` or an option is not of its kind; or gradients are of a type
            that torch's own functions clip, which know neither ``found_inf``, ``inv_scale``, ``"zero"`` nor
            ``"sanitize"``.
        Whatever is raised, no gradient has changed; lists with tensor subclasses are torch's own functions' to write.

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
    parameters = as_list(parameters)
    norm_type = _to_float(norm_type, "norm_type")
    _check_norm_dtype(norm_dtype)
    options: tuple[()] | tuple[int, Tensor | None, float | Tensor | None] = ()
    if nonfinite != "propagate" or found_inf is not None or inv_scale is not None:
        options = _options(nonfinite, found_inf, inv_scale, error_if_nonfinite)
        error_if_nonfinite = error_if_nonfinite or nonfinite == "raise"
    if not error_if_nonfinite:
        clip = Clip(_to_float(max_norm, "max_norm"), norm_type, *options)
        return _of(parameters, foreach, process_group, is_duplicate).clip_grad_norm_(clip, norm_dtype)
    return clip_in_steps(
        parameters, max_norm, norm_type, options, True, foreach, process_group, is_duplicate, norm_dtype
    )


class Look(Protocol):
    """Who looks at gradients while they are clipped."""

    def see(self, read: gradients.Gradients, norm_type: float, options: tuple) -> Tensor | None:
        """Before the clip; may return the wide norm, where it is known now."""

    def record(self, clip: Clip, norm: Tensor) -> None:
        """After it."""


def clip_in_steps(
    parameters: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    options: tuple,
    error_if_nonfinite: bool,
    foreach: bool | None,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None,
    is_duplicate: Callable[[Tensor], bool] | None,
    norm_dtype: torch.dtype | None,
    look: Look | None = None,
) -> Tensor:
    """:func:`clip_grad_norm_` with its norm between the read and the write."""
    grads = _of(parameters, foreach, process_group, is_duplicate, level=4)
    # A rank that holds nothing takes part in what the others compute.
    if isinstance(grads, gradients.Nothing):
        look = None
    known = look.see(grads, norm_type, options) if look else None
    total_norm = grads.norm_of(Clip(math.inf, norm_type, *options), known)
    if error_if_nonfinite:
        grads.check_finite(total_norm, norm_type)
    clip = Clip(_to_float(max_norm, "max_norm"), norm_type, *options)
    if type(max_norm) not in (float, int):
        # Converting it may have run the caller's code, after which nothing that was read can be relied on.
        grads = _of(parameters, foreach, process_group, is_duplicate)
    grads.clip_by_(clip, total_norm)
    if look:
        look.record(clip, total_norm)
    return grads.finish(total_norm, norm_dtype)


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
        TypeError, ValueError, OverflowError: ``norm_type`` or ``norm_dtype`` is not of its kind.

    Example:
        >>> import torch, fastclip
        >>> fastclip.get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)

    Follows :func:`torch.nn.utils.get_total_norm`.
    """
    tensors = as_list(tensors, warn=False)
    norm_type = _to_float(norm_type, "norm_type")
    _check_norm_dtype(norm_dtype)
    grads = gradients.of(tensors, foreach, process_group, is_duplicate, gradients=False, writes=False)
    if not error_if_nonfinite:
        return grads.returned_norm(norm_type, norm_dtype)
    total_norm = grads.total_norm(norm_type)
    grads.check_finite(total_norm, norm_type)
    return grads.finish(total_norm, norm_dtype)


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
        TypeError, ValueError, OverflowError: ``max_norm`` is not a number, ``total_norm`` not a Tensor.
        RuntimeError: a gradient cannot be written in place.
        Whatever is raised, no gradient has changed, as in :func:`clip_grad_norm_`.

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
    parameters = as_list(parameters, warn=False)
    max_norm = _to_float(max_norm, "max_norm")
    grads = _of(parameters, foreach)
    if not grads.tensors:
        return
    if not isinstance(total_norm, Tensor):
        raise TypeError(f"total_norm: expected a Tensor, got {total_norm!r}")
    total_norm = distributed.full(total_norm)
    if total_norm.dim() != 0 or total_norm.is_complex() or not gradients.is_known(total_norm):
        grads = gradients.Foreign(parameters, grads.tensors, foreach)
    grads.clip_with_norm_(max_norm, total_norm)


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
    *,
    nonfinite: str = "propagate",
    found_inf: Tensor | None = None,
    inv_scale: float | Tensor | None = None,
) -> None:
    """Clips every element of every gradient to ``[-clip_value, clip_value]``, in place; NaN stays NaN.

    One pass over the gradients, which writes only what it changes.

    Args:
        parameters: a Tensor or an iterable of Tensors, of any shapes, whose ``.grad`` is clipped.
        clip_value (float): the bound, in the unit of the gradients; a negative one sets every element to it, as in
            torch.
        foreach (bool, optional): as in :func:`clip_grad_norm_`.
        nonfinite (str): ``"propagate"``, or ``"zero"``: all gradients become zero where one has an inf or a NaN.
        found_inf (Tensor, optional): one float32, on any device, which becomes 1.0 where an element is inf or NaN, else
            0.0. This and ``"zero"`` take a pass more.
        inv_scale (float or 0-dim Tensor, optional): meant are the gradients times it, rounded to their dtype.

    Raises:
        TypeError, ValueError, OverflowError: ``clip_value`` is not a number, or an option not of its kind; or as
            :func:`clip_grad_norm_` for gradients of other types.
        RuntimeError: ``clip_value`` overflows the dtype of a gradient, or a gradient cannot be written in place.
        NotImplementedError: a gradient is complex.
        Whatever is raised, no gradient has changed, as in :func:`clip_grad_norm_`.

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
    parameters = as_list(parameters, warn=False)
    if nonfinite != "propagate" or found_inf is not None or inv_scale is not None:
        clip = Clip(math.inf, math.inf, *_options(nonfinite, found_inf, inv_scale, among=("propagate", "zero")))
        symmetric = torch.compiler.is_compiling() or clip_value >= 0
        return _of(parameters, foreach, symmetric=symmetric).clip_scaled_value_(clip, -clip_value, clip_value)
    # A negative bound sets every element to it, be its sign in memory or not.
    _of(parameters, foreach, symmetric=torch.compiler.is_compiling() or clip_value >= 0).clip_grad_value_(
        -clip_value, clip_value
    )


def why(parameters: Tensor | Iterable[Tensor]) -> list[gradients.Group]:
    """Tells which backend clips which gradients, and why not a faster one.

    Args:
        parameters: a Tensor or an iterable of Tensors, as for :func:`clip_grad_norm_`.

    Returns:
        list: one Group for each backend and device, with its ``reason``; printed, each is a readable line.

    Raises:
        What clipping these gradients would raise.

    Example:
        >>> import torch, fastclip
        >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        >>> weight.grad = torch.zeros(2, dtype=torch.complex64)
        >>> fastclip.why([weight])[0].backend
        'eager'
    """
    return list(_of(as_list(parameters, warn=False)).groups())


def _of(
    parameters: Sequence[Tensor],
    foreach: bool | None = None,
    process_group: ProcessGroup | Iterable[ProcessGroup] | None = None,
    is_duplicate: Callable[[Tensor], bool] | None = None,
    symmetric: bool = True,
    level: int = 3,
) -> gradients.Gradients:
    """The gradients of parameters, to be written. The public function was called so many levels up."""
    grads = gradients.of(parameters, foreach, process_group, is_duplicate, symmetric=symmetric)
    if not grads.tensors and parameters and all(type(p) is Tensor and not p.requires_grad for p in parameters):
        warnings.warn(
            f"`parameters`: none of the {len(parameters)} tensors has a gradient or requires one, so nothing is "
            "clipped. Were gradients passed in the place of parameters?",
            stacklevel=level,
        )
    return grads


def as_list(parameters: Tensor | Iterable[Tensor], warn: bool = True) -> Sequence[Tensor]:
    """What a function is given, as a sequence; warns of an empty generator, as torch does."""
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


def _to_float(value: SupportsFloat, argument: str) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    # Whatever the caller's number raises is raised again, with the name of the argument.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        kind = next(k for k in (TypeError, ValueError, OverflowError, RuntimeError) if isinstance(error, k))
        raise kind(f"{argument}: expected a number, got {value!r}") from error


# What the gradients do of nonfinite; "raise" is the caller's.
_NONFINITE = {"propagate": PROPAGATE, "raise": PROPAGATE, "zero": ZERO, "sanitize": SANITIZE}


def _options(
    nonfinite: str,
    found_inf: Tensor | None,
    inv_scale: float | Tensor | None,
    error_if_nonfinite: bool = False,
    among: Sequence[str] = tuple(_NONFINITE),
) -> tuple[int, Tensor | None, float | Tensor | None]:
    """The fields of a Clip that follow its numbers."""
    if nonfinite not in among:
        raise ValueError(f"nonfinite: expected one of {', '.join(map(repr, among))}, got {nonfinite!r}")
    if error_if_nonfinite and _NONFINITE[nonfinite] != PROPAGATE:
        raise ValueError(f"nonfinite: {nonfinite!r} leaves nothing to raise for, but error_if_nonfinite is True")
    if found_inf is not None:
        if not isinstance(found_inf, Tensor) or not gradients.is_known(found_inf):
            raise TypeError(f"found_inf: expected a float32 Tensor of one element, got {found_inf!r}")
        if found_inf.dtype != torch.float32 or found_inf.numel() != 1 or found_inf.layout != torch.strided:
            what = f"a {found_inf.dtype} one of shape {tuple(found_inf.shape)}"
            raise ValueError(f"found_inf: expected a float32 Tensor of one element, got {what}")
    if isinstance(inv_scale, Tensor):
        inv_scale = distributed.full(inv_scale)
        if inv_scale.dim() != 0 or inv_scale.is_complex():
            what = f"a {inv_scale.dtype} one of shape {tuple(inv_scale.shape)}"
            raise ValueError(f"inv_scale: expected a number or a real 0-dim Tensor, got {what}")
    elif inv_scale is not None:
        inv_scale = _to_float(inv_scale, "inv_scale")
    return _NONFINITE[nonfinite], found_inf, inv_scale


def _check_norm_dtype(norm_dtype: object) -> None:
    if norm_dtype is None:
        return
    if not isinstance(norm_dtype, torch.dtype):
        raise TypeError(f"norm_dtype: expected a floating torch.dtype or None, got {norm_dtype!r}")
    if not norm_dtype.is_floating_point:
        raise ValueError(f"norm_dtype: expected a floating torch.dtype or None, got {norm_dtype}")
    if "float4" in str(norm_dtype):
        raise ValueError(f"norm_dtype: expected a dtype of single numbers, got {norm_dtype}")
