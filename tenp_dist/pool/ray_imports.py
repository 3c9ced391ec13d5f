"""A node whose Python cannot import what the work needs: trying again would not help, so it is named at once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tenp_dist.errors import ClusterError, first_line

if TYPE_CHECKING:
    from tenp_dist.pool.ray_pool import RayPool


_ANSWER_SECONDS = 120.0  # until a node has tried


_NOT_IMPORTED = "failed to import on the worker"  # Ray of a function or class that a worker could not load


def import_error(pool: RayPool, error: Exception, code: str) -> ClusterError | None:
    """The error to raise instead of Ray's, where nodes cannot import; None where the cause is another.

    code: the module of the function or class that was to run. Every node is asked, by a task that needs nothing of
    this package.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, ImportError):  # of something that is imported on the way
        asked = _ask(pool, cause.name or code)
        there = [replace(one, found=_told(cause)) for one in asked if f"ip={one.address}" in str(error)]
        return _error(code, [one for one in asked if one.found] or there)
    if getattr(error, "actor_init_failed", False) or _NOT_IMPORTED in str(error):
        return _error(code, [one for one in _ask(pool, code) if one.found])
    return None


@dataclass(frozen=True)
class _Answer:
    """A node's, by its name in `each_node`: its Python, and what importing a module raised there, None if nothing."""

    node: str
    python: str
    found: str | None

    @property
    def address(self) -> str:
        return self.node.rpartition("(")[2].partition(",")[0]


def _ask(pool: RayPool, module: str) -> list[_Answer]:
    answers = []
    for node, reference in pool.nodes.each(_importer(), module).items():
        with contextlib.suppress(ClusterError):  # a node that has gone meanwhile
            answers.append(_Answer(node, *pool._get(reference, _ANSWER_SECONDS)))
    return answers


def _error(code: str, bad: Sequence[_Answer]) -> ClusterError | None:
    if not bad:
        return None
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return ClusterError(
        "A node cannot import what the work needs",
        where=f"node {bad[0].node}{more}: {code}",
        found=f"{bad[0].found} (Python {bad[0].python})",
        wanted=f"an environment like the driver's: {sys.executable}",
        next_step="install the same versions on every node and start Ray from there (`tenp-dist doctor --address` "
        "compares them), or leave the node out; then run the same command again",
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _importer() -> Callable[[str], tuple[str, str | None]]:
    """A function that Ray sends whole, because it is no module's own."""

    def attempt(module: str) -> tuple[str, str | None]:
        import importlib
        import sys

        try:
            importlib.import_module(module)
        except Exception as error:  # what it raises is the answer, and a broken library raises anything
            lines = str(error).strip().splitlines() or [""]
            return sys.executable, f"{type(error).__name__}: {lines[0]}"
        return sys.executable, None

    return attempt
