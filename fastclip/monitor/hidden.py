"""The gradient of the loss along a module: over the time steps of a recurrent one, over the depth of any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle


class Hidden:
    """Norms that tensor hooks leave in a backward pass; and the handle that takes the hooks off."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._handles: list[RemovableHandle] = []
        # In the order of the forward pass; None until the backward pass has come by.
        self._norms: list[Tensor | None] = []
        self._over_time: Tensor | None = None
        self._seen = False

    def remove(self) -> None:
        """Takes the hooks off the module."""
        while self._handles:
            self._handles.pop().remove()

    def take(self) -> Tensor | None:
        """The norms of the last backward pass, (T,), float32 or wider; None where none came by."""
        over_time, norms = self._over_time, self._norms
        self._over_time, self._norms, self._seen = None, [], False
        if over_time is not None:
            return over_time
        found = [norm for norm in norms if norm is not None]
        return torch.stack(found) if found else None

    def _note(self, output: Any) -> None:
        """Hooks the first tensor of an output, whose norm comes after those of the outputs before it."""
        if self._seen:  # the forward pass after a backward pass whose norms nobody took
            self._norms, self._seen = [], False
        tensor = _first_tensor(output)
        if tensor is None or not tensor.requires_grad:
            return
        place, norms = len(self._norms), self._norms
        norms.append(None)

        def see(grad: Tensor) -> None:
            norms[place] = torch.linalg.vector_norm(grad.detach(), dtype=torch.promote_types(grad.dtype, torch.float32))
            self._seen = True

        tensor.register_hook(see)


def watch(module: nn.Module, name: str) -> Hidden:
    """Puts hooks on a module; see :meth:`GradMonitor.watch_hidden`."""
    hidden = Hidden(name)
    if isinstance(module, nn.RNNBase):
        hidden._handles.append(module.register_forward_pre_hook(_over_time(hidden, module.batch_first)))
    else:
        children = [] if isinstance(module, nn.RNNCellBase) else list(module.children())
        for each in children or [module]:
            hidden._handles.append(each.register_forward_hook(lambda _, __, output: hidden._note(output)))
    return hidden


def _over_time(hidden: Hidden, batch_first: bool) -> Callable[[nn.Module, tuple], tuple | None]:
    """Hooks the input of a whole sequence, whose gradient at a step has passed through all later ones."""

    def hook(module: nn.Module, inputs: tuple) -> tuple | None:
        x = inputs[0] if inputs else None
        packed = x if isinstance(x, PackedSequence) else None
        data = x if packed is None else packed.data
        if not isinstance(data, Tensor) or not torch.is_grad_enabled():
            return None
        # Not the caller's own tensor, which may be used again.
        data = data.view_as(data) if data.requires_grad else data.detach().requires_grad_()
        time = 1 if data.dim() == 3 and batch_first else 0

        def see(grad: Tensor) -> None:
            wide = torch.promote_types(grad.dtype, torch.float32)
            if packed is not None:  # one time step after the other
                steps = grad.detach().split(packed.batch_sizes.tolist())  # always on the host
                hidden._over_time = torch.stack([torch.linalg.vector_norm(step, dtype=wide) for step in steps])
                return
            dims = tuple(d for d in range(grad.dim()) if d != time)
            hidden._over_time = torch.linalg.vector_norm(grad.detach(), dim=dims, dtype=wide)

        data.register_hook(see)
        return (data if packed is None else PackedSequence(data, *packed[1:]), *inputs[1:])

    return hook


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((found for each in output if (found := _first_tensor(each)) is not None), None)
    if isinstance(output, dict):
        return _first_tensor(list(output.values()))
    return None
