"""Builds fastclip's native libraries, without torch; everything else is in pyproject.toml.

Environment: CXX, CPPFLAGS, CFLAGS, CXXFLAGS and LDFLAGS as usual, and
  FASTCLIP_REQUIRE_NATIVE=1     no C++ compiler is an error, not an install as pure Python
  FASTCLIP_WERROR=1             compiler warnings are errors
  USE_CUDA=0|1                  build without the CUDA library, or only with it; unset: with it where nvcc is found
  FASTCLIP_CUDA_ARCHS="90 120"  the GPU architectures to build for; the first one as PTX too, for all later ones
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/native")  # relative to ROOT, where ninja runs; one place, so that every build is incremental
WERROR = os.environ.get("FASTCLIP_WERROR") == "1"
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}

CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffunction-sections"),
    *("-Wall", "-Wextra", "-ffp-contract=off", f"-ffile-prefix-map={ROOT}=."),
]
X86_ISA_FLAGS = {
    "loops_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "loops_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
CUDA_ARCHS = ["80", "90", "100", "120"]


def cxx_sources():
    sources = sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")))
    if target_is_x86():
        return sources
    return [source for source in sources if Path(source).stem not in X86_ISA_FLAGS]


def cuda_sources():
    sources = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/cuda/*.c*") if p.suffix in (".cu", ".cpp"))
    return [*sources, "csrc/op_arguments.cpp", "csrc/views.cpp"]


def find_cxx():
    """The C++ compiler as a list of words, or None. A CXX that is not there is an error, not a reason to go on."""
    if cxx := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(cxx[0]):
            sys.exit(f"fastclip: CXX={os.environ['CXX']} is not an executable on PATH")
        return cxx
    if sys.platform == "win32":
        return None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def target_is_x86():
    triple = subprocess.run([*CXX, "-dumpmachine"], capture_output=True, text=True).stdout
    return (triple or platform.machine()).startswith(("x86_64", "amd64"))


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")]))


def wants_cuda():
    choice = os.environ.get("USE_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fastclip: USE_CUDA must be 0, 1 or unset, got {choice!r}")
    missing = choice != "0" and why_not_cuda()
    if missing and choice == "1":
        sys.exit(f"fastclip: USE_CUDA=1, but {missing}")
    if missing:
        print(f"fastclip: {missing}: building without the CUDA kernels", flush=True)
    return choice != "0" and not missing


def why_not_cuda():
    """Why the CUDA library cannot be built; None where it can. Arguments of more than 4 KB came with CUDA 12.1."""
    if not (nvcc := find_nvcc()):
        return "no nvcc is on PATH or in CUDA_HOME"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if not release or (int(release[1]), int(release[2])) < (12, 1):
        return f"{nvcc} is release {release[0].partition(' ')[2] if release else 'unknown'}, and 12.1 is needed"
    return None


def extensions():
    """The libraries to build; none without a C++ compiler, which makes the install pure Python."""
    if CXX is None:
        message = "fastclip: no C++ compiler found (looked for CXX, c++, g++, clang++)"
        if os.environ.get("FASTCLIP_REQUIRE_NATIVE") == "1":
            sys.exit(f"{message}, and FASTCLIP_REQUIRE_NATIVE=1 asks for the native library")
        print(f"{message}: installing as pure Python, only the eager backend will be available", flush=True)
        return []
    libraries = [Extension("fastclip.libfastclip_cpu", cxx_sources())]
    if wants_cuda():
        libraries.append(Extension("fastclip.libfastclip_cuda", cuda_sources()))
    return libraries


def cuda_commands():
    """The toolkit's part of build.ninja: the nvcc command line, and where cudart is."""
    nvcc = find_nvcc()
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    if not top:
        sys.exit(f"fastclip: {nvcc} --dryrun names no toolkit (TOP=); it printed:\n{dry.stderr}")
    archs = re.findall(r"\w+", os.environ.get("FASTCLIP_CUDA_ARCHS", "").replace(".", ""))
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    flags = ["-O3", "-std=c++17", "-fmad=false", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)]
    flags += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}", "--threads=2"]
    flags += ["-Xcompiler=" + ",".join(f for f in CXX_FLAGS[2:] if f != "-ffp-contract=off")]
    flags += ["-Werror=all-warnings"] if WERROR else []
    flags += [f"-ccbin={CXX[-1]}"] if os.environ.get("CXX") else []
    libs = [f"-L{top[1].strip()}/lib64", f"-L{top[1].strip()}/lib", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return [nvcc, *flags], libs


def ninja_words(words):
    return shlex.join(words).replace("$", "$$")


def build_ninja(libraries):
    """The text of build.ninja. Linux libraries link to an empty libtorch.so: torch brings the symbols at load time."""
    env = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")}
    cxx_flags = CXX_FLAGS + (["-Werror"] if WERROR else []) + env["CPPFLAGS"] + env["CFLAGS"] + env["CXXFLAGS"]
    link_flags, stub = ["-shared", "-undefined", "dynamic_lookup"], []
    if sys.platform != "darwin":
        stub = [f"{BUILD}/stub/libtorch.so"]
        link_flags = ["-shared", f"-L{BUILD}/stub", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        link_flags += ["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,-s"]
    lines = [
        f"builddir = {BUILD}",
        "rule cxx",
        f"  command = {ninja_words([*CXX, *cxx_flags])} $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {ninja_words(CXX)} $in -o $out {ninja_words([*link_flags, *env['LDFLAGS']])} $libs",
        "rule stub",
        f"  command = {ninja_words(CXX)} -shared -nostdlib -x c {os.devnull} -Wl,-soname,libtorch.so -o $out",
        *(f"build {library}: stub" for library in stub),
    ]
    compiled = set()
    for library in libraries:
        objects, libs = [], []
        if any(source.endswith(".cu") for source in library.sources):
            nvcc, libs = cuda_commands()
            lines += ["rule nvcc", f"  command = {ninja_words(nvcc)} -MMD -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
        for source in library.sources:
            objects.append(f"{BUILD}/{source}.o")
            if source in compiled:
                continue
            compiled.add(source)
            lines.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'cxx'} {source}")
            lines.append(f"  isa_flags = {' '.join(X86_ISA_FLAGS.get(Path(source).stem, []))}")
        lines.append(f"build {BUILD}/{library_file(library)}: link {' '.join(objects)} | {' '.join(stub)}")
        lines.append(f"  libs = {ninja_words(libs)}")
    return "\n".join([*lines, ""])


def library_file(library):
    return library.name.rpartition(".")[2] + ".so"


def find_ninja():
    try:
        from ninja import BIN_DIR  # the package's own binary, also where its folder is not on PATH
    except ImportError:
        return shutil.which("ninja") or sys.exit("fastclip: ninja is missing: pip install ninja")
    return str(Path(BIN_DIR, "ninja"))


class BuildLibraries(build_ext):
    """The libraries are not Python extension modules: torch loads them, so their names carry no Python version."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self):
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        (ROOT / BUILD / "build.ninja").write_text(build_ninja(self.extensions))
        sys.stdout.flush()
        if subprocess.run([find_ninja(), "-f", f"{BUILD}/build.ninja"], cwd=ROOT).returncode:
            sys.exit("fastclip: the native build failed; the output of the compiler is above")
        for library in self.extensions:
            target = Path(self.get_ext_fullpath(library.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / BUILD / library_file(library)), str(target))


class Wheel(bdist_wheel):
    def get_tag(self):
        return super().get_tag() if self.root_is_pure else ("py3", "none", super().get_tag()[2])


CXX = find_cxx()
(ROOT / "build").mkdir(exist_ok=True)

setup(
    ext_modules=extensions() if BUILD_COMMANDS & set(sys.argv) else [],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    options={"egg_info": {"egg_base": "build"}},  # no fastclip.egg-info in the checkout
)
