"""Checks the name and the contents of a wheel. Usage: check_wheel.py cuda|cpu|pure WHEEL"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {
    "cuda": {"fastclip/build.json", "fastclip/libfastclip_cpu.so", "fastclip/libfastclip_cuda.so"},
    "cpu": {"fastclip/build.json", "fastclip/libfastclip_cpu.so"},
    "pure": set(),
}
# Beside what every wheel has.
METADATA = ("licenses/LICENSE", "licenses/NOTICE", "sboms/torch-fastclip.cdx.json")


def main() -> int:
    kind, path = sys.argv[1], Path(sys.argv[2])
    wheel = zipfile.ZipFile(path)
    info = path.name.rpartition("-py3-")[0] + ".dist-info"
    written = [f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt")]
    found = {name for name in wheel.namelist() if not name.endswith("/") and name not in written}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastclip").rglob("*.py")}
    expected |= {"fastclip/py.typed", *(f"{info}/{name}" for name in METADATA)}
    expected |= LIBRARIES[kind]
    tag = r"py3-none-(?!any)\w+" if LIBRARIES[kind] else r"py3-none-any"
    errors = [f"lacks {name}" for name in sorted(expected - found)]
    errors += [f"has {name}, which does not belong there" for name in sorted(found - expected)]
    if not re.fullmatch(rf"torch_fastclip-[\d.]+-{tag}\.whl", path.name):
        errors.append(f"has the wrong tag: expected {tag}")
    for error in errors:
        print(f"{path.name}: {error}", file=sys.stderr)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(found)} files")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
