"""Something to do once a module has been imported, whoever imports it and whenever.

Stands alone: ``_startup/sitecustomize.py`` loads it without the package, which would import torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport:
    """A finder that leaves the finding to the others, and calls ``action`` after the module's own code has run."""

    def __init__(self, name: str, action: Callable[[], None], spec: ModuleSpec | None = None) -> None:
        self.name, self.action, self.spec = name, action, spec

    def install(self) -> AfterImport:
        sys.meta_path.insert(0, self)
        return self

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.remove()
        spec = self.spec or importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # A loader may serve several modules.
            if module.__name__ == name:
                self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
