"""What a run shows, in words, and the bound that its norms suggest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..monitor.alarms import Alarms
from ..monitor.monitor import Row
from .log import Run

# Steps clipped beyond this share are too many; of this many bounded steps at least something can be said.
OFTEN, ENOUGH = 0.9, 50
# Spikes: the largest finite norm over the median.
SPIKE = 100.0


class Event(NamedTuple):
    """What an alarm would have said at a step, or said."""

    step: int
    cause: str
    text: str


@dataclass
class Verdict:
    """What is to be said of a run."""

    headline: str
    lines: list[str]
    events: list[Event]
    suggestion: float | None
    percentiles: dict[int, float]


def of(run: Run) -> Verdict:
    """The verdict on a run."""
    finite = run.norms[~run.nonfinite]
    finite = finite[finite > 0]
    percentiles = {p: float(np.percentile(finite, p)) if len(finite) else math.nan for p in (50, 90, 99, 100)}
    events = events_of(run)
    causes = {event.cause.partition(" ")[0] for event in events}
    words, lines = [], []
    bad = np.flatnonzero(run.nonfinite)
    if len(bad):
        words.append("non-finite")
        lines.append(_nonfinite(run, bad))
    if "growth" in causes or (len(finite) and percentiles[100] > SPIKE * percentiles[50]):
        words.append("exploding")
        at = next((event for event in events if event.cause == "growth"), None)
        largest = int(np.nanargmax(np.where(np.isfinite(run.norms), run.norms, np.nan)))
        peak = f"the norm reached {run.norms[largest]:.4g} at step {run.steps[largest]}, {percentiles[50]:.4g} is usual"
        lines.append(f"exploding: {peak}" + (f"; it grew exponentially from step {at.step} on" if at else ""))
    elif {"norm", "loss"} & causes:
        words.append("jumps")
    if vanishing := sorted({event.cause.partition(" ")[2] for event in events if event.cause.startswith("vanishing")}):
        words.append("vanishing")
        shown = ", ".join(vanishing[:3]) + (f" and {len(vanishing) - 3} more" if len(vanishing) > 3 else "")
        lines.append(f"vanishing: the gradients of {shown} fall below 1e-7 of the largest")
    bounded = int(run.bounded.sum())
    share = run.clipped.sum() / bounded if bounded else math.nan
    if bounded:
        bound = _range(run.max_norms[run.bounded])
        text = f"clipped in {run.clipped.sum()} of {bounded} steps ({share:.0%}) by max_norm {bound}"
        if bounded >= ENOUGH and share > OFTEN:
            words.append("clipped too often")
            text += ": the bound sets the length of nearly every step, as a learning rate does"
        elif bounded >= ENOUGH and share == 0:
            words.append("never clipped")
            text += ": it has held back nothing so far"
        lines.append(text)
    elif len(run):
        lines.append("nothing was clipped by norm")
    if len(finite):
        lines.append(
            f"norms before clipping: median {percentiles[50]:.4g}, 90th percentile {percentiles[90]:.4g}, 99th "
            f"{percentiles[99]:.4g}, largest {percentiles[100]:.4g} (of {len(finite)} finite steps)"
        )
    suggestion, why = suggest(run)
    lines.append(why)
    lines += [f"step {event.step}: {event.text}" for event in events[:8]]
    if len(events) > 8:
        lines.append(f"and {len(events) - 8} more alarms")
    headline = f"{len(run)} steps: " + (", ".join(words) if words else "healthy")
    return Verdict(headline, lines, events, suggestion, percentiles)


def suggest(run: Run) -> tuple[float | None, str]:
    """A bound, and the reasoning."""
    late = np.zeros(len(run), dtype=bool)
    late[len(run) // 2 :] = True
    norms = run.norms[~run.nonfinite & (run.norms > 0) & (late if len(run) >= 20 else True)]
    if not len(norms):
        return None, "no bound can be suggested: no step had a finite norm"
    part = "of the second half of the run, when the start is over" if len(run) >= 20 else "of these few steps"
    middle, high = np.percentile(norms, 50), np.percentile(norms, 90)
    # Spikes so dense that they move the 90th percentile are what a bound is for.
    base, what = (high, "the 90th percentile") if high <= 5 * middle else (3 * middle, "three times the median")
    bound = float(f"{base:.2g}")
    share = float((norms > bound).mean())
    return bound, (
        f"suggested max_norm: {bound:g}, {what} of the finite norms {part} (median {middle:.4g}, 90th percentile "
        f"{high:.4g}): it would clip about {share:.0%} of such steps, and leave the usual ones alone"
    )


def events_of(run: Run) -> list[Event]:
    """What the alarms say of a run."""
    alarms, events = Alarms(), []
    names = tuple(run.layers)
    table = torch.from_numpy(np.stack(list(run.layers.values()), 1)) if names else torch.zeros(len(run), 0)
    columns = [run.column(tag).tolist() for tag in ("grad_norm", "grad_norm_clipped", "grad_clip_coef", "loss")]
    odd, nonfinite = run.column("grad_nonfinite"), run.nonfinite
    bounds, blank = run.max_norms.tolist(), torch.zeros(0)
    has_loss = "loss" in run.columns
    for i, (norm, clipped, coef, loss) in enumerate(zip(*columns, strict=True)):
        norms = table[i]
        bad = [names[k] for k in (~norms.isfinite()).nonzero().flatten().tolist()] if nonfinite[i] else []
        row = Row(
            int(run.steps[i]),
            norm,
            clipped,
            coef if coef == coef else None,
            int(np.nan_to_num(odd[i])),
            loss if has_loss else None,
            names,
            norms.nan_to_num(0.0, 0.0),
            blank,
            blank,
            bad[0] if bad else None,
            max(len(bad) - 1, 0),
            bounds[i] if bounds[i] == bounds[i] else None,
            {},
        )
        for cause, text in alarms.causes(row):
            if text is None:
                alarms.active.discard(cause)
            elif cause not in alarms.active:
                alarms.active.add(cause)
                events.append(Event(row.step, cause, text))
    return events


def _nonfinite(run: Run, bad: np.ndarray) -> str:
    first = int(bad[0])
    where = [name for name, norms in run.layers.items() if not math.isfinite(norms[first])]
    place = f" in {where[0]!r}" + (f" and {len(where) - 1} other parameters" if len(where) > 1 else "") if where else ""
    return f"non-finite: {len(bad)} of {len(run)} steps, first at step {run.steps[first]}{place}"


def _range(bounds: np.ndarray) -> str:
    low, high = float(bounds.min()), float(bounds.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
