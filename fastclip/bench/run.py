"""One case through all regimes: the gate first, then the times of who passed it, as rows."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import device as on_device
from .cases import Case, Regime
from .gradients import Gradients
from .providers import BASELINE, Provider
from .timing import Entry, Plan, measure

# More than the last-level cache of nearly every machine: reading it evicts the gradients.
_COLD_BYTES = 512 << 20


class Ceiling(NamedTuple):
    """What every row is compared with: a plain pass over as many bytes, which cross memory `passes` times."""

    name: str
    passes: int
    call: Callable[[], object]


def _ceiling(gradients: Gradients, device: torch.device) -> Ceiling:
    """The CPU's read bandwidth; on a GPU that of a copy, by which its memory is known."""
    if device.type == "cpu":
        return Ceiling("torch.sum", 1, gradients.read_flat)
    targets = {dtype: torch.empty_like(flat) for dtype, flat in gradients.flat.items()}
    return Ceiling("device copy", 2, lambda: [targets[dtype].copy_(flat) for dtype, flat in gradients.flat.items()])


def run_case(
    case: Case,
    regimes: list[Regime],
    providers: list[Provider],
    plan: Plan,
    device: torch.device,
    cold: bool,
    details: bool = False,
) -> list[dict[str, Any]]:
    """One row per regime and provider; `ms` is None where the gate was red, and `check` says what differed.

    `cold` starts every timed call with the gradients out of the cache instead of read once; `details` adds what
    device.py finds on a GPU.
    """
    gradients = Gradients(case, device)
    scratch = torch.zeros(_COLD_BYTES // 4, device=device) if cold else None
    ceiling = _ceiling(gradients, device)
    gc.collect()
    rows = []
    for regime in regimes:
        checks = [(p, *_check(p, regime, gradients)) for p in providers if p.has(regime)]
        entries = [
            Entry(p.name, p.call(regime, gradients), _prepare(regime, gradients, scratch), p.scope)
            for p, _, red in checks
            if red is None
        ]
        entries.append(Entry(ceiling.name, ceiling.call, scratch.sum if cold else gradients.read_flat))
        times = measure(entries, plan, device)
        if details:
            for entry in entries:
                times[entry.name] |= on_device.details(entry, _prepare(regime, gradients, None))
        if regime.writes:
            gradients.restore()
        rows.append(_row(case, regime, ceiling.name, times, ceiling, None, ""))
        for p, error, red in checks:
            rows.append(_row(case, regime, p.name, times, ceiling, error, red or ("ok" if p.gated else "")))
    return rows


def _check(provider: Provider, regime: Regime, gradients: Gradients) -> tuple[float | None, str | None]:
    """The norm error of one call, which is also the warm-up, and what is wrong with it; torch is not judged.

    Finds the gradients as saved and leaves them so.
    """
    error = red = None
    try:
        with provider.scope():
            returned = provider.call(regime, gradients)()
        if regime.returns_norm and returned is not None:
            error = gradients.norm_error(returned)
        red = gradients.differences(regime, returned) if provider.gated else None
    except Exception as raised:  # whatever a provider raises is its red check, the others go on
        red = f"raised {type(raised).__name__}: {raised}"
    if regime.writes or red:
        gradients.restore()
    return error, red


def _prepare(regime: Regime, gradients: Gradients, scratch: torch.Tensor | None) -> Callable[[], object]:
    """What runs untimed before every timed call, the same for all providers.

    Reading everything after the restore writes back the dirty lines of whoever ran before.
    """
    settle = gradients.read if scratch is None else scratch.sum

    def restore_and_settle() -> None:
        gradients.restore()
        settle()

    return restore_and_settle if regime.writes else settle


def _row(
    case: Case,
    regime: Regime,
    provider: str,
    times: dict[str, dict],
    ceiling: Ceiling,
    norm_error: float | None,
    check: str,
) -> dict[str, Any]:
    row = {"case": case.name, "regime": regime.name, "what": regime.what, "provider": provider}
    row |= dict.fromkeys(("ms", "p10", "p90", "host_ms", "rounds", "ratio", "gbs", "share"))
    row |= {"norm_error": norm_error, "check": check}
    if provider in times:
        row |= times[provider]
        passes = ceiling.passes if provider == ceiling.name else regime.passes
        row["gbs"] = passes * case.bytes / row["ms"] / 1e6
        row["share"] = passes * times[ceiling.name]["ms"] / (ceiling.passes * row["ms"])
        if provider != ceiling.name and BASELINE in times:
            row["ratio"] = times[BASELINE]["ms"] / row["ms"]
    return row
