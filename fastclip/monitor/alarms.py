"""What is worth a warning in a run of records, decided on the host from what came over."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .monitor import Row

# A jump stands out from this many records before it, of which there have to be so many.
WINDOW, LEAST = 64, 24
# How many robust deviations a jump is above the median, and how many times the median of the norm.
JUMP_DEVIATIONS, JUMP_FACTOR = 10.0, 10.0
# Growth: over so many steps by at least this factor each, on a line in the logarithm.
GROWTH_STEPS, GROWTH_RATE, GROWTH_FIT = 12, 1.5, 0.95
# A layer vanishes that is below this share of the largest for so many steps.
VANISHING, VANISHING_STEPS = 1e-7, 20
# A bound clips always, or never, by so many records.
ALWAYS_STEPS, ALWAYS_SHARE = 500, 0.98
NEVER_STEPS, NEVER_FACTOR = 2000, 10.0


class GradientWarning(UserWarning):
    """What a :class:`GradMonitor` warns of."""


class Alarms:
    """One warning for each cause, until it is over."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._recent: deque[float] = deque(maxlen=GROWTH_STEPS)
        self._vanishing: dict[str, int] = {}
        self._clipped: deque[bool] = deque(maxlen=ALWAYS_STEPS)
        self._unclipped = 0
        self._largest_share = 0.0  # of a norm, of its bound, since the last clip
        self.active: set[str] = set()
        self._names: tuple[str, ...] | None = None
        self._grouped: tuple[list[str], Tensor] = [], torch.zeros(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "recent": list(self._recent),
            "vanishing": dict(self._vanishing),
            "clipped": list(self._clipped),
            "unclipped": self._unclipped,
            "largest_share": self._largest_share,
            "active": sorted(self.active),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kept, name in (
            (self._norms, "norms"),
            (self._losses, "losses"),
            (self._recent, "recent"),
            (self._clipped, "clipped"),
        ):
            kept.clear()
            kept.extend(state[name])
        self._vanishing = dict(state["vanishing"])
        self._unclipped, self._largest_share = int(state["unclipped"]), float(state["largest_share"])
        self.active = set(state["active"])

    def look(self, row: Row) -> None:
        """Warns of what begins with a record."""
        for cause, text in self.causes(row):
            if text is None:
                self.active.discard(cause)
            elif cause not in self.active:
                self.active.add(cause)
                # The line that trains is many calls up, and not always the same.
                warnings.warn(f"step {row.step}: {text}", GradientWarning, stacklevel=2)

    def causes(self, row: Row) -> Iterator[tuple[str, str | None]]:
        """Each cause that this record says something of: with a text where it is there, None where it is over."""
        finite = math.isfinite(row.norm) and row.nonfinite == 0
        yield "nonfinite", None if finite else _nonfinite(row)
        if row.loss is not None:
            yield "loss", self._loss(row.loss)
        if not finite:
            return
        yield "norm", self._jump(row.norm)
        yield "growth", self._growth(row.norm)
        yield from self._layers(row)
        if row.coef is not None and row.max_norm is not None and 0 < row.max_norm < math.inf:
            yield from self._bound(row, row.max_norm)

    def _jump(self, norm: float) -> str | None:
        text = None
        if len(self._norms) >= LEAST and norm > JUMP_FACTOR * min(self._norms):
            logs = [math.log(each) for each in self._norms if each > 0] or [0.0]
            middle = median(logs)
            # Runs that are all alike still vary by a tenth.
            deviation = max(spread(logs, middle), 0.1)
            usual = math.exp(middle)
            if norm > JUMP_FACTOR * usual and (math.log(norm) - middle) / deviation > JUMP_DEVIATIONS:
                text = (
                    f"the gradient norm jumped to {norm:.4g}, from about {usual:.4g} in the {len(logs)} steps before: "
                    "look at this batch; clip (max_norm near the usual norm), or lower the learning rate"
                )
        self._norms.append(norm)
        return text

    def _loss(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}: look at the inputs of this step, at divisions and logarithms in the loss"
        text = None
        if len(self._losses) >= LEAST and not loss <= 2 * min(self._losses):
            middle = median(self._losses)
            deviation = max(spread(self._losses, middle), 0.05 * abs(middle), 1e-12)
            if (loss - middle) / deviation > JUMP_DEVIATIONS and loss - middle > abs(middle):
                text = (
                    f"the loss jumped to {loss:.4g}, from about {middle:.4g} in the {len(self._losses)} steps before: "
                    "look at this batch; a lower learning rate or a tighter max_norm keeps one batch from undoing many"
                )
        self._losses.append(loss)
        return text

    def _growth(self, norm: float) -> str | None:
        self._recent.append(norm)
        if len(self._recent) < GROWTH_STEPS or min(self._recent) <= 0 or norm < GROWTH_RATE * self._recent[0]:
            return None
        slope, fit = line([math.log(each) for each in self._recent])
        if slope < math.log(GROWTH_RATE) or fit < GROWTH_FIT:
            return None
        return (
            f"the gradient norm grows exponentially, {math.exp(slope):.2g} times in each of the last {GROWTH_STEPS} "
            f"steps, to {norm:.4g}: lower the learning rate, or clip by norm before it overflows"
        )

    def _layers(self, row: Row) -> Iterator[tuple[str, str | None]]:
        layers, places = self._layers_of(row.names)
        squares = torch.zeros(len(layers), dtype=torch.float64).index_add_(0, places, row.norms.double().square())
        largest = squares.max().item() if layers else 0.0  # on the host, as all of a record
        # Those that are 0 were not used.
        below = (squares > 0) & (squares < VANISHING**2 * largest)
        # Likewise.
        low = {layers[i]: squares[i].item() for i in below.nonzero().flatten().tolist()} if below.any() else {}
        for name in [name for name in self._vanishing if name not in low]:
            del self._vanishing[name]
            yield f"vanishing {name}", None
        for name, square in low.items():
            count = self._vanishing[name] = self._vanishing.get(name, 0) + 1
            if count >= VANISHING_STEPS:
                yield (
                    f"vanishing {name}",
                    f"the gradient of layer {name!r} vanishes: its norm {math.sqrt(square):.3g} has been below "
                    f"{VANISHING:g} of the largest, {math.sqrt(largest):.3g}, for {count} steps: look at saturated "
                    "activations and at initial weights; normalisation, gates or skip connections help, clipping does "
                    "not",
                )

    def _layers_of(self, names: tuple[str, ...]) -> tuple[list[str], Tensor]:
        """The layers that parameters belong to, weights and biases together, and the place of each parameter's."""
        if self._names is not names:
            of = [name.rpartition(".")[0] or name for name in names]
            layers = list(dict.fromkeys(of))
            place = {layer: i for i, layer in enumerate(layers)}
            self._names, self._grouped = (
                names,
                (layers, torch.tensor([place[layer] for layer in of], dtype=torch.int64)),
            )
        return self._grouped

    def _bound(self, row: Row, max_norm: float) -> Iterator[tuple[str, str | None]]:
        clips = row.coef is not None and row.coef < 1
        self._clipped.append(clips)
        share = sum(self._clipped) / len(self._clipped)
        always = len(self._clipped) == ALWAYS_STEPS and share >= ALWAYS_SHARE
        yield (
            "always",
            f"max_norm {max_norm:g} clipped {share:.0%} of the last {ALWAYS_STEPS} steps: it sets the length of every "
            "step, as a learning rate does; raise it (the report suggests a bound), or mean it"
            if always
            else None,
        )
        self._unclipped = 0 if clips else self._unclipped + 1
        self._largest_share = 0.0 if clips else max(self._largest_share, row.norm / max_norm)
        never = self._unclipped >= NEVER_STEPS and self._largest_share * NEVER_FACTOR < 1
        yield (
            "never",
            f"max_norm {max_norm:g} has not clipped in {self._unclipped} steps, and no norm came within "
            f"{NEVER_FACTOR:g} times of it: it would not hold back an explosion until it is large; lower it"
            if never
            else None,
        )


def _nonfinite(row: Row) -> str:
    if row.first_nonfinite is None:
        return (
            f"the gradient norm is {row.norm}, though every gradient is finite: their squares overflow; lower the "
            "learning rate or the loss scale"
        )
    others = f" and {row.others_nonfinite} other parameters" if row.others_nonfinite else ""
    return (
        f"{row.nonfinite} elements of the gradient are not finite, first in {row.first_nonfinite!r}{others}: skip such "
        "steps (nonfinite='zero', found_inf, or a GradScaler), lower the learning rate, look at the inputs"
    )


def spread(values: Collection[float], middle: float) -> float:
    """Of values about their median, a standard deviation that what stands out does not widen (1.4826 MAD)."""
    return 1.4826 * median([abs(each - middle) for each in values])


def line(values: list[float]) -> tuple[float, float]:
    """The slope of a line through values one step apart, and the share of their variance that it explains."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((i - middle) ** 2 for i in range(count))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread if spread else 0.0
    total = sum((value - mean) ** 2 for value in values)
    return slope, slope * slope * spread / total if total else 0.0
