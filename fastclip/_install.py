"""Which copy of fastclip this is, how it was built, and why a compiled library is not there."""

from __future__ import annotations

import functools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
DISTRIBUTION = "torch-fastclip"


@functools.cache
def facts() -> dict[str, Any] | None:
    """What the build wrote down of the compiled libraries; None where there are none."""
    try:
        return json.loads((PACKAGE / "build.json").read_text())
    except FileNotFoundError:
        return None


def is_source_tree() -> bool:
    return (PACKAGE.parent / "setup.py").exists() and (PACKAGE.parent / "csrc").exists()


@functools.cache
def hidden_copy() -> Path | None:
    """An installed fastclip that this one keeps from being imported."""
    for distribution in metadata.distributions(name=DISTRIBUTION):
        copy = Path(str(distribution.locate_file("fastclip")))
        if (copy / "__init__.py").exists() and copy.resolve() != PACKAGE:
            return copy
    return None


def why_not_built(library: str, without: str) -> str:
    """The reason why a compiled library is not beside this file.

    Args:
        library: the name of its file.
        without: what the build had to do without, if there was one.
    """
    if is_source_tree():
        if copy := hidden_copy():
            return (
                f"{library} was not built in the source tree {PACKAGE.parent}, from which fastclip was imported; "
                f"the one installed in {copy} is imported from other folders"
            )
        return f"{library} was not built in the source tree {PACKAGE.parent} (pip install -e . builds it)"
    if facts() is None:
        return f"{library} is not in this install, which is pure Python"
    return f"{library} was not built (no {without} at install time)"
