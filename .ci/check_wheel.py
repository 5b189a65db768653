"""Checks the name and the contents of a wheel. Usage: check_wheel.py native|pure WHEEL"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "fastclip/libfastclip_cpu.so"
TAGS = {"native": r"py3-none-(?!any)\w+", "pure": r"py3-none-any"}


def main() -> int:
    kind, path = sys.argv[1], Path(sys.argv[2])
    wheel = zipfile.ZipFile(path)
    metadata = re.compile(r"fastclip-[^/]+\.dist-info/")
    found = {name for name in wheel.namelist() if not metadata.match(name)}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastclip").rglob("*.py")}
    expected |= {LIBRARY} if kind == "native" else set()
    errors = [f"lacks {name}" for name in sorted(expected - found)]
    errors += [f"has {name}, which does not belong there" for name in sorted(found - expected)]
    if not re.fullmatch(rf"fastclip-[\d.]+-{TAGS[kind]}\.whl", path.name):
        errors.append(f"has the wrong tag: expected {TAGS[kind]}")
    for error in errors:
        print(f"{path.name}: {error}", file=sys.stderr)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(found)} files")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
