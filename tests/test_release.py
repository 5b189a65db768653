"""What is built and shipped: setup.py's decisions, without a compiler's work, and the names that users type."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastclip

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="an installed package has no sources beside it"
)

# Compiles nothing, at once: writes down what it was asked, and an empty file for it.
COMPILER = """#!/bin/sh
case "$*" in
  *-dumpmachine*) echo {target} ;;
  *--version*) echo "a compiler 1.0" ;;
  *) printf '%s\\n' "$@" >> "{log}"  # at once: several run beside each other
     while [ "$1" != -o ]; do shift; done; : > "$2" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, in a folder whose name a careless command line would split."""
    folder = tmp_path / "a folder, with = signs"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    for name in ("fastclip", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture
def compiler(tmp_path):
    """Makes a C++ compiler in a folder with a space in its name; the fixture's value makes one for a target."""

    def make(target: str = "x86_64-linux-gnu") -> Path:
        path = tmp_path / "my tools" / "c++"
        path.parent.mkdir()
        path.write_text(COMPILER.format(target=target, log=tmp_path / "log"))
        path.chmod(0o755)
        return path

    return make


def setup(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """`python setup.py arguments` with nothing on PATH but what env says."""
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "/bin", "USE_CUDA": "0", **env}, capture_output=True, text=True
    )


def wheel(folder: Path, *arguments: str, **env: str) -> Path:
    made = setup(folder, "--quiet", "bdist_wheel", *arguments, **env)
    assert made.returncode == 0, made.stderr
    (path,) = (folder / "dist").iterdir()
    return path


def test_without_a_compiler_a_build_fails_and_says_how_to_go_on(checkout, tmp_path):
    made = setup(checkout, "--quiet", "bdist_wheel", PATH=str(tmp_path / "nothing"))
    assert made.returncode != 0
    assert len(made.stderr.splitlines()) == 1
    assert made.stderr.startswith("fastclip: no C++ compiler found")
    assert "FASTCLIP_PURE=1" in made.stderr


def test_without_nvrtc(checkout, compiler, tmp_path):
    """The rest is built, and a line says so; who insists is told how to go on."""
    (tmp_path / "packages" / "nvidia").mkdir(parents=True)
    (tmp_path / "packages" / "nvidia" / "__init__.py").touch()
    env = {"CXX": f"'{compiler()}'", "PYTHONPATH": str(tmp_path / "packages"), "CUDA_HOME": str(tmp_path)}
    made = setup(checkout, "--quiet", "build_ext", **env, USE_CUDA="1")
    assert made.returncode != 0
    assert len(made.stderr.splitlines()) == 1
    assert made.stderr.startswith("fastclip: USE_CUDA=1, but NVRTC is missing")
    assert "pip install nvidia-cuda-nvrtc-cu12" in made.stderr
    made = setup(checkout, "--quiet", "bdist_wheel", **env, USE_CUDA="")
    assert made.returncode == 0, made.stderr
    (said,) = (line for line in made.stdout.splitlines() if line.startswith("fastclip: "))
    assert said.startswith("fastclip: building without the CUDA kernels: NVRTC is missing")
    (built,) = (checkout / "dist").iterdir()
    libraries = [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]
    assert libraries == ["fastclip/libfastclip_cpu.so"]


def test_pure(checkout, tmp_path):
    """No compiler, no library: neither that of an earlier build in the folder, nor a module that is gone since."""
    left = checkout / "build" / "lib" / "fastclip"
    left.mkdir(parents=True)
    (left / "libfastclip_cpu.so").touch()
    (left / "gone.py").touch()
    path = wheel(checkout, FASTCLIP_PURE="1", PATH=str(tmp_path / "nothing"))
    assert path.name == f"torch_fastclip-{fastclip.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(path).namelist()
    assert not [name for name in names if name.endswith((".so", "build.json", "gone.py"))]
    assert {"fastclip/py.typed", "fastclip/_startup/sitecustomize.py"} <= set(names)


def test_cpu_only_after_a_build_with_cuda(checkout, compiler):
    import setuptools

    tag = f"{'linux-x86_64' if sys.platform == 'linux' else '*'}-{sys.implementation.cache_tag}"
    left = checkout / "build" / f"lib.{tag}" / "fastclip"
    left.mkdir(parents=True)
    (left / "libfastclip_cuda.so").touch()
    in_place = checkout / "fastclip" / "libfastclip_cuda.so"
    in_place.touch()
    cxx = f"'{compiler()}'"
    names = zipfile.ZipFile(wheel(checkout, CXX=cxx)).namelist()
    assert "fastclip/libfastclip_cpu.so" in names, setuptools.__version__
    assert "fastclip/libfastclip_cuda.so" not in names
    assert in_place.exists()
    made = setup(checkout, "--quiet", "build_ext", "--inplace", CXX=cxx)
    assert made.returncode == 0, made.stderr
    assert not in_place.exists()
    assert (checkout / "fastclip" / "libfastclip_cpu.so").exists()
    assert json.loads((checkout / "fastclip" / "build.json").read_text()) == {
        "compiler": "a compiler 1.0",
        "target": "x86_64-linux-gnu",
    }


@pytest.mark.parametrize(
    ("target", "env", "tag"),
    [
        ("x86_64-linux-gnu", {}, "linux_x86_64"),
        ("aarch64-linux-gnu", {}, "linux_aarch64"),
        ("aarch64-linux-gnu", {"_PYTHON_HOST_PLATFORM": "linux-riscv64"}, "linux_riscv64"),
    ],
)
def test_a_wheel_is_tagged_for_what_the_compiler_compiles_for(checkout, compiler, target, env, tag):
    assert wheel(checkout, CXX=f"'{compiler(target)}'", **env).name.endswith(f"-py3-none-{tag}.whl")


def test_a_target_that_has_no_tag_is_an_error(checkout, compiler):
    made = setup(checkout, "--quiet", "bdist_wheel", CXX=f"'{compiler('x86_64-w64-windows-gnu')}'")
    assert made.returncode != 0
    assert "_PYTHON_HOST_PLATFORM" in made.stderr


def test_flags_arrive_whole_and_the_promised_arithmetic_comes_last(checkout, compiler, tmp_path):
    made = setup(
        checkout, "--quiet", "build_ext", "--inplace", CXX=f"'{compiler()}' -m64 '-DA=a, b'",
        CPPFLAGS="'-Iinclude, here'", CXXFLAGS="-Ofast", LDFLAGS="'-Lmy libs'",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    words = (tmp_path / "log").read_text().splitlines()
    assert {"-m64", "-DA=a, b", "-Iinclude, here", "-Lmy libs"} <= set(words)
    compiled = words[: words.index("-c") + 1]
    last = len(compiled) - compiled[::-1].index("-Ofast") - 1
    assert {"-fno-fast-math", "-ffp-contract=off"} <= set(compiled[last:])


@pytest.mark.parametrize(("name", "value"), [("FASTCLIP_PURE", "yes"), ("USE_CUDA", "on"), ("CXX", "no-such-compiler")])
def test_a_variable_with_a_wrong_value_is_named(checkout, name, value):
    made = setup(checkout, "--quiet", "bdist_wheel", **{name: value})
    assert made.returncode != 0
    assert len(made.stderr.splitlines()) == 1
    assert name in made.stderr
    assert value in made.stderr


def test_a_folder_that_cannot_be_written_is_named(checkout):
    """As root, whom permissions do not stop, a file in the place of the folder does."""
    (checkout / "build").touch()
    made = setup(checkout, "--quiet", "bdist_wheel")
    assert made.returncode != 0
    assert len(made.stderr.splitlines()) == 1
    assert f"{checkout / 'build'} cannot be written" in made.stderr


def test_the_sdist_has_what_its_tests_need(tmp_path):
    made = setup(ROOT, "--quiet", "sdist", "--dist-dir", str(tmp_path))
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    asked = {"README.md", "CHANGELOG.md", "NOTICE", "Makefile", "mkdocs.yml", "docs/trainers.md", ".ci/check_sass.py"}
    assert asked <= names
    assert not [name for name in names if name.startswith("build") or name.endswith((".so", ".pyc"))]


def sources() -> list[Path]:
    """All text that the repository has, but for this file."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    else:
        paths = [path for path in ROOT.rglob("*") if path.is_file() and "build" not in path.relative_to(ROOT).parts]
    text = {".py", ".md", ".toml", ".yml", ".yaml", ".cpp", ".h", ".cu", ".cuh", ".in", ""}
    return [path for path in paths if path.suffix in text and path.is_file() and path != Path(__file__).resolve()]


def test_nobody_is_told_to_install_a_strangers_package():
    """The distribution `fastclip` is somebody else's: ours is torch-fastclip, wherever one is named."""
    wrong = re.compile(
        r"(install\b[^\n`]*?|[\"'`])(?<!torch-)fastclip(\[|==|>=|@)|pip install [^\n]*(?<![-\w/.])fastclip\b"
    )
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sources()
        for match in [wrong.search(path.read_text())]
        if match
    ]
    assert not found


@pytest.mark.skipif(not shutil.which("git"), reason="a release is made from a commit")
def test_a_tag_that_is_not_the_version_is_refused(checkout):
    """That of the commit, and the one that is asked for; tags of other kinds are none of its business."""
    shutil.copytree(ROOT / ".ci", checkout / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(checkout)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "nightly"]):
        subprocess.run([*git, *command], check=True, capture_output=True)

    def release(*arguments: str) -> str:
        code = "import sys; sys.path[:0] = ['.ci']; import release as r; r.build = lambda *_: exit('built'); r.main()"
        command = [sys.executable, "-B", "-c", code, "--out", str(checkout.parent / "dist"), *arguments]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True).stderr.strip()

    refused = f"release: the tag is v9.9.9, and the version in fastclip/__init__.py {fastclip.__version__}"
    assert release() == "built"
    assert release("--tag", f"v{fastclip.__version__}") == "built"
    assert release("--tag", "v9.9.9") == refused
    subprocess.run([*git, "tag", f"v{fastclip.__version__}"], check=True)
    assert release() == "built"
    subprocess.run([*git, "tag", "v9.9.9"], check=True)
    assert release() == refused


def test_version_is_in_one_place():
    """And the newest entry of the change log is its own."""
    assert re.search(r'^dynamic = \["version"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[:2] == ["Unreleased", fastclip.__version__]
