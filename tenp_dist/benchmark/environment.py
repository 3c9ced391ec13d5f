"""The Python that runs lm-eval: of an environment that the job names, or of one that is made once and kept.

The one that is made sees all that is installed beside this package, in the same versions, and adds lm-eval and what
that needs: models load there as they do here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import uuid
import venv
from collections.abc import Callable
from pathlib import Path

from tenp_dist.artifacts import digest_of
from tenp_dist.errors import BenchmarkError

VERSION = "0.4.13"
REQUIREMENT = f"lm-eval[api]=={VERSION}"
_NEXT = "install it yourself (`pip install 'lm-eval[api,hf]'`) and set benchmark.python to that environment's python"


def harness_python(given: Path | None, announce: Callable[[str], None]) -> Path:
    """The Python to run lm-eval with.

    Args:
        given: the job's, None for that of an environment of our own, made if it is not there yet.
        announce: is told that one is made.

    Raises:
        BenchmarkError: there is no such Python, or lm-eval cannot be installed.
    """
    if given is None:
        folder = environment_folder()
        if not folder.is_dir():
            announce(f"installing lm-eval {VERSION} into {folder}")
            make_environment(folder)
        return _python_of(folder)
    if not given.is_file():
        raise BenchmarkError(
            "No such Python", where=given, wanted="python of an environment with lm-eval", next_step="correct the path"
        )
    return given


def environment_folder() -> Path:
    """Where our environment is, or goes: one for each environment of this package."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tenp-dist" / f"lm-eval-{VERSION}-{digest_of([sys.version, _packages()])[:12]}"


def make_environment(folder: Path, requirement: str = REQUIREMENT) -> None:
    """Make an environment that is there as a whole or not at all; others may be making the same one.

    Raises:
        BenchmarkError: the package cannot be installed; nothing is left.
    """
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        venv.create(made, with_pip=True, symlinks=True)
        _inherit(made)
        command = [str(_python_of(made)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr[-300:])
            raise BenchmarkError("lm-eval cannot be installed", where=requirement, found=found, next_step=_NEXT)
        if not folder.exists():
            made.rename(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkError(
            "No environment for lm-eval can be made", where=folder, found=error, next_step=_NEXT
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _inherit(folder: Path) -> None:
    """Let the environment see our packages, and those that a file of theirs points to."""
    own = next(folder.glob("lib/python*/site-packages"))
    lines = [f"import site; site.addsitedir({package!r})\n" for package in _packages()]
    (own / "inherited.pth").write_text("".join(lines), encoding="utf-8")


def _packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _python_of(folder: Path) -> Path:
    return folder / "bin" / "python"
