"""Draws the picture of the README from a saved run: python benchmarks/picture.py RESULTS.json docs/speed.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastclip.bench.charts import ratio_chart

CASES = {
    "gpt2-124m-fp32": "GPT-2 124M, float32",
    "gpt2-124m-bf16": "GPT-2 124M, bfloat16",
    "resnet50": "ResNet-50, float32",
    "llama3-8b-1of64": "Llama-3-8B, 1/64, bfloat16",
    "lora-8b-r16": "LoRA of an 8B model",
    "one-huge": "one tensor of 1 GiB",
    "1000x64x64": "1,000 tensors of 64 x 64",
    "10000-tiny": "10,000 tensors of 64",
}
REGIMES = ("norm-noop", "norm-clip")


def main() -> int:
    source, target = map(Path, sys.argv[1:])
    report = json.loads(source.read_text())
    found = {case["name"] for case in report["cases"]}
    if missing := [name for name in CASES if name not in found]:
        sys.exit(f"{source} has no {', '.join(missing)}")
    # The kernels, and not the fallback beside them.
    ours = next(row["provider"] for row in report["rows"] if row["provider"].startswith("fastclip"))
    chosen = [
        row
        for row in report["rows"]
        if row["case"] in CASES and row["regime"] in REGIMES and row["provider"] in (ours, "torch foreach")
    ]
    report["rows"] = [{**row, "case": CASES[row["case"]]} for row in chosen]
    report["cases"] = [{"name": title} for title in CASES.values()]
    ratio_chart(report, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
