"""The tensors of a case on a device, their float64 reference, and the gate that compares with it."""

import math

import torch

from .cases import Case, Regime

# Float64 copies stay in the cache, and torch starts no threads for pieces of this size: its barriers would cost more.
_CHUNK = 1 << 15


class Gradients:
    """Separately allocated gradients, the parameters that hold them, and a saved copy to restore them from.

    The saved copy is flat, one tensor per dtype: `torch.sum` over it gives the read bandwidth of the same bytes.
    """

    def __init__(self, case: Case, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        self.device = device
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
        self.total_norm = math.sqrt(sum(_squares(c) for flat in self.flat.values() for c in flat.split(_CHUNK)))

    def restore(self) -> None:
        """Write the saved values back."""
        for grad, saved in zip(self.grads, self.saved, strict=True):
            grad.copy_(saved)

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
        arguments = regime.arguments(self.total_norm)
        for i, (grad, saved) in enumerate(zip(self.grads, self.saved, strict=True)):
            for g, s in zip(grad.flatten().split(_CHUNK), saved.flatten().split(_CHUNK), strict=True):
                if regime.name == "norm-clip":
                    want = s.double() * (arguments[0] / (self.total_norm + 1e-6))
                    wrong = ~((g.double() - want).abs() <= _tolerance(g.dtype) * want.abs())
                else:
                    want = s.clamp(-arguments[0], arguments[0]) if regime.name == "value-clip" else s
                    wrong = g != want
                if wrong.any():
                    k = int(wrong.int().argmax())
                    return f"gradient {i} {tuple(grad.shape)} has {float(g[k]):.9g} instead of {float(want[k]):.9g}"
        return None


def _tolerance(dtype: torch.dtype) -> float:
    """One rounding to `dtype`, and room for a float32 coefficient and its product."""
    return torch.finfo(dtype).eps / 2 + 2**-22


def _squares(chunk: torch.Tensor) -> float:
    wide = chunk.double()
    return float(wide.dot(wide))


def _parameter(grad: torch.Tensor) -> torch.nn.Parameter:
    """A parameter whose values share one element: clipping reads nothing but `.grad`."""
    parameter = torch.nn.Parameter(torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape))
    parameter.grad = grad
    return parameter
