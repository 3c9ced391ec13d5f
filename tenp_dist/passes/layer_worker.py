"""One rank of a layer shard: carries waves of hidden states through its layers.

What scoring and evaluating have in common: meeting the other ranks, opening the model, taking a wave's
hidden states over from where they are stored and committing what left the shard's layers. A streaming
shard holds two layers, one microbatch's workspace and the hidden states of the waves, as many as the
declared host memory takes (the others stay in the boundary files); a resident shard holds its layers.
Neither grows with the depth of the model. What is committed is what a run goes on from; see `boundaries.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.errors import TenpError, WorkerLost, first_line
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.passes.compute import open_skeleton, side_thread
from tenp_dist.passes.fence import Fence
from tenp_dist.passes.hidden_states import Hidden, named, read_hidden
from tenp_dist.passes.layer_loader import LayerLoader
from tenp_dist.passes.layer_ops import embed_all, microbatches
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.ranks import Ranks, barrier, join_ranks, listen, parallelise_layer
from tenp_dist.passes.schedule import Unit, split_waves
from tenp_dist.pool.heartbeat import Heartbeat, start_heartbeat
from tenp_dist.pool.machine import own_address, resident_memory
from tenp_dist.pool.worker_log import log_line, log_to

SINGLE_STREAM = ""  # the stream of a model that goes through its layers once, as it is


_PEER_LOST = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)


class LayerWorker:
    """One rank. A plain class; `pool/ray_pool.py` makes a Ray actor of a subclass.

    A subclass says what happens in a layer (`_pass`) and, if that leaves something, how to store it (`_storing`),
    and which of the model's forms go through the layers side by side (`streams`). keeps_final: whether what
    leaves the last layer is stored too, or only that it was reached.

    task: resolved. layers: those that this shard owns, None for all.
    """

    keeps_final = False

    def __init__(self, task: PassTask, layers: range | None = None, rank: int = 0):
        self.task, self.layers, self.rank = task, layers, rank
        self.boundaries = task.boundaries
        self.ranks = Ranks()
        self._meeting: tuple[str, int] | None = None
        self._listening: Any = None  # in rank 0, where the ranks meet
        self._logs = False
        self._steps = self._tokens = 0
        self._made = 0  # boundaries stored, experts solved or checked: work that no other counter shows
        self._seconds = 0.0
        self._hidden: dict[int, tuple[int, Hidden]] = {}  # wave -> (layer it enters, states)
        self._committed = time.monotonic()
        self._stores: dict[int, Future] = {}  # layer -> its results on their way to disk

    def meeting_point(self) -> tuple[str, int]:
        """Address and port of this process, which listens there from now on for the other ranks."""
        self._listening = listen(own_address())
        return self._listening.host, self._listening.port

    def log_to(self, path: Path) -> None:
        """What this process prints goes to a file from now on; units are noted there, a heartbeat beside it."""
        log_to(path)
        start_heartbeat(path, self.heartbeat)
        self._logs = True
        self._log(f"process {os.getpid()} starts on {socket.gethostname()} ({own_address()})")

    def join(self, address: str, port: int) -> None:
        """Tell where the ranks of this shard meet; they do in `open`."""
        self._meeting = (address, port)

    def open(self) -> None:
        """Meet the other ranks, build the skeleton; everything that can fail does so here or in `run`."""
        task = self.task
        if self._meeting is not None:
            self._log(f"rank {self.rank} meets the others at {self._meeting[0]}:{self._meeting[1]}")
            self.ranks = join_ranks(self.rank, task.ranks, *self._meeting, task.compute.device, own=self._listening)
        self._log(f"opens {task.model}")
        task.compute.resolved()  # the accelerator that was promised is here
        corpus = read_corpus(task.corpus)
        self.domains = corpus.domains
        self.batches = microbatches(corpus, task.compute.batch_tokens, task.compute.device)
        self.waves = split_waves(len(self.batches), task.waves)
        self.skeleton = open_skeleton(task.model, task.compute)
        self.frame = Frame(self.skeleton)
        self._writer = side_thread("result-writer")
        self.layers = range(self.skeleton.num_layers) if self.layers is None else self.layers
        self._share = self.ranks.share(self.skeleton.num_experts)
        self.source = LayerLoader(
            self.skeleton,
            self.layers,
            keep=task.mode == "resident",
            experts=self._share.get("experts"),
            prepare=lambda module: parallelise_layer(self.skeleton, module, self.ranks),
        )
        self.fence = Fence(self.boundaries.folder, self.layers.start, self.rank)
        self.fence.take()
        self.source.begin()
        tokens = sum(batch.tokens_BS.numel() for batch in self.batches)
        width = self.skeleton.hidden_size
        streams = max(len(self.streams(layer)) for layer in (*self.layers, self.layers.stop))
        self._spill = tokens * width * task.compute.torch_dtype.itemsize * streams > task.host_memory
        self._log(f"is ready for layers {self.layers.start} to {self.layers.stop - 1}")

    @torch.inference_mode()
    def warm(self) -> None:
        """Make resident layers ready while the first wave is on its way; what is wrong with one, its unit says."""
        if self.task.mode == "resident":
            with contextlib.suppress(TenpError):
                for layer in self.layers:
                    self._warm(layer, self.source.get(layer))

    def streams(self, layer: int) -> Sequence[str]:
        """Names of the hidden states that enter `layer` side by side; `num_layers` for what leaves the last."""
        return (SINGLE_STREAM,)

    @torch.inference_mode()
    def run(self, unit: Unit) -> Heartbeat:
        """Take the unit's waves through its layers and commit what came out.

        Raises:
            WorkerLost: another rank of this shard died in a collective.
            NumericalError: NaN or Inf, with the layer and what is known of its cause.
        """
        try:
            return self._run(unit)
        except TenpError:
            with contextlib.suppress(TenpError):  # what is good so far is kept
                self._settle(list(self._stores))
            raise
        except RuntimeError as error:
            if not self.ranks.parallel or not _PEER_LOST.search(str(error)):
                raise
            raise WorkerLost("Another rank of the shard died", where=str(unit), found=first_line(error)) from error

    def _run(self, unit: Unit) -> Heartbeat:
        started = time.monotonic()
        by_wave = self._spill or self.task.mode == "resident"
        self._settle(range(unit.start, unit.stop))
        for wave in unit.waves:
            hidden = self._enter(wave, unit.start)
            for layer in range(unit.start, unit.stop):
                self._pass(layer, wave, hidden)
                self._count(wave, layer)
                if by_wave:
                    self._store_behind(layer)
            self._hidden[wave] = (unit.stop, hidden)
            if by_wave:
                self._commit((wave,), unit.stop, force=True)
        if not by_wave:
            self._store_behind(unit.start)
            self._commit(unit.waves, unit.stop, force=unit.stop == self.layers.stop)
        self._seconds += time.monotonic() - started
        heartbeat = self.heartbeat()
        self._log(f"{unit}: {time.monotonic() - started:.2f} s, {heartbeat.memory / 1e6:,.0f} MB resident")
        return heartbeat

    def _log(self, text: str) -> None:
        if self._logs:
            log_line(text)

    def _count(self, wave: int, layer: int) -> None:
        self._steps += 1
        self._tokens += sum(batch.tokens_BS.numel() for batch in self._batches(wave)) * len(self.streams(layer + 1))

    def heartbeat(self) -> Heartbeat:
        """At any moment, from another thread than the one at work."""
        cuda = self.task.compute.device == "cuda"
        memory = resident_memory(), torch.cuda.memory_allocated() if cuda else 0
        read, passed = (self.skeleton.reader.read_bytes, self.frame.passed) if hasattr(self, "frame") else (0, 0)
        return Heartbeat(self._steps, self._tokens, self._seconds, read, *memory, work=passed + self._made)

    def _pass(self, layer: int, wave: int, hidden: Hidden) -> None:
        """Replace the wave's hidden states by what leaves the layer."""
        raise NotImplementedError

    def _warm(self, layer: int, module: nn.Module) -> None:
        """What `_pass` needs of a layer's weights alone."""

    def _storing(self, layer: int) -> Callable[[], None] | None:
        """What stores all that `_pass` has made of a layer; nothing changes it until that has run."""
        return None

    def _store_behind(self, layer: int) -> None:
        """Store a layer's results on the writer's thread, while others compute."""
        storing = self._storing(layer)
        if storing is not None:
            self._settle(list(self._stores))
            self._stores[layer] = self._writer.submit(self._fenced, storing)

    def _fenced(self, storing: Callable[[], None]) -> None:
        self.fence.check()
        storing()

    def _settle(self, layers: Iterable[int]) -> None:
        """Wait until what was made of these layers is stored; raises what went wrong there."""
        for layer in layers:
            if layer in self._stores:
                self._stores.pop(layer).result()

    def _batches(self, wave: int) -> list[Microbatch]:
        return [self.batches[i] for i in self.waves[wave]]

    def _enter(self, wave: int, layer: int) -> Hidden:
        """The wave's hidden states at `layer`: at hand, embedded, or from the boundary file."""
        at, hidden = self._hidden.pop(wave, (-1, {}))
        if at == layer:
            return hidden
        if layer == 0:
            [stream] = self.streams(0)  # nothing has told the model's forms apart yet
            return {stream: embed_all(self.frame, self._batches(wave))}
        names = self.streams(layer)
        try:
            return read_hidden(self.boundaries, wave, layer, names, self.waves[wave], self.task.compute.device)
        except FileNotFoundError as error:
            raise WorkerLost(
                "Hidden states are not where they were",
                where=f"wave {wave}, layer {layer}",
                found=f"{first_line(error)}: a worker that was given up has stored more meanwhile, or it was removed",
                next_step="nothing: the work goes on from what is there",
            ) from error

    def _commit(self, waves: Sequence[int], layer: int, *, force: bool) -> None:
        """Store boundaries, at least at a shard's end, once the results that they vouch for are stored."""
        if not (self.ranks.parallel or force) and time.monotonic() - self._committed < self.task.commit_seconds:
            return
        self._settle(list(self._stores))
        if self.ranks.parallel:
            barrier()  # the boundary vouches for every rank's results; ranks' clocks differ, so they always commit
        dropped = layer == self.skeleton.num_layers and not self.keeps_final
        for wave in waves:
            self.fence.check()
            _, hidden = self._hidden[wave]
            if self.rank == 0:
                self.boundaries.write(wave, layer, {} if dropped else named(hidden, self.waves[wave]))
            self._made += 1
            if self._spill or layer == self.layers.stop:
                del self._hidden[wave]
        self._committed = time.monotonic()
