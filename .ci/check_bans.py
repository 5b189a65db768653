"""The house bans that a pattern can see. An exception states its reason in a comment, there or on the line before."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Errors that the C++ of torch raises are all RuntimeErrors.
BROAD = r"\bsuppress\(|\bexcept(:|\b.*\b(BaseException|Exception|RuntimeError)\b)"
BANS = [
    # folder, suffixes, folders left out, pattern, reason
    ("fastclip", (".py",), ("demo", "bench", "report"), r"\.(item|cpu|tolist)\(\)", "waits for the device"),
    ("fastclip", (".py",), (), BROAD, "hides what nobody thought of"),
    ("csrc", (".cpp", ".h", ".cu", ".cuh"), (), r"\bf(max|min)f?\s*\(", "drops NaN: use max_nan or min_nan of clip.h"),
]
COMMENT = re.compile(r"#|//")


def violations():
    for folder, suffixes, left_out, pattern, reason in BANS:
        for path in sorted((ROOT / folder).rglob("*")):
            parts = path.relative_to(ROOT / folder).parts
            if path.suffix not in suffixes or parts[0] in left_out:
                continue
            before = ""
            for number, line in enumerate(path.read_text().splitlines(), 1):
                code = COMMENT.split(line)[0]
                excused = COMMENT.search(line) or before.strip().startswith(("#", "//"))
                if (found := re.search(pattern, code)) and not excused:
                    yield f"{path.relative_to(ROOT)}:{number}: {found[0]} {reason}; if it must be, say why in a comment"
                before = line


def main() -> int:
    found = list(violations())
    for violation in found:
        print(violation, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
