"""Compares the kernels of the CPU with numpy, without torch: check_values.py ISAS COMMAND [ISAS COMMAND ...]

Each command runs a program of tests/native/values.cpp, as "qemu-aarch64 ./values", for each of the ISAs, as
"scalar,neon": all of them must write the same bytes. An ISA that the machine lacks is skipped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import numpy as np

# In the order of csrc/clip.h; the elements of bfloat16 are those of float32 without their low half.
DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "float16": np.float16}
NORM_TYPES = (2.0, 1.0, np.inf, -np.inf)
# More than one chunk of 65,536, and a tail that fills no register; a coefficient of few bits, whose products lie
# between two numbers of 16 bits.
COUNT, MAX_NORM, COEF, BOUND = 70_003, 0.7, 0.75, 0.3


def wide(elements: np.ndarray) -> np.ndarray:
    """As float64, or for dtypes below it as the float32 in which they are multiplied."""
    if elements.dtype == np.uint16:
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements if elements.dtype == np.float64 else elements.astype(np.float32)


def rounded(numbers: np.ndarray, dtype: type) -> np.ndarray:
    if dtype is not np.uint16:
        return numbers.astype(dtype)
    bits = numbers.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def elements(dtype: type) -> np.ndarray:
    """Of every binade around 1, with zeros of both signs and subnormals of float16 among them."""
    generator = np.random.default_rng(7)
    numbers = generator.standard_normal(COUNT) * 2.0 ** generator.integers(-20, 4, COUNT)
    numbers[::97], numbers[5::97] = 0.0, -0.0
    return rounded(numbers, dtype)


def norm_of(x: np.ndarray, norm_type: float) -> float:
    return float(np.linalg.norm(wide(x).astype(np.longdouble), norm_type))


def check(written: bytes, x: np.ndarray) -> None:
    at, dtype = 0, x.dtype.type
    for norm_type in NORM_TYPES:
        (norm,) = np.frombuffer(written, np.float64, 1, at)
        np.testing.assert_allclose(norm, norm_of(x, norm_type), rtol=1e-14, err_msg=f"norm {norm_type}")
        coef = wide(x).dtype.type(min(1 / (norm + 1e-6) * MAX_NORM, 1.0))
        clipped = np.frombuffer(written, dtype, COUNT, at + 8)
        np.testing.assert_array_equal(clipped, rounded(wide(x) * coef, dtype), f"clipped by norm {norm_type}")
        at += 8 + x.nbytes
    scaled = np.frombuffer(written, dtype, COUNT, at)
    np.testing.assert_array_equal(scaled, rounded(wide(x) * wide(x).dtype.type(COEF), dtype), f"times {COEF}")
    at += x.nbytes
    bound = wide(rounded(np.array([BOUND]), dtype))[0]
    clipped = np.frombuffer(written, dtype, COUNT, at)
    np.testing.assert_array_equal(clipped, rounded(np.clip(wide(x), -bound, bound), dtype), "clipped by value")
    assert at + x.nbytes == len(written), "more was written than asked for"


def main() -> int:
    runs = [(isa, command) for isas, command in zip(*[iter(sys.argv[1:])] * 2, strict=True) for isa in isas.split(",")]
    for number, (name, dtype) in enumerate(DTYPES.items()):
        x, first, same = elements(dtype), None, []
        for isa, command in runs:
            arguments = [*shlex.split(command), *map(str, (number, MAX_NORM, COEF, BOUND, *NORM_TYPES))]
            environment = {**os.environ, "FASTCLIP_CPU_ISA": isa}
            ran = subprocess.run(arguments, input=x.tobytes(), capture_output=True, env=environment)
            said = ran.stderr.decode()
            if "on this machine" in said and isa in ("avx2", "avx512"):
                continue
            if ran.returncode or said != isa:
                sys.exit(f"{isa}: {command}: {said or ran.returncode}")
            check(ran.stdout, x)
            first = ran.stdout if first is None else first
            if ran.stdout != first:
                sys.exit(f"{name}, {isa}: {command}: not the bytes of {runs[0][0]}: {runs[0][1]}")
            same.append(isa)
        print(f"{name}: norms, products and bounds as numpy's; the same bytes from {', '.join(same)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
