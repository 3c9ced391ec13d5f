"""One rank of a layer shard: takes waves of hidden states through its layers.

What all passes have in common: meeting the other ranks, opening the model, taking a wave's hidden states over from
where they are stored and committing what left the shard's layers. What happens in a layer is said by the pass's
`LayerStep`. A streaming shard holds two layers, one microbatch's workspace and the hidden states of the waves, as many
as the declared host memory takes (the others stay in their files); a resident shard holds its layers. Neither grows
with the depth of the model. What is committed is what a run goes on from; see `hidden_states.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.errors import TenpError, WorkerLost, first_line
from tenp_dist.model.layers import Frame
from tenp_dist.passes.compute import open_skeleton, side_thread
from tenp_dist.passes.fence import Fence
from tenp_dist.passes.full_memory import memory_told
from tenp_dist.passes.hidden_states import Hidden, named, read_hidden
from tenp_dist.passes.layer_loader import LayerLoader
from tenp_dist.passes.layer_ops import embed_all, microbatches
from tenp_dist.passes.layer_step import LayerStep, OpenShard
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.ranks import Ranks, barrier, join_ranks, listen, parallelise_layer
from tenp_dist.passes.schedule import Unit, split_waves
from tenp_dist.passes.split_gradients import open_to_gradients
from tenp_dist.pool.heartbeat import Heartbeat, start_heartbeat
from tenp_dist.pool.machine import own_address, resident_memory
from tenp_dist.pool.worker_log import log_line, log_to

_PEER_LOST = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)


class LayerWorker:
    """One rank of a layer shard. A plain class; `pool/ray_group.py` makes a Ray actor of it.

    task: what the pass is told, without `auto` in it.
    layers: those that this shard owns.
    rank: of this process, among the ranks of the shard.
    shard: what `open` has opened; this and what follows is there from then on.
    step: what happens in the layers.
    source: where the layers come from.
    waves: the microbatches of every wave, by number.
    fence: keeps this process from storing once another has taken its place.
    """

    shard: OpenShard
    step: LayerStep
    source: LayerLoader
    waves: list[range]
    fence: Fence
    _writer: ThreadPoolExecutor
    _spill: bool  # whether hidden states wait in their files between layers, for they do not fit the host memory

    def __init__(self, task: PassTask, layers: range, rank: int = 0):
        self.task, self.layers, self.rank = task, layers, rank
        self.hidden_state_files = task.hidden_state_files
        self.ranks = Ranks()
        self._meeting: tuple[str, int] | None = None
        self._listening: Any = None  # in rank 0, where the ranks meet
        self._logs = False
        self._steps = self._tokens = 0
        self._made = 0  # hidden states stored, experts solved or checked: work that no other counter shows
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
        """Meet the other ranks, open the model; everything that can fail does so here or in `run`."""
        with memory_told(self.task, "opening the model"):
            self._open()

    def _open(self) -> None:
        if self._meeting is not None:
            self._log(f"rank {self.rank} meets the others at {self._meeting[0]}:{self._meeting[1]}")
            size, device = self.task.ranks, self.task.compute.device
            self.ranks = join_ranks(self.rank, size, *self._meeting, device, own=self._listening)
        self._log(f"opens {self.task.model}")
        self.task.compute.on_this_machine()  # the accelerator that was promised is here
        self.shard = self._open_shard()
        self.source = LayerLoader(
            self.shard.skeleton,
            self.layers,
            keep=self.task.mode == "resident",
            experts=self.shard.share.get("experts"),
            prepare=self._prepare,
            layer_at=self.task.layer_at,
        )
        self.fence = Fence(self.hidden_state_files.folder, self.layers.start, self.rank)
        self.fence.take()
        self.source.begin()
        self.step = self.task.step(self.shard)
        self._spill = self._largest_hidden() > self.task.host_memory
        self._log(f"is ready for layers {self.layers.start} to {self.layers.stop - 1}")

    def _prepare(self, module: nn.Module) -> nn.Module:
        module = parallelise_layer(self.shard.skeleton, module, self.ranks)
        return open_to_gradients(module, self.ranks) if self.task.differentiates else module

    def _open_shard(self) -> OpenShard:
        task, corpus = self.task, read_corpus(self.task.corpus)
        batches = microbatches(corpus, task.compute.batch_tokens, task.compute.device)
        self.waves = split_waves(len(batches), task.waves)
        skeleton = open_skeleton(task.model, task.compute)
        self._writer = side_thread("result-writer")
        return OpenShard(
            rank=self.rank,
            layers=self.layers,
            frame=Frame(skeleton),
            share=self.ranks.share(skeleton.num_experts),
            batches=[[batches[i] for i in wave] for wave in self.waves],
            domains=corpus.domains,
            count_work=self._count_work,
            wait_for_results=self.wait_for_results,
        )

    def _largest_hidden(self) -> int:
        """Bytes of the hidden states of all waves, where most streams go side by side."""
        tokens = sum(batch.tokens_BS.numel() for wave in self.shard.batches for batch in wave)
        width = self.shard.skeleton.hidden_size
        streams = max(len(self.step.streams(layer)) for layer in (*self.layers, self.layers.stop))
        return tokens * width * self.task.compute.torch_dtype.itemsize * streams

    def _without_graph(self) -> contextlib.AbstractContextManager:
        """Nothing is noted for gradients; where steps ask for some, it can be inside."""
        return torch.no_grad() if self.task.differentiates else torch.inference_mode()

    def warm(self) -> None:
        """Make resident layers ready while the first wave is on its way; what is wrong with one, its unit says."""
        if self.task.mode == "resident":
            with contextlib.suppress(TenpError), memory_told(self.task, "resident layers"), self._without_graph():
                for layer in self.layers:
                    self.step.warm(layer, self.source.get(layer))

    def run(self, unit: Unit) -> Heartbeat:
        """Take the unit's waves through its layers and commit what came out.

        Raises:
            WorkerLost: another rank of this shard died in a collective.
            NumericalError: NaN or Inf, with the layer and what is known of its cause.
            MemoryFullError: there was no memory left.
        """
        try:
            with memory_told(self.task, unit), self._without_graph():
                return self._run(unit)
        except TenpError:
            with contextlib.suppress(TenpError):  # what is good so far is kept
                self.wait_for_results()
            raise
        except RuntimeError as error:
            if not self.ranks.parallel or not _PEER_LOST.search(str(error)):
                raise
            raise WorkerLost("Another rank of the shard died", where=str(unit), found=first_line(error)) from error

    def _run(self, unit: Unit) -> Heartbeat:
        started = time.monotonic()
        by_wave = self._spill or self.task.mode == "resident"
        self.wait_for_results(range(unit.start, unit.stop))
        for wave in unit.waves:
            hidden = self._enter(wave, unit.start)
            for layer in range(unit.start, unit.stop):
                self.step.take(layer, wave, self.source.get(layer), hidden)
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
        tokens = sum(batch.tokens_BS.numel() for batch in self.shard.batches[wave])
        self._tokens += tokens * len(self.step.streams(layer + 1))

    def _count_work(self) -> None:
        self._made += 1

    def heartbeat(self) -> Heartbeat:
        """At any moment, from another thread than the one at work."""
        cuda = self.task.compute.device == "cuda"
        memory = resident_memory(), torch.cuda.memory_allocated() if cuda else 0
        is_open = hasattr(self, "shard")
        read, passed = (self.shard.skeleton.reader.read_bytes, self.shard.frame.passed) if is_open else (0, 0)
        return Heartbeat(self._steps, self._tokens, self._seconds, read, *memory, work=passed + self._made)

    def _store_behind(self, layer: int) -> None:
        """Store a layer's results on the writer's thread, while others compute."""
        storing = self.step.result(layer)
        if storing is not None:
            self.wait_for_results()
            self._stores[layer] = self._writer.submit(self._fenced, storing)

    def _fenced(self, storing: Callable[[], None]) -> None:
        self.fence.check()
        storing()

    def wait_for_results(self, layers: Iterable[int] | None = None) -> None:
        """Wait until what was made of these layers, of all if None, is stored; raises what went wrong there."""
        for layer in list(self._stores) if layers is None else layers:
            if layer in self._stores:
                self._stores.pop(layer).result()

    def _enter(self, wave: int, layer: int) -> Hidden:
        """The wave's hidden states at `layer`: at hand, embedded, or from their file."""
        at, hidden = self._hidden.pop(wave, (-1, {}))
        if at == layer:
            return hidden
        if layer == 0:
            [stream] = self.step.streams(0)  # nothing has told the model's forms apart yet
            given = self.step.entering(wave)
            return {stream: embed_all(self.shard.frame, self.shard.batches[wave]) if given is None else given}
        names = self.step.streams(layer)
        try:
            return read_hidden(self.hidden_state_files, wave, layer, names, self.waves[wave], self.task.compute.device)
        except FileNotFoundError as error:
            raise WorkerLost(
                "Hidden states are not where they were",
                where=f"wave {wave}, layer {layer}",
                found=f"{first_line(error)}: a worker that was given up has stored more meanwhile, or it was removed",
                next_step="nothing: the work goes on from what is there",
            ) from error

    def _commit(self, waves: Sequence[int], layer: int, *, force: bool) -> None:
        """Store what enters `layer`, at least at a shard's end, once the results that it vouches for are stored."""
        if not (self.ranks.parallel or force) and time.monotonic() - self._committed < self.task.commit_seconds:
            return
        self.wait_for_results()
        if self.ranks.parallel:
            barrier()  # the file vouches for every rank's results; ranks' clocks differ, so they always commit
        dropped = layer == self.shard.skeleton.num_layers * self.task.visits and not self.step.keeps_final
        for wave in waves:
            self.fence.check()
            _, hidden = self._hidden[wave]
            if self.rank == 0:
                self.hidden_state_files.write(wave, layer, {} if dropped else named(hidden, self.waves[wave]))
            self._made += 1
            if self._spill or layer == self.layers.stop:
                del self._hidden[wave]
        self._committed = time.monotonic()
