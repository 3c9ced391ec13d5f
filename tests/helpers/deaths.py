"""What goes wrong in tests of recovery: runs cut at every write, workers killed at a chosen point of their work."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenp_dist.passes.layer_sums import LayerSumStep
from tenp_dist.passes.layer_worker import LayerWorker


class PowerCut(Exception):
    """No handler of ours sees it."""


def cuts(monkeypatch, module: Any, name: str, run: Callable[[Path], Any], folder: Path) -> Iterator[Path]:
    """Run in a folder of its own with the n-th call of `module.name` failing, for every n that there is.

    Yields each folder as the cut run left it, the function whole again.
    """
    for cut in range(1, 40):
        own = folder / f"cut-{cut}"
        own.mkdir()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing(getattr(module, name), cut))
                run(own)
        except PowerCut:
            yield own
        else:
            return
    raise AssertionError("more writes than thought of")


def failing(function: Callable, call: int) -> Callable:
    """The function, whose n-th call is a power cut."""
    calls = itertools.count(1)

    def wrapped(*arguments, **options):
        if next(calls) == call:
            raise PowerCut
        return function(*arguments, **options)

    return wrapped


@dataclass(frozen=True)
class Death:
    """A `kill -9`, or a hang, at one point of a worker's work.

    point: `open`, before the ranks of the shard that begins with the layer meet; `pass`, when a wave is through the
    layer; `boundary`, when what a wave enters the layer with is stored; `result`, when a rank's sums of the layer are.
    ranks: of the shard, those that die together. whom: the process that each of them ends, itself or (`os.getppid`)
    the raylet that it lives under. signal: SIGSTOP stops the process, 0 lets it live with its work hanging.
    """

    point: str
    layer: int
    wave: int | None = None
    ranks: Sequence[int] = (0,)
    whom: Callable[[], int] = os.getpid
    signal: int = signal.SIGKILL

    def strike(self, point: str, layer: int, wave: int | None, rank: int, marks: Path) -> None:
        """Once a rank, and at once for all ranks."""
        if (point, layer, wave, rank in self.ranks) != (self.point, self.layer, self.wave, True):
            return
        mine, *others = (marks / f"{self.point}-{layer}-{one}" for one in (rank, *self.ranks))
        if mine.exists():
            return
        mine.touch()
        while not all(mark.exists() for mark in others):
            time.sleep(0.001)
        os.kill(self.whom(), self.signal)
        # a worker that lives on is still at its unit when its node counts as dead
        time.sleep(5 if self.signal == signal.SIGKILL else 600)


def mortal(worker: type[LayerWorker], deaths: Sequence[Death], marks: Path) -> type[LayerWorker]:
    """The worker with these deaths ahead of it. marks: folder where they are noted.

    What its step, its files and its sums do is struck right behind each call, on the thread that makes the call.
    """

    class Mortal(worker):
        def open(self):
            self._strike("open", self.layers.start, None)
            super().open()
            files, step = self.hidden_state_files, self.step
            files.write = self._struck(files.write, lambda wave, layer, hidden: ("boundary", layer, wave))
            step.take = self._struck(step.take, lambda layer, wave, module, hidden: ("pass", layer, wave))
            if isinstance(step, LayerSumStep):
                sums = step.layer_sum
                sums.finish = self._struck(sums.finish, lambda layer, sums, weights: ("result", layer, None))

        def _struck(self, function, point):
            def call(*arguments):
                function(*arguments)
                self._strike(*point(*arguments))

            return call

        def _strike(self, point, layer, wave):
            for death in deaths:
                death.strike(point, layer, wave, self.rank, marks)

    return Mortal


def lives(monkeypatch, pool, marks: Path, *deaths: Death) -> Callable[[], int]:
    """The workers of a Ray pool are mortal from now on; returns what counts those that have died."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what lies in tests/
    real = type(pool).groups
    marks.mkdir()
    monkeypatch.setattr(pool, "groups", lambda worker, *rest: real(pool, mortal(worker, deaths, marks), *rest))
    return lambda: len(list(marks.iterdir()))


_UNIT = re.compile(r"layers? (\d+)(?:-(\d+))?, waves? (\d+)(?:-(\d+))?")


def work(ledger: Path, event: str) -> list[tuple[int, int, int]]:
    """(pass, layer, wave) of every unit that the ledger notes as done (`unit`) or `lost`, in order."""
    done, number = [], -1
    for line in map(json.loads, ledger.read_text().splitlines()):
        number += line["event"] == "begin"
        if line["event"] == event:
            unit = _UNIT.fullmatch(line["unit"])
            first, last, wave, end = unit.groups() if unit else (0, -1, 0, -1)  # the tail of an evaluation is none
            layers = range(int(first), int(last or first) + 1)
            waves = range(int(wave), int(end or wave) + 1)
            done += [(number, one, other) for other in waves for one in layers]
    return done


def only_the_units_in_flight_were_lost(ledger: Path, layers: int, waves: int, deaths: int) -> None:
    """Of one pass: so many units were lost; nothing that had ended was done again, nothing left out."""
    done, lost = work(ledger, "unit"), work(ledger, "lost")
    assert sum('"lost"' in line for line in ledger.read_text().splitlines()) == deaths
    assert len(done) == len(set(done)), "work that had ended was done again"
    assert set(done) | set(lost) == {(0, layer, wave) for layer in range(layers) for wave in range(waves)}
