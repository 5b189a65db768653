"""Stands in for NVIDIA's libraries, gigabytes that a machine without a GPU never calls: stub_libraries.py TORCH_LIB OUT

Writes into OUT a library for every one of NVIDIA's that those in TORCH_LIB link to, with the symbols and versions that
they ask for; each function returns an error. torch then finds no CUDA device.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

NVIDIA = re.compile(r"lib(cu|nccl|nvshmem|nvrtc|nvJit|nvtx)")
# The driver is looked for by name, and missing on such a machine.
REAL = {"libcuda.so.1"}
# cudaErrorNoDevice, which torch takes without a warning.
NO_DEVICE = 100
# By the beginning of a function's name, for the libraries whose symbols have no versions; the longest one counts.
PREFIXES = {
    "cublas": "libcublas",
    "cublasLt": "libcublasLt",
    "cudnn": "libcudnn",
    "cuFile": "libcufile",
    "cufft": "libcufft",
    "cupti": "libcupti",
    "curand": "libcurand",
    "cusolver": "libcusolver",
    "cusparse": "libcusparse",
    "cusparseLt": "libcusparseLt",
    "nccl": "libnccl",
    "nvrtc": "libnvrtc",
    "nvshmem": "libnvshmem_host",
}


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def asked(folder: Path) -> tuple[set[str], dict[str, str], dict[str, set[str]]]:
    """What torch's libraries ask for: libraries, the library of each version, and the symbols of each version."""
    libraries, owners, symbols = set(), {}, defaultdict(set)
    for path in folder.glob("*.so*"):
        libraries |= {n for n in re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-dW", path)) if NVIDIA.match(n)}
        owner = ""
        for line in output("readelf", "-VW", path).splitlines():
            if found := re.search(r"File: (\S+)", line):
                owner = found[1]
            elif found := re.search(r"Name: (\S+)", line):
                owners[found[1]] = owner
        for symbol in re.findall(r" [Uw] (\S+)$", output("nm", "-D", "--undefined-only", path), re.MULTILINE):
            name, _, version = symbol.partition("@")
            symbols[version].add(name)
    return libraries - REAL, owners, symbols


def library_of(symbol: str) -> str | None:
    fitting = [prefix for prefix in PREFIXES if symbol.startswith(prefix)]
    return PREFIXES[max(fitting, key=len)] if fitting else None


def definition(function: str) -> str:
    if re.search("Error(String|Name)", function):
        return f'const char *{function}(void) {{ return "no device"; }}\n'
    return f"int {function}(void) {{ return {NO_DEVICE}; }}\n"


def main() -> int:
    folder, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    libraries, owners, symbols = asked(folder)
    for library in sorted(libraries):
        nodes = {version: symbols[version] for version, owner in owners.items() if owner == library}
        plain = {name for name in symbols[""] if library.startswith(f"{library_of(name)}.")}
        names = sorted(plain.union(*nodes.values()))
        source, script = out / "stub.c", out / "stub.map"
        source.write_text("".join(map(definition, names)))
        script.write_text("".join(f"{node} {{ global: {'; '.join(sorted(own))}; }};\n" for node, own in nodes.items()))
        flags = ["-shared", "-fPIC", "-fno-builtin", "-w", source, f"-Wl,-soname,{library}", "-o", out / library]
        subprocess.run(["cc", *flags, *([f"-Wl,--version-script={script}"] if nodes else [])], check=True)
        source.unlink()
        script.unlink()
    print(f"{len(libraries)} stubs of NVIDIA's libraries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
