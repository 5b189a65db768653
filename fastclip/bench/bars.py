"""The bars that fastclip has to reach on a CPU, and their comparison with measured rows."""

from typing import Any, NamedTuple

HEADER = ("case", "regime", "measured", "bar", "unit", "verdict")


class Bar(NamedTuple):
    """What the row of (case, regime) has to hold: `key` at least `limit`, for a time at most."""

    case: str
    regime: str
    key: str
    limit: float


CPU_BARS = (
    Bar("gpt2-124m-fp32", "norm-noop", "ratio", 2.3),
    Bar("gpt2-124m-fp32", "norm-clip", "ratio", 1.1),
    Bar("gpt2-124m-bf16", "norm-noop", "ratio", 3.0),
    Bar("gpt2-124m-bf16", "norm-clip", "ratio", 1.3),
    Bar("gpt2-124m-fp32", "value-noop", "ratio", 2.3),
    Bar("gpt2-124m-fp32", "value-clip", "ratio", 1.7),
    Bar("gpt2-124m-bf16", "value-noop", "ratio", 3.0),
    Bar("gpt2-124m-bf16", "value-clip", "ratio", 1.7),
    Bar("1000x64x64", "norm-noop", "ratio", 9.0),
    Bar("1000x64x64", "norm-clip", "ratio", 6.0),
    Bar("gpt2-124m-fp32", "total-norm", "share", 0.92),
    Bar("1000-tiny", "norm-noop", "ms", 0.3),
    Bar("1000-tiny", "norm-clip", "ms", 0.3),
)
_UNITS = {"ratio": "x torch foreach", "share": "of torch.sum's bandwidth", "ms": "ms"}


def check(rows: list[dict[str, Any]], provider: str) -> list[dict[str, Any]]:
    """Compare `provider`'s rows with every bar; a red row, which has no number, is a miss."""
    found = {(row["case"], row["regime"]): row for row in rows if row["provider"] == provider}
    results = []
    for bar in CPU_BARS:
        row = found.get((bar.case, bar.regime))
        measured = row and row[bar.key]
        holds = measured is not None and (measured <= bar.limit if bar.key == "ms" else measured >= bar.limit)
        verdict = "not measured" if row is None else "pass" if holds else "miss"
        results.append({**bar._asdict(), "measured": measured, "verdict": verdict})
    return results


def cells(results: list[dict[str, Any]]) -> list[list[str]]:
    """The comparison as text, one cell per column of HEADER."""
    rows = []
    for r in results:
        digits, relation = (3, "<=") if r["key"] == "ms" else (2, ">=")
        measured = "" if r["measured"] is None else f"{r['measured']:.{digits}f}"
        rows.append([r["case"], r["regime"], measured, f"{relation} {r['limit']}", _UNITS[r["key"]], r["verdict"]])
    return rows
