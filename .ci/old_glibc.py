"""Makes libraries linked here load on an older glibc: stubs that offer the linker the old versions of its symbols.

A linker binds a symbol to its default version, the newest. Where that is above the ceiling and an older version is
still there, the stub offers only the older one; `-L` with the stubs' folder comes before the system's.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

# Of which library a symbol was a part before glibc 2.34 took it into libc.
HOMES = {"dl": r"dl\w+", "rt": r"(shm|mq|aio|lio|timer)_\w+", "pthread": r"(pthread|sem)_\w+", "m": ""}
SONAMES = {"dl": "libdl.so.2", "rt": "librt.so.1", "pthread": "libpthread.so.0", "m": "libm.so.6"}


def versions(library: str) -> dict[str, tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Of each symbol that a library defines the default version, and the older ones."""
    printed = subprocess.run(
        ["readelf", "--dyn-syms", "-W", library], check=True, capture_output=True, text=True
    ).stdout
    found = defaultdict(lambda: ((), []))
    for name, default, version in re.findall(r" (\w+)@(@?)GLIBC_([\d.]+)$", printed, re.MULTILINE):
        number = tuple(map(int, version.split(".")))
        newest, older = found[name]
        found[name] = (number, older) if default else (newest, [*older, number])
    return found


def old_versions(cxx: Sequence[str], ceiling: tuple[int, ...]) -> dict[str, dict[str, list[str]]]:
    """The stubs to make: library -> version -> symbols, for what the compiler's own C library has above the ceiling.

    That of libm has all of its symbols, because the linker takes no second library of the same name.
    """
    stubs = defaultdict(lambda: defaultdict(list))
    for library in ("libc.so.6", "libm.so.6"):
        found = versions(path_of(cxx, library))
        for name, (newest, older) in sorted(found.items()):
            home = "m" if library == "libm.so.6" else next((h for h, p in HOMES.items() if re.fullmatch(p, name)), None)
            fitting = [version for version in (newest, *older) if version and version <= ceiling]
            if home and fitting and (home == "m" or newest > ceiling):
                stubs[home]["GLIBC_" + ".".join(map(str, max(fitting)))].append(name)
    return stubs


def path_of(cxx: Sequence[str], file: str) -> str:
    return subprocess.run([*cxx, f"-print-file-name={file}"], check=True, capture_output=True, text=True).stdout.strip()


def write_stubs(cxx: Sequence[str], ceiling: tuple[int, ...], folder: Path) -> list[str]:
    """Writes the stubs into a folder; returns the linker's arguments that use them."""
    stubs = old_versions(cxx, ceiling)
    for home, nodes in stubs.items():
        source, script = folder / f"{home}.c", folder / f"{home}.map"
        names = [name for symbols in nodes.values() for name in symbols]
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        script.write_text("".join(f"{node} {{ global: {'; '.join(names)}; }};\n" for node, names in nodes.items()))
        flags = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", "-x", "c", source, "-x", "none"]
        flags += [f"-Wl,-soname,{SONAMES[home]}", f"-Wl,--version-script={script}", "-o", folder / f"lib{home}.so"]
        subprocess.run([*cxx, *flags], check=True)
    return [f"-L{folder}"]
