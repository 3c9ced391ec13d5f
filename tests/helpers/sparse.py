"""Published models at their true size in files that take no space, by `scripts/make_sparse_checkpoint.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from helpers.paths import ROOT


def sparse_checkpoint(like: str, folder: Path) -> Path:
    """Write it; every weight is a hole, zero. like: as the script names it."""
    return sparse_script().write_sparse(like, folder)


def sparse_script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_sparse_checkpoint", ROOT / "scripts/make_sparse_checkpoint.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look there
    spec.loader.exec_module(script)
    return script
