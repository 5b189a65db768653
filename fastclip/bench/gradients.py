"""The tensors of a case on a device, their float64 reference, and the gate that compares with it."""

import functools
import itertools
import math
from collections.abc import Iterator

import torch

from .cases import EACH, Case, Regime

# Elements that are compared at once. On a CPU their float64 copies stay in the cache, and torch starts no threads for
# so few: its barriers would cost more. On a GPU they are enough to be worth the wait for the verdict.
_PIECE = {"cpu": 1 << 15, "cuda": 1 << 25}


class Gradients:
    """Separately allocated gradients, the parameters that hold them, and a saved copy to restore them from.

    The saved copy is flat, one tensor per dtype: `torch.sum` over it gives the read bandwidth of the same bytes.
    """

    def __init__(self, case: Case, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        self.piece = _PIECE[device.type]
        self.flat: dict[torch.dtype, torch.Tensor] = {}
        saved: dict[torch.dtype, list[torch.Tensor]] = {}
        for dtype in {dtype: None for _, dtype in case.tensors}:
            sizes = [torch.Size(shape).numel() for shape, d in case.tensors if d == dtype]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device).normal_(generator=generator)
            self.flat[dtype] = flat
            saved[dtype] = list(flat.split(sizes))[::-1]
        self.saved = [saved[dtype].pop().view(shape) for shape, dtype in case.tensors]
        self.grads = [s.clone() for s in self.saved]
        self.parameters = [_parameter(g) for g in self.grads]
        self.total_norm = math.sqrt(sum(_squares(c) for flat in self.flat.values() for c in flat.split(self.piece)))

    @functools.cached_property
    def weights(self) -> list[torch.nn.Parameter]:
        """Parameters of the same gradients whose values are standard normal and have memory of their own."""
        generator = torch.Generator(self.grads[0].device).manual_seed(1)
        made = [torch.nn.Parameter(torch.empty_like(grad).normal_(generator=generator)) for grad in self.grads]
        for parameter, grad in zip(made, self.grads, strict=True):
            parameter.grad = grad
        return made

    def restore(self) -> None:
        """Write the saved values back."""
        torch._foreach_copy_(self.grads, self.saved)

    def read(self) -> None:
        """Read every gradient once."""
        for grad in self.grads:
            grad.sum()

    def read_flat(self) -> None:
        """Read the same number of bytes as one contiguous tensor per dtype."""
        for flat in self.flat.values():
            flat.sum()

    def norm_error(self, returned: torch.Tensor) -> float:
        """Relative error of a returned norm against float64."""
        return abs(float(returned) - self.total_norm) / self.total_norm

    def differences(self, regime: Regime, returned: torch.Tensor | None) -> str | None:
        """What is wrong after one call of `regime` over restored gradients; None where all is right."""
        if regime.returns_norm:
            if returned is None:
                return "no norm was returned"
            if not self.norm_error(returned) <= _tolerance(returned.dtype):
                return f"norm is {float(returned):.9g} where float64 has {self.total_norm:.9g}"
        if regime in EACH:
            return self._differences_of_each(regime, returned)
        arguments = regime.arguments(self.total_norm)
        for pieces in self._batches():
            g, s = (_joined(list(column)) for column in list(zip(*pieces, strict=True))[1:])
            if regime.name == "norm-clip":
                want = s.double() * (arguments[0] / (self.total_norm + 1e-6))
                wrong = ~((g.double() - want).abs() <= _tolerance(g.dtype) * want.abs())
            else:
                want = s.clamp(-arguments[0], arguments[0]) if regime.name == "value-clip" else s
                wrong = g != want
            if wrong.any():
                k = int(wrong.int().argmax())
                ends = itertools.accumulate(len(piece) for _, piece, _ in pieces)
                i = next(i for (i, _, _), end in zip(pieces, ends, strict=True) if k < end)
                shape = tuple(self.grads[i].shape)
                return f"gradient {i} {shape} has {float(g[k]):.9g} instead of {float(want[k]):.9g}"
        return None

    def _differences_of_each(self, regime: Regime, returned: torch.Tensor | None) -> str | None:
        for i, (grad, saved) in enumerate(zip(self.grads, self.saved, strict=True)):
            wide = saved.double()
            if regime.over == "weights":
                dims = tuple(range(1, saved.dim())) or None
                bound = (
                    torch.linalg.vector_norm(self.weights[i].detach().double(), dim=dims, keepdim=True) * regime.bound
                )
                coef = (bound / torch.linalg.vector_norm(wide, dim=dims, keepdim=True)).clamp(max=1.0)
            else:
                norm = torch.linalg.vector_norm(wide)
                coef = torch.ones(()) if regime.bound is None else (regime.bound / norm).clamp(max=1.0)
                if not abs(float(returned[i]) - norm) <= _tolerance(saved.dtype) * norm:
                    return f"norm {i} is {float(returned[i]):.9g} where float64 has {norm:.9g}"
            want = wide * coef
            wrong = ((grad.double() - want).abs() > _tolerance(grad.dtype) * want.abs()).flatten()
            if wrong.any():
                k = int(wrong.int().argmax())
                got = float(grad.flatten()[k])
                return f"gradient {i} {tuple(grad.shape)} has {got:.9g} instead of {float(want.flatten()[k]):.9g}"
        return None

    def _batches(self) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
        """Pieces (index, gradient, saved) of one dtype, at most so many elements together."""
        batch, room = [], 0
        for i, (grad, saved) in enumerate(zip(self.grads, self.saved, strict=True)):
            for g, s in zip(grad.flatten().split(self.piece), saved.flatten().split(self.piece), strict=True):
                if batch and (len(g) > room or g.dtype != batch[-1][1].dtype):
                    yield batch
                    batch = []
                room = (room if batch else self.piece) - len(g)
                batch.append((i, g, s))
        if batch:
            yield batch


def _tolerance(dtype: torch.dtype) -> float:
    """One rounding to `dtype`, and room for a float32 coefficient and its product."""
    return torch.finfo(dtype).eps / 2 + 2**-22


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _squares(piece: torch.Tensor) -> float:
    wide = piece.double()
    return float(wide.dot(wide))


def _parameter(grad: torch.Tensor) -> torch.nn.Parameter:
    """A parameter whose values share one element: clipping reads nothing but `.grad`."""
    parameter = torch.nn.Parameter(torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape))
    parameter.grad = grad
    return parameter
