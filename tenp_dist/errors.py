"""Every failure a user can cause or meet, one class and one exit code each.

    TenpError                     1
    ├── JobError                  2   job file: unknown key, value out of range, missing path
    ├── SourceError               3   source checkpoint: missing, truncated, contradicts its config
    ├── UnsupportedModelError     4   not a MoE model, or a family without a table row
    ├── NumericalError            5   NaN or Inf in weights, activations or scores
    ├── CalibrationError          6   tokenizer mismatch, empty or too short text
    ├── BudgetError               7   infeasible retention, importance or alignment
    ├── OutputError               8   output folder not empty, file in the way
    ├── DiskFullError             9   no space left where a file has to go
    ├── DeviceError              10   no accelerator where one was asked for
    ├── ClusterError             11   cluster smaller than asked, or lost
    │   ├── Unplaced             11   no node takes a group of workers
    │   └── WorkerLost           11   one worker died; the engine starts it again
    ├── StaleError               12   scores, plan or checkpoint of another model, or missing
    ├── VerifyError              13   checkpoint differs from what the plan says
    ├── BenchmarkError           14   lm-eval missing or failing, unknown task, server that does not answer
    ├── MemoryFullError          15   no memory left, of an accelerator or a machine, for what a worker holds
    └── Interrupted             130   Ctrl-C or SIGTERM

A message says what failed, where, what was found, what was wanted and what to do next.
"""

from __future__ import annotations

from typing import Any


class TenpError(Exception):
    """Base of all errors that the command line prints without a traceback.

    Args:
        what: one sentence, the thing that failed.
        where: file, tensor, layer or job key.
        found: what was there.
        wanted: what should have been there.
        next_step: what the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        wanted: object = None,
        next_step: str | None = None,
    ):
        self.what = what
        self.where = where
        self.found = found
        self.wanted = wanted
        self.next_step = next_step
        super().__init__(what)

    def details(self) -> dict[str, str]:
        """The labelled parts that were given, in the order in which they are printed."""
        parts = {"where": self.where, "found": self.found, "wanted": self.wanted, "next": self.next_step}
        return {label: str(value) for label, value in parts.items() if value is not None}

    def __str__(self) -> str:
        lines = [self.what, *(f"  {label + ':':<8}{value}" for label, value in self.details().items())]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process borders with all its parts
        return _rebuild, (type(self), self.what, self.where, self.found, self.wanted, self.next_step)


def _rebuild(
    cls: type[TenpError], what: str, where: object, found: object, wanted: object, next_step: str | None
) -> TenpError:
    return cls(what, where=where, found=found, wanted=wanted, next_step=next_step)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class JobError(TenpError):
    exit_code = 2


class SourceError(TenpError):
    exit_code = 3


class UnsupportedModelError(TenpError):
    exit_code = 4


class NumericalError(TenpError):
    exit_code = 5


class CalibrationError(TenpError):
    exit_code = 6


class BudgetError(TenpError):
    exit_code = 7


class OutputError(TenpError):
    exit_code = 8


class DiskFullError(TenpError):
    exit_code = 9


class DeviceError(TenpError):
    exit_code = 10


class ClusterError(TenpError):
    exit_code = 11


class Unplaced(ClusterError):
    pass


class WorkerLost(ClusterError):
    pass


class StaleError(TenpError):
    exit_code = 12


class VerifyError(TenpError):
    exit_code = 13


class BenchmarkError(TenpError):
    exit_code = 14


class MemoryFullError(TenpError):
    exit_code = 15


class Interrupted(TenpError):
    exit_code = 130


def one_line(error: BaseException, most: int = 500) -> str:
    """Another library's whole message on one line, its type where it has none; cut after `most` characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]} ..."
