"""Builds fastclip's native libraries, without torch; everything else is in pyproject.toml.

Environment: CXX, CPPFLAGS, CFLAGS, CXXFLAGS and LDFLAGS as usual, and
  FASTCLIP_PURE=1               pure Python: no compiled kernels, and no compiler needed
  FASTCLIP_WERROR=1             compiler warnings are errors
  USE_CUDA=0|1                  build without the CUDA library, or only with it; unset: with it where nvcc is found
  FASTCLIP_CUDA_ARCHS="90 120"  the GPU architectures to build for; the first one as PTX too, for all later ones
"""

import functools
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
CUDA_ARCHS = ["80", "90", "100", "120"]


def cxx_sources():
    sources = sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")))
    others = {stem for machine, stems in ISA_FLAGS.items() if machine != target_machine() for stem in stems}
    return [source for source in sources if Path(source).stem not in others]


def cuda_sources():
    sources = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/cuda/*.c*") if p.suffix in (".cu", ".cpp"))
    return [*sources, "csrc/op_arguments.cpp", "csrc/views.cpp"]


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


def host_compiler():
    """CXX without a launcher such as ccache, as nvcc takes it: the program, and its own arguments."""
    words = cxx()
    return words[1:] if len(words) > 1 and Path(words[0]).stem in ("ccache", "sccache", "distcc") else words


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
    if target_machine() != {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()):
        return f"CXX compiles for {target()}, and nvcc for {platform.machine()}"
    release = cuda_release()
    if not release or (int(release[1]), int(release[2])) < (12, 1):
        return f"{nvcc} is release {release[0].partition(' ')[2] if release else 'unknown'}, and 12.1 is needed"
    return None


@functools.cache
def cuda_release():
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    return re.search(r"release (\d+)\.(\d+)", text)


@functools.cache
def cuda_archs():
    if archs := re.findall(r"\w+", os.environ.get("FASTCLIP_CUDA_ARCHS", "").replace(".", "")):
        return archs
    known = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]


def extensions():
    """The libraries to build; none for a pure-Python install."""
    if is_pure():
        print("fastclip: building without compiled kernels, as FASTCLIP_PURE=1 asks", flush=True)
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
    archs = cuda_archs()
    flags = ["-O3", "-std=c++17", "-fmad=false", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)]
    flags += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}", "--threads=2"]
    flags += ["-Werror=all-warnings"] if WERROR else []
    program, *arguments = host_compiler()
    flags += [f"-ccbin={program}"] if os.environ.get("CXX") else []
    # nvcc splits at commas, and hands the rest to a shell.
    host = [*arguments, *HOST_FLAGS, *from_environment("CPPFLAGS", "CXXFLAGS")]
    flags += [f"-Xcompiler={shlex.quote(flag)}".replace(",", r"\,") for flag in host]
    libs = [f"-L{top[1].strip()}/lib64", f"-L{top[1].strip()}/lib", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return [nvcc, *flags], libs


def from_environment(*names):
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


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
        f"  command = {ninja_words([*cxx(), *cxx_flags])} $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {ninja_words(cxx())} $in -o $out {ninja_words(link_flags)} $libs",
        "rule stub",
        f"  command = {ninja_words(cxx())} -shared -nostdlib -x c {os.devnull} -Wl,-soname,libtorch.so -o $out",
        *(f"build {library}: stub" for library in stub),
    ]
    compiled, isa_flags = set(), ISA_FLAGS.get(target_machine(), {})
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
            lines.append(f"  isa_flags = {' '.join(isa_flags.get(Path(source).stem, []))}")
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
        archs = [*cuda_archs(), f"{cuda_archs()[0]}+PTX"]
        built |= {"cuda": ".".join(cuda_release().groups()), "archs": archs}
    return built


def sbom(version, libraries):
    """What is inside a wheel beside the project's own code, as CycloneDX: NVIDIA's runtime in the CUDA library."""
    ref = f"pkg:pypi/torch-fastclip@{version}"
    own = {"type": "library", "bom-ref": ref, "name": "torch-fastclip", "version": version, "purl": ref}
    own["licenses"] = [{"license": {"id": "BSD-3-Clause"}}]
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": own}}
    if len(libraries) > 1:
        cudart = {"type": "library", "bom-ref": "cudart", "name": "libcudart_static"}
        cudart |= {"version": facts(libraries)["cuda"], "supplier": {"name": "NVIDIA Corporation"}}
        cudart["licenses"] = [{"license": {"name": "NVIDIA CUDA Toolkit End User License Agreement"}}]
        bom["components"] = [cudart]
        bom["dependencies"] = [{"ref": ref, "dependsOn": ["cudart"]}]
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
