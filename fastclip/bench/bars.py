"""The bars that fastclip has to reach, and their comparison with measured rows."""

from typing import Any, NamedTuple

HEADER = ("case", "regime", "measured", "bar", "unit", "verdict")


class Bar(NamedTuple):
    """What the row of (case, regime) has to hold: `key` at least `limit`; a time, or a multiple of one, at most.

    A bar with a `card` holds for GPUs with that in their name.
    """

    case: str
    regime: str
    key: str
    limit: float
    card: str = ""


CPU_BARS = (
    Bar("gpt2-124m-fp32", "norm-noop", "ratio", 2.3),
    Bar("gpt2-124m-fp32", "norm-clip", "ratio", 1.1),
    Bar("gpt2-124m-bf16", "norm-noop", "ratio", 3.0),
    Bar("gpt2-124m-bf16", "norm-clip", "ratio", 1.3),
    Bar("gpt2-124m-fp32", "value-noop", "ratio", 2.3),
    Bar("gpt2-124m-fp32", "value-clip", "ratio", 1.7),
    Bar("gpt2-124m-bf16", "value-noop", "ratio", 3.0),
    Bar("gpt2-124m-bf16", "value-clip", "ratio", 1.7),
    Bar("1000x64x64", "norm-noop", "of_limit", 1.5),
    Bar("1000x64x64", "norm-clip", "of_limit", 1.5),
    Bar("gpt2-124m-fp32", "total-norm", "share", 0.92),
)
# What as many tensors cost beside their bytes.
_OVERHEAD = {"1000x64x64": "1000-tiny"}


def _near_a_copy(case: str) -> tuple[Bar, ...]:
    """For at least 1 GB. Not clipping is the norm and nothing else."""
    reads = (Bar(case, regime, "share", 0.9) for regime in ("total-norm", "norm-noop"))
    return (*reads, *_as_a_copy(case))


def _over_torch(case: str) -> tuple[Bar, ...]:
    """Not clipping by norm, which moves as many bytes in torch as here: it is held to a copy instead."""
    return tuple(Bar(case, regime, "ratio", 2.0) for regime in ("norm-noop", "value-noop", "value-clip"))


def _as_a_copy(case: str) -> tuple[Bar, ...]:
    return (Bar(case, "norm-clip", "share", 1 / 1.1),)


def _host(case: str, ms: float) -> tuple[Bar, ...]:
    return tuple(Bar(case, regime, "host_ms", ms) for regime in ("norm-noop", "norm-clip"))


GPU_BARS = (
    *_near_a_copy("llama3-8b-1of8"),
    *_over_torch("llama3-8b-1of8"),
    *_near_a_copy("llama3-8b-1of8-fp32"),
    *_over_torch("llama3-8b-1of8-fp32"),
    *_over_torch("llama3-8b-1of64"),
    *_as_a_copy("llama3-8b-1of64"),
    *_over_torch("llama3-8b-1of64-fp32"),
    *_as_a_copy("llama3-8b-1of64-fp32"),
    *_near_a_copy("one-huge-bf16"),
    Bar("one-huge-bf16", "norm-noop", "ms", 1.1, card="H100"),
    Bar("one-huge-bf16", "norm-clip", "ms", 3.3, card="H100"),
    Bar("500-mixed", "norm-clip", "ms", 1.0, card="H100"),
    *_near_a_copy("2000x1024x1024"),
    *_host("2000-tiny", 0.3),
    *_host("10000-tiny", 1.8),
)
_UNITS = {
    "ratio": "x torch foreach",
    "ms": "ms",
    "host_ms": "ms of the host",
    "of_limit": "x its bytes and its tensors",
}


def check(rows: list[dict[str, Any]], provider: str, conditions: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare `provider`'s rows with every bar of the device; a red row, which has no number, is a miss."""
    found = {(row["case"], row["regime"]): row for row in rows if row["provider"] == provider}
    gpu = conditions.get("gpu")
    units = _UNITS | {"share": "of a copy's bandwidth" if gpu else "of torch.sum's bandwidth"}
    results = []
    for bar in GPU_BARS if gpu else CPU_BARS:
        if bar.card not in (gpu or ""):
            continue
        row = found.get((bar.case, bar.regime))
        measured = _of_limit(row, found) if row and bar.key == "of_limit" else row and row[bar.key]
        holds = measured is not None and (measured <= bar.limit if _is_time(bar.key) else measured >= bar.limit)
        verdict = "not measured" if row is None else "pass" if holds else "miss"
        results.append({**bar._asdict(), "unit": units[bar.key], "measured": measured, "verdict": verdict})
    return results


def _of_limit(row: dict[str, Any], found: dict[tuple[str, str], dict[str, Any]]) -> float | None:
    """A time as a multiple of what torch.sum takes for its bytes and the call for as many tiny tensors."""
    tiny = found.get((_OVERHEAD[row["case"]], "norm-noop"))
    if row["ms"] is None or tiny is None or tiny["ms"] is None:
        return None
    return row["ms"] / (row["share"] * row["ms"] + tiny["ms"])


def cells(results: list[dict[str, Any]]) -> list[list[str]]:
    """The comparison as text, one cell per column of HEADER."""
    rows = []
    for r in results:
        digits, relation = (3, "<=") if _is_time(r["key"]) else (2, ">=")
        measured = "" if r["measured"] is None else f"{r['measured']:.{digits}f}"
        rows.append([r["case"], r["regime"], measured, f"{relation} {r['limit']:.3g}", r["unit"], r["verdict"]])
    return rows


def _is_time(key: str) -> bool:
    return key.endswith("ms") or key == "of_limit"
