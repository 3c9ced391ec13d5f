"""One rank of a layer shard: takes waves of tokens through its layers and sums their statistics.

A streaming shard holds two layers, one microbatch's workspace and the hidden states of the waves, as
many as the declared host memory takes (the others stay in the boundary files); a resident shard holds its
layers. Neither grows with the depth of the model. What is committed (parts, then boundaries) is what
a run goes on from; see `boundaries.py` and `parts.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.engine.boundaries import Boundaries
from tenp_dist.engine.compute import Compute, Progress, check_finite, embed_all, microbatches, open_skeleton
from tenp_dist.engine.parallel import Ranks, barrier, join_ranks, parallelise_layer
from tenp_dist.engine.parts import Parts
from tenp_dist.engine.schedule import Mode, Unit, next_unit, split_waves
from tenp_dist.engine.weights import LayerSource
from tenp_dist.errors import NumericalError, WorkerLost, first_line
from tenp_dist.model.experts import ExpertsState
from tenp_dist.model.layers import Frame, Microbatch
from tenp_dist.scoring.accumulate import LayerAccumulator, weight_norms
from tenp_dist.scoring.statistics import LayerStatistics

DEFAULT_WAVES = 8
_PEER_LOST = re.compile(r"gloo|nccl|connection (closed|reset)", re.IGNORECASE)


@dataclass(frozen=True)
class ScoreTask:
    """What a scoring worker needs.

    key: of the score stage; with device, dtype and ranks it is stored in every file.
    waves: the tokens are cut into at most so many. mode: see `schedule.py`.
    host_memory: bytes that hidden states may take in a process. commit_seconds: how much work a streaming
    shard may lose; boundaries are stored no more often than this, and always at the end of a shard.
    """

    model: Path
    corpus: Path
    scores: Path
    key: str
    compute: Compute
    waves: int = DEFAULT_WAVES
    mode: Mode = "streaming"
    host_memory: int = 1 << 62
    commit_seconds: float = 10.0
    ranks: int = 1

    @property
    def file_key(self) -> str:
        return digest_of([self.key, self.compute.device, self.compute.dtype, self.waves, self.ranks])

    @property
    def boundaries(self) -> Boundaries:
        return Boundaries(self.scores / "hidden", self.file_key)

    def parts(self, rank: int = 0) -> Parts:
        return Parts(self.scores, self.file_key, rank, self.ranks)

    def resolved(self) -> ScoreTask:
        """The same with `auto` device and dtype settled: every worker of a run must agree."""
        return replace(self, compute=self.compute.resolved())


@dataclass(frozen=True)
class UnitReport:
    """A finished unit: tokens that went through layers and seconds it took, resident memory of the process."""

    tokens: int
    seconds: float
    memory: int


class ScoreShard:
    """One rank. A plain class; `engine/pool.py` makes a Ray actor of it.

    task: resolved. layers: those that this shard owns, None for all.
    """

    def __init__(self, task: ScoreTask, layers: range | None = None, rank: int = 0):
        self.task, self.layers, self.rank = task, layers, rank
        self.boundaries, self.parts = task.boundaries, task.parts(rank)
        self.ranks = Ranks()
        self._meeting: tuple[str, int] | None = None
        self._hidden: dict[int, tuple[int, list[torch.Tensor]]] = {}  # wave -> (layer it enters, states)
        self._committed = time.monotonic()

    def meeting_point(self) -> tuple[str, int]:
        """Address and a free port of this process's node, for the ranks to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            with contextlib.suppress(OSError):  # picks a route, sends nothing
                probe.connect(("192.0.2.1", 9))
                return probe.getsockname()[0], port
        return "127.0.0.1", port

    def join(self, address: str, port: int) -> None:
        """Tell where the ranks of this shard meet; they do in `open`."""
        self._meeting = (address, port)

    def open(self) -> None:
        """Meet the other ranks, build the skeleton; everything that can fail does so here or in `run`."""
        task = self.task
        if self._meeting is not None:
            self.ranks = join_ranks(self.rank, task.ranks, *self._meeting, task.compute.device)
        task.compute.resolved()  # the accelerator that was promised is here
        corpus = read_corpus(task.corpus)
        self.domains = corpus.domains
        self.batches = microbatches(corpus, task.compute.batch_tokens, task.compute.device)
        self.waves = split_waves(len(self.batches), task.waves)
        self.skeleton = open_skeleton(task.model, task.compute)
        self.frame = Frame(self.skeleton)
        self.layers = range(self.skeleton.num_layers) if self.layers is None else self.layers
        self._share = self.ranks.share(self.skeleton.family.num_experts(self.skeleton.config_dict))
        self.source = LayerSource(
            self.skeleton,
            self.layers,
            keep=task.mode == "resident",
            experts=self._share.get("experts"),
            prepare=lambda module: parallelise_layer(self.skeleton, module, self.ranks),
        )
        tokens = sum(batch.tokens_BS.numel() for batch in self.batches)
        width = int(self.skeleton.config_dict["hidden_size"])
        self._spill = tokens * width * task.compute.torch_dtype.itemsize > task.host_memory

    def process_id(self) -> int:
        return os.getpid()

    @torch.inference_mode()
    def run(self, unit: Unit) -> UnitReport:
        """Take the unit's waves through its layers and commit what came out.

        Raises:
            WorkerLost: another rank of this shard died in a collective.
            NumericalError: NaN or Inf, with the layer and what is known of its cause.
        """
        try:
            return self._run(unit)
        except RuntimeError as error:
            if not self.ranks.parallel or not _PEER_LOST.search(str(error)):
                raise
            raise WorkerLost("Another rank of the shard died", where=str(unit), found=first_line(error)) from error

    def _run(self, unit: Unit) -> UnitReport:
        started = time.monotonic()
        scored: dict[int, list[LayerStatistics]] = {}
        for wave in unit.waves:
            hidden = self._enter(wave, unit.start)
            for layer in range(unit.start, unit.stop):
                statistics = self._pass(layer, wave, hidden)
                if statistics is not None:
                    scored.setdefault(layer, []).append(statistics)
            self._hidden[wave] = (unit.stop, hidden)
            if self._spill or self.task.mode == "resident":
                self._commit(scored, (wave,), unit.stop, force=True)
                scored = {}
        if not self._spill and self.task.mode == "streaming":
            self._commit(scored, unit.waves, unit.stop, force=unit.stop == self.layers.stop)
        tokens = sum(self.batches[i].tokens_BS.numel() for wave in unit.waves for i in self.waves[wave])
        return UnitReport(tokens * (unit.stop - unit.start), time.monotonic() - started, resident_memory())

    def _enter(self, wave: int, layer: int) -> list[torch.Tensor]:
        """The wave's hidden states at `layer`: at hand, embedded, or from the boundary file."""
        at, hidden = self._hidden.pop(wave, (-1, []))
        if at == layer:
            return hidden
        if layer == 0:
            return embed_all(self.frame, [self.batches[i] for i in self.waves[wave]])
        stored = self.boundaries.read(wave, layer)
        return [stored[f"{i:05d}"].to(self.task.compute.device) for i in self.waves[wave]]

    def _pass(self, layer: int, wave: int, hidden: list[torch.Tensor]) -> LayerStatistics | None:
        """Replace the wave's hidden states by what leaves the layer; its statistics unless they are stored."""
        module = self.source.get(layer)
        experts = self.skeleton.experts_of(module)
        batches = [self.batches[i] for i in self.waves[wave]]
        statistics = None
        if experts is None or self.parts.waves(layer) > wave:
            run_layer(self.frame, layer, module, batches, hidden, self._share)
        else:
            statistics = score_layer(self.frame, layer, module, batches, hidden, self.domains, self._share)
        check_finite(hidden, self.skeleton, layer, module)
        if statistics is not None:
            check_statistics(statistics, layer, first_expert=self._share.get("experts", range(1)).start)
        return statistics

    def _commit(
        self, scored: dict[int, list[LayerStatistics]], waves: Sequence[int], layer: int, *, force: bool
    ) -> None:
        """Store parts, then (at least at a shard's end) boundaries: a boundary vouches for the parts before it."""
        for scored_layer, statistics in scored.items():
            self.parts.add(scored_layer, statistics, len(self.waves))
        if self.ranks.parallel:
            barrier()  # the boundary vouches for every rank's part; ranks' clocks differ, so they always commit
        elif not force and time.monotonic() - self._committed < self.task.commit_seconds:
            return
        done = layer == self.skeleton.num_layers
        for wave in waves:
            _, hidden = self._hidden[wave]
            named = {f"{i:05d}": state for i, state in zip(self.waves[wave], hidden, strict=True)}
            if self.rank == 0:
                self.boundaries.write(wave, layer, {} if done else named)
            if self._spill or layer == self.layers.stop:
                del self._hidden[wave]
        self._committed = time.monotonic()


def run_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: list[torch.Tensor],
    share: Mapping[str, Any],
    accumulator: LayerAccumulator | None = None,
) -> None:
    """Run a layer over microbatches; `hidden` becomes what leaves it. share: of the experts, see `Ranks`."""
    experts = frame.skeleton.experts_of(module)
    for i, batch in enumerate(batches):
        if accumulator is not None:
            accumulator.domain = batch.domain
        if experts is not None:
            experts.tenp_state = ExpertsState(valid_T=batch.valid_T, observer=accumulator, **share)
        hidden[i] = frame.run_layer(layer, module, batch, hidden[i])
    if experts is not None:
        experts.tenp_state = None


def score_layer(
    frame: Frame,
    layer: int,
    module: nn.Module,
    batches: Sequence[Microbatch],
    hidden: list[torch.Tensor],
    domains: Sequence[str],
    share: Mapping[str, Any],
) -> LayerStatistics:
    """`run_layer` with the statistics of this rank's experts taken on the way."""
    experts = frame.skeleton.experts_of(module)
    num_experts, _, width = experts.down_proj.shape
    statistics = LayerStatistics.zeros(domains, num_experts, width, device=experts.down_proj.device)
    accumulator = LayerAccumulator(statistics, experts.down_proj)
    norm = module.get_submodule(frame.skeleton.family.block_norm)
    hook = norm.register_forward_pre_hook(accumulator.see_residual)
    try:
        run_layer(frame, layer, module, batches, hidden, share, accumulator)
    finally:
        hook.remove()
    tensors = {name: tensor.cpu() for name, tensor in statistics.tensors.items()}
    return LayerStatistics(statistics.domains, tensors, weight_norms(experts).cpu())


def check_statistics(statistics: LayerStatistics, layer: int, first_expert: int = 0) -> None:
    """Raise NumericalError naming the first expert whose sums or weights are not finite."""
    for name, tensor in {**statistics.tensors, "expert weights": statistics.weight_norm}.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            position = bad.nonzero()[0].tolist()
            expert = first_expert + (position[0] if name == "expert weights" else position[1])
            raise NumericalError(
                "NaN or Inf in the scores",
                where=f"layer {layer}, expert {expert}: {name}",
                next_step="check the checkpoint's download of this expert; score in float32 if its weights are fine",
            )


def score_shard(task: ScoreTask) -> Iterator[Progress]:
    """The whole model as one shard, here and now: every unit in turn, then the score files."""
    task = task.resolved()
    shard = ScoreShard(task)
    shard.open()
    moe_layers, waves = shard.skeleton.moe_layers(), len(shard.waves)
    positions = [task.boundaries.position(wave) for wave in range(waves)]
    if all(task.parts().waves(layer) == waves for layer in moe_layers):
        positions = []
    while (unit := next_unit(shard.layers, positions, task.mode)) is not None:
        report = shard.run(unit)
        for wave in unit.waves:
            positions[wave] = unit.stop
        yield Progress(min(positions), shard.skeleton.num_layers, report.tokens, report.seconds, str(unit))
    finish_scores(task, moe_layers, waves)


def finish_scores(task: ScoreTask, moe_layers: Iterable[int], waves: int) -> None:
    """Join the parts into the score files, then drop what only an unfinished run needs."""
    task.parts().join(moe_layers, waves)
    for folder in ("parts", "hidden"):
        shutil.rmtree(task.scores / folder, ignore_errors=True)


def resident_memory() -> int:
    """Anonymous resident bytes of this process."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) * 1024
