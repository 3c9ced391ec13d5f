"""What all commands share: help with examples, and an end in which every error becomes a message and its exit code."""

from __future__ import annotations

import _thread
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tenp_dist.errors import Interrupted, TenpError, one_line


def with_examples(name: str, text: str, examples: Sequence[str]) -> str:
    """A command's help text."""
    lines = "\n".join(f"  tenp-dist {name} {example}" for example in examples)
    return f"{text}\n\n\b\nExamples:\n{lines}"


@contextlib.contextmanager
def exit_on_error(*, as_json: bool = False, debug: bool = False) -> Iterator[None]:
    """Run a command's body; errors are printed and become the exit code. debug: they come through instead."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        sys.unraisablehook = _raise_swallowed_signal
        yield
    except (TenpError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted(
                "Interrupted", next_step="run the same command again: finished stages, layers and shards are kept"
            )
        if debug:
            raise
        _fail(error, as_json)
    except Exception as error:  # outermost: whatever nobody foresaw still ends in a message
        if debug:
            raise
        _fail(_unexpected(error), as_json)


def _unexpected(error: Exception) -> TenpError:
    cause = getattr(error, "cause", None) or error  # Ray wraps what a worker raised
    return TenpError(
        f"Unexpected {type(cause).__name__}: {one_line(cause)}",
        next_step="run again with --debug for the traceback; finished stages, layers and shards are kept",
    )


def _fail(error: TenpError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": type(error).__name__, "message": error.what, **error.details()}, indent=2))
    click.echo(click.style("Error: ", fg="red", bold=True) + str(error), err=True)
    sys.exit(error.exit_code)


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _raise_swallowed_signal(unraisable: Any) -> None:
    """A signal that came while Python lets no exception out, as in a callback of its import system, comes once more."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main, (signal.SIGTERM,)).start()
    else:
        sys.__unraisablehook__(unraisable)
