"""What `python -m fastclip run` puts on PYTHONPATH: python imports it at its start, in every child process, too.

It replaces torch's clip functions when, and if, the process imports torch.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent
_PACKAGE = _FOLDER.parent


def _spec(name, path, **options):
    return importlib.util.spec_from_file_location(name, path, **options)


def _import_fastclip():
    # The program may have begun to import it, and torch from there: then it is patched at the end of that import.
    if "fastclip" not in sys.modules:
        import fastclip  # noqa: F401


def _patch():
    fastclip = sys.modules["fastclip"]
    if log := os.environ.get("FASTCLIP_MONITOR"):
        from fastclip.monitor import watched_process

        sys.modules["fastclip.patch"].overlay(watched_process(log))
    else:
        fastclip.patch()


def _install():
    spec = _spec("_fastclip_after_import", _PACKAGE / "_after_import.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The package that runs the program, wherever it is, and not another one on the program's path.
    package = _spec("fastclip", _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)])
    module.AfterImport("fastclip", _patch, package).install()
    module.AfterImport("torch", _import_fastclip).install()


def _import_the_next():
    """The module of this name that python would have imported without this one."""
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _FOLDER.resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec and spec.loader:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_install()
_import_the_next()
