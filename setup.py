"""Builds fastclip's native libraries, without torch; everything else is in pyproject.toml.

Environment: CXX, CPPFLAGS, CFLAGS, CXXFLAGS and LDFLAGS as usual, and
  FASTCLIP_PURE=1               pure Python: no compiled kernels, and no compiler needed
  FASTCLIP_WERROR=1             compiler warnings are errors
  USE_CUDA=0|1                  build without the CUDA library, or only with it; unset: with it where NVRTC is found,
                                in nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 or a toolkit in CUDA_HOME
  FASTCLIP_CUDA_ARCHS="90 120"  the GPU architectures to build for
  FASTCLIP_CUDA_FLAGS           more options for NVRTC, such as -DNAME=VALUE, which the host code is given, too
"""

import functools
import importlib.util
import json
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
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/native")  # relative to ROOT, where ninja runs; one place, so that every build is incremental
WERROR = os.environ.get("FASTCLIP_WERROR") == "1"
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}

HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffunction-sections", "-Wall", "-Wextra"]
# After the user's own flags: NaN, infinities and the order of additions are part of what the kernels promise.
VALUE_FLAGS = ["-fno-fast-math", "-ffp-contract=off"]
# The files of one ISA each, by the machine that has it, and what it takes to compile them.
ISA_FLAGS = {
    "x86_64": {
        "loops_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "loops_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    },
    "aarch64": {"loops_neon": []},
}
CUDA_ARCHS = ["75", "80", "90", "100", "120"]
# Of this one there is PTX, too, for all that come after it: its code knows bfloat16, and it is below 11.0, which has no
# code of its own.
PTX_ARCH = "90"
NVRTC = ROOT / "csrc" / "cuda" / "nvrtc.py"


def cxx_sources():
    sources = sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")))
    others = {stem for machine, stems in ISA_FLAGS.items() if machine != target_machine() for stem in stems}
    return [source for source in sources if Path(source).stem not in others]


def cuda_sources():
    sources = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/cuda/*.cpp"))
    return [*sources, f"{BUILD}/cuda/images.cpp", "csrc/op_arguments.cpp", "csrc/views.cpp"]


def is_pure():
    choice = os.environ.get("FASTCLIP_PURE", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fastclip: FASTCLIP_PURE must be 0, 1 or unset, got {choice!r}")
    # The sources have not been ported to Windows: there no compiler would help.
    return choice == "1" or (choice == "" and sys.platform == "win32")


@functools.cache
def cxx():
    """The command line of the C++ compiler, as words."""
    if words := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(words[0]):
            sys.exit(f"fastclip: CXX={os.environ['CXX']} is not an executable on PATH")
        return words
    if name := next(filter(shutil.which, ("c++", "g++", "clang++")), None):
        return [name]
    sys.exit(
        "fastclip: no C++ compiler found (looked for CXX, c++, g++, clang++): install one, "
        "or set FASTCLIP_PURE=1 for an install without compiled kernels"
    )


@functools.cache
def target():
    """What CXX compiles for, such as "aarch64-linux-gnu"."""
    printed = subprocess.run([*cxx(), "-dumpmachine"], capture_output=True, text=True).stdout.strip()
    return printed or f"{platform.machine()}-{sys.platform}"


def target_machine():
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name := target().partition("-")[0].lower(), name)


def platform_tag(host):
    """The platform of a wheel's name: the host's, as setuptools gives it, with the machine that CXX compiles for."""
    system = re.match(r"linux|macosx_\d+_\d+|", host)[0]
    if not system or ("apple" in target()) != system.startswith("macosx") or "windows" in target():
        sys.exit(f"fastclip: CXX compiles for {target()}: set _PYTHON_HOST_PLATFORM to the wheel's platform")
    machine = "arm64" if target_machine() == "aarch64" and system != "linux" else target_machine()
    return f"{system}_{machine}"


@functools.cache
def nvrtc():
    """The module that compiles the device code; and the NVRTC that it found, or why it found none."""
    spec = importlib.util.spec_from_file_location("nvrtc", NVRTC)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nvrtc"] = module
    spec.loader.exec_module(module)
    return module, module.find()


def wants_cuda():
    choice = os.environ.get("USE_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"fastclip: USE_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return False
    if "linux" not in target():
        missing = f"CXX compiles for {target()}, and the CUDA library is for Linux"
    else:
        module, found = nvrtc()
        missing = isinstance(found, str) and f"NVRTC is missing ({found}): pip install {module.PACKAGES}"
    if missing and choice == "1":
        sys.exit(f"fastclip: USE_CUDA=1, but {missing}")
    if missing:
        print(f"fastclip: building without the CUDA kernels: {missing}", flush=True)
    return not missing


@functools.cache
def cuda_archs():
    if archs := re.findall(r"\w+", os.environ.get("FASTCLIP_CUDA_ARCHS", "").replace(".", "")):
        return archs
    _, found = nvrtc()
    return [arch for arch in CUDA_ARCHS if arch in found.archs]


def ptx_arch():
    return PTX_ARCH if PTX_ARCH in cuda_archs() else cuda_archs()[0]


def extensions():
    """The libraries to build; none for a pure-Python install."""
    if is_pure():
        print("fastclip: building without compiled kernels, as FASTCLIP_PURE=1 asks", flush=True)
        return []
    libraries = [Extension("fastclip.libfastclip_cpu", cxx_sources())]
    if wants_cuda():
        libraries.append(Extension("fastclip.libfastclip_cuda", cuda_sources()))
    return libraries


def device_code(out):
    """The part of build.ninja that makes the C++ file `out` of the device code, with the code of each architecture."""
    _, found = nvrtc()
    python = [sys.executable, NVRTC.relative_to(ROOT).as_posix()]
    flags = [*(["--warnings-are-errors"] if WERROR else []), *from_environment("FASTCLIP_CUDA_FLAGS")]
    compiled = ninja_words([*python, "compile", found.library, found.include])
    codes = [f"{BUILD}/cuda/sm_{arch}.cubin" for arch in cuda_archs()] + [f"{BUILD}/cuda/compute_{ptx_arch()}.ptx"]
    names = [f"{Path(code).with_suffix('.names')}" for code in codes]
    read = [p.relative_to(ROOT).as_posix() for p in sorted((*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*")))]
    read = " ".join(file for file in read if not file.endswith(".cpp"))
    lines = ["rule nvrtc", f"  command = {compiled} $arch $out {ninja_words(flags)}"]
    for code, name in zip(codes, names, strict=True):
        lines += [f"build {code} {name}: nvrtc | {read}", f"  arch = {Path(code).stem}"]
    version = 1000 * found.version[0] + 10 * found.version[1]
    collected = ninja_words([*python, "collect", out, str(version), names[0], *codes])
    return [*lines, "rule collect", f"  command = {collected}", f"build {out}: collect | {' '.join([*codes, *names])}"]


def from_environment(*names):
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def flags_of(source):
    """What only one file is compiled with; host code shares the macros of the device code."""
    if source.startswith("csrc/cuda/"):
        return [flag for flag in from_environment("FASTCLIP_CUDA_FLAGS") if flag.startswith("-D")]
    return ISA_FLAGS.get(target_machine(), {}).get(Path(source).stem, [])


def ninja_words(words):
    return shlex.join(words).replace("$", "$$")


def build_ninja(libraries):
    """The text of build.ninja. Linux libraries link to an empty libtorch.so: torch brings the symbols at load time."""
    cxx_flags = ["-O3", "-std=c++17", *HOST_FLAGS, *(["-Werror"] if WERROR else [])]
    cxx_flags += [*from_environment("CPPFLAGS", "CFLAGS", "CXXFLAGS"), *VALUE_FLAGS]
    link_flags, stub = ["-shared", "-undefined", "dynamic_lookup"], []
    if "apple" not in target():
        stub = [f"{BUILD}/stub/libtorch.so"]
        link_flags = ["-shared", f"-L{BUILD}/stub", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        link_flags += ["-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,-s"]
    link_flags += from_environment("LDFLAGS")
    lines = [
        f"builddir = {BUILD}",
        "rule cxx",
        f"  command = {ninja_words([*cxx(), *cxx_flags])} $own_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {ninja_words(cxx())} $in -o $out {ninja_words(link_flags)} $libs",
        "rule stub",
        f"  command = {ninja_words(cxx())} -shared -nostdlib -x c {os.devnull} -Wl,-soname,libtorch.so -o $out",
        *(f"build {library}: stub" for library in stub),
    ]
    compiled = set()
    for library in libraries:
        objects, libs = [], []
        if images := next((source for source in library.sources if source.endswith("images.cpp")), None):
            lines += device_code(images)
            libs = ["-ldl"]
        for source in library.sources:
            objects.append(f"{BUILD}/{source.removeprefix(f'{BUILD}/')}.o")
            if source in compiled:
                continue
            compiled.add(source)
            lines.append(f"build {objects[-1]}: cxx {source}")
            lines.append(f"  own_flags = {ninja_words(flags_of(source))}")
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


def facts(libraries):
    """How the libraries were built, for `python -m fastclip info`; nothing of it depends on the folder."""
    printed = subprocess.run([*cxx(), "--version"], capture_output=True, text=True).stdout
    built = {"compiler": printed.partition("\n")[0], "target": target()}
    if len(libraries) > 1:
        built |= {"cuda": ".".join(map(str, nvrtc()[1].version)), "archs": [*cuda_archs(), f"{ptx_arch()}+PTX"]}
    return built


def sbom(version, libraries):
    """What is inside a wheel beside the project's own code, as CycloneDX: the math functions of the device code."""
    ref = f"pkg:pypi/torch-fastclip@{version}"
    own = {"type": "library", "bom-ref": ref, "name": "torch-fastclip", "version": version, "purl": ref}
    own["licenses"] = [{"license": {"id": "BSD-3-Clause"}}]
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": own}}
    if len(libraries) > 1:
        math = {"type": "library", "bom-ref": "libdevice", "name": "libdevice", "version": facts(libraries)["cuda"]}
        math |= {"supplier": {"name": "NVIDIA Corporation"}}
        math["licenses"] = [{"license": {"name": "NVIDIA CUDA Toolkit End User License Agreement"}}]
        bom["components"] = [math]
        bom["dependencies"] = [{"ref": ref, "dependsOn": ["libdevice"]}]
    return bom


def long_description(version):
    """The README as a package index shows it: there no relative link leads anywhere.

    They become absolute, and those of this version, with the Repository of [project.urls]; without one, plain words.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    url = re.search(r'^Repository = "(.+?)/?"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)

    def absolute(link):
        image, words, path = link.groups()
        if url:
            return f"{image}[{words}]({url[1]}/{'raw' if image else 'blob'}/v{version}/{path})"
        return "" if image else words

    return re.sub(r"(!?)\[([^]]+)\]\((?!\w+:|#)([^)]+)\)", absolute, text)


class Build(build):
    def run(self):
        # A library or a module of an earlier build in this folder would be shipped, too.
        shutil.rmtree(Path(self.build_lib, "fastclip"), ignore_errors=True)
        super().run()


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
            built = Path(self.get_ext_fullpath(library.name))
            built.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / BUILD / library_file(library)), str(built))
        built.with_name("build.json").write_text(json.dumps(facts(self.extensions), indent=1) + "\n")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if self.extensions:
            self.copy_file(str(Path(self.build_lib, "fastclip", "build.json")), str(ROOT / "fastclip"))


class SourceDist(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [name for name in files if Path(name).parts[0] != "build"])


class Wheel(bdist_wheel):
    def get_tag(self):
        host = super().get_tag()[2]
        if self.root_is_pure:
            return super().get_tag()
        named = self.plat_name_supplied or os.environ.get("_PYTHON_HOST_PLATFORM")
        return "py3", "none", host if named else platform_tag(host)

    def write_wheelfile(self, wheelfile_base, **generator):
        super().write_wheelfile(wheelfile_base, **generator)
        path = Path(wheelfile_base, "sboms", "torch-fastclip.cdx.json")
        path.parent.mkdir()
        bom = sbom(self.distribution.get_version(), self.distribution.ext_modules)
        path.write_text(json.dumps(bom, indent=1) + "\n")


def libraries_to_build():
    """Those of the command that runs. In place, what an earlier build left and this one does not make is removed."""
    if not BUILD_COMMANDS & set(sys.argv):
        return []
    libraries = extensions()
    if {"develop", "editable_wheel", "--inplace", "-i"} & set(sys.argv):
        kept = {library_file(library) for library in libraries} | ({"build.json"} if libraries else set())
        for path in (*ROOT.glob("fastclip/libfastclip_*.so"), ROOT / "fastclip" / "build.json"):
            if path.name not in kept:
                path.unlink(missing_ok=True)
    return libraries


try:
    (ROOT / "build").mkdir(exist_ok=True)
    writable = os.access(ROOT / "build", os.W_OK)
except OSError:
    writable = False
if not writable:
    sys.exit(f"fastclip: {ROOT / 'build'} cannot be written, and the build needs it: build in a copy of this folder")

version = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastclip" / "__init__.py").read_text(), re.MULTILINE)[1]
setup(
    long_description=long_description(version),
    long_description_content_type="text/markdown",
    ext_modules=libraries_to_build(),
    cmdclass={"build": Build, "build_ext": BuildLibraries, "sdist": SourceDist, "bdist_wheel": Wheel},
    options={"egg_info": {"egg_base": "build"}},  # no egg-info in the checkout
)
