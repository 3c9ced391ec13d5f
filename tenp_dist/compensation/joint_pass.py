"""Compensate plans layer by layer as one system: all kept experts and the shared expert against the full model's block.

Every microbatch goes through the layer as it is, which gives the target and the features of plans that keep every
expert; for plans that remove experts its MoE block runs again with their routers (`model/routing.py`). When all waves
are through, experts are solved one by one first (`moments.py`), and the whole starts from there.

Every rank stores its own experts, the first one the shared expert too. Ranks talk to each other while they sum and
begin to solve (`joint_systems.py`), so a layer is stored when all have stored it: none could go through it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tenp_dist.artifacts import digest_of
from tenp_dist.checkpoint.compensated import CompensatedExpert, compensated_tensors, copy_layer, write_layer
from tenp_dist.checkpoint.entries import TensorHeader
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.compensation.compensate_pass import CompensateSum, CompensateTask, Target, kept_of
from tenp_dist.compensation.joint_block import BlockRun
from tenp_dist.compensation.joint_features import SHARED, SharedExpert, columns_of
from tenp_dist.compensation.joint_features import shared_expert as load_shared_expert
from tenp_dist.compensation.joint_outcome import joint_outcome
from tenp_dist.compensation.joint_systems import JointSolution, JointSystem, Start, layer_damping, make_system
from tenp_dist.compensation.moments import ENOUGH, Moments, union_of
from tenp_dist.model.experts import Dispatch, FusedExperts
from tenp_dist.model.layers import Microbatch
from tenp_dist.model.merged_experts import MergedExperts, merged_experts
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.layer_sums import LayerSum

RIDGE_SHARE = 0.1
"""The ridge of a layer as one system, over that of an expert alone.

Measured on text that was not calibrated on, 25 M model, NLL added with 0.01 and 0.001: `global` at 0.3 0.0337 and
0.0327, at 0.6 0.0033 and 0.0030, 12 of 24 experts by REAP 0.0846 and 0.0855."""


@dataclass(frozen=True)
class Routing:
    """What a plan makes of a layer's router and of the experts behind it: plans of one have their features in common.

    experts: that the router knows.
    merging: digest of what they are made of.
    kept: of a plan that does so.
    """

    experts: tuple[int, ...]
    merging: str | None
    kept: KeptNeurons = field(compare=False, repr=False)


@dataclass(frozen=True)
class JointTask(CompensateTask):
    """What the workers of a joint compensation need, beyond `CompensateTask`.

    joint_ridge: r_b over the mean diagonal of a block; `ridge` is that of solving expert by expert.
    """

    joint_ridge: float = 0.001

    @property
    def file_key(self) -> str:
        """Apart from that of plans compensated expert by expert in the same stage."""
        return digest_of([super().file_key, "joint", self.joint_ridge])

    def layer_sum(self, shard: OpenShard) -> JointSum:
        return JointSum(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        """Whether all ranks have stored a layer."""
        return all(self.stored(target, layer, one) for target in self.targets for one in range(self.ranks))

    def outcome(self, target: Target, neurons: int) -> dict[str, Any]:
        files = {layer: [self.file(target, layer, rank) for rank in range(self.ranks)] for layer in self.moe}
        return joint_outcome(target.plan, files, self.ridge, self.joint_ridge)


@dataclass
class LayerSystems:
    """The sums of a layer.

    moments: of narrow experts, to solve them one by one.
    shared: the shared expert, None where there is none.
    systems: routing -> its sums.
    merged: routing -> the experts of this rank where some are merged.
    plans: `key_of` a plan -> where it starts, and what gives its solution.
    """

    moments: Moments
    shared: SharedExpert | None
    systems: dict[Routing | None, JointSystem]
    merged: dict[Routing | None, MergedExperts | None]
    plans: dict[bytes, tuple[Start, Callable[[], JointSolution]]] = field(default_factory=dict)


class JointSum(LayerSum[LayerSystems]):
    """Sums what the system of a layer needs, on one rank, and stores this rank's part of its solution."""

    def __init__(self, task: JointTask, shard: OpenShard, name: str = ""):
        """name: begins the names of files of features, where several of these sum at a time."""
        self.task, self.shard, self._name = task, shard, name
        self._apart = CompensateSum(task, shard)
        self._weights = task.weights_of(shard.domains)

    def begin(self, layer: int, experts: FusedExperts) -> LayerSystems:
        held, hidden, neurons = experts.down_proj.shape
        device = experts.down_proj.device
        shared = load_shared_expert(self.shard.skeleton, layer)
        plans: dict[Routing | None, list[KeptNeurons]] = {}
        for target in self.task.targets:
            kept = kept_of(target, layer)
            if prunes(kept, neurons):
                plans.setdefault(routing_of(kept), []).append(kept)
        narrow = [self._apart.narrow_of(kept, neurons) for kept in plans.get(None, [])]
        files, memory = self.task.hidden_state_files.folder, self.task.host_memory
        systems = {
            routing: make_system(
                self.shard, columns_of([blocks_of(kept, shared) for kept in some]), hidden, device,
                files, f"{self._name}rank_{self.shard.rank:03d}.routing_{number}", memory // len(plans),
            )
            for number, (routing, some) in enumerate(plans.items())
        }  # fmt: skip
        merged: dict[Routing | None, MergedExperts | None] = {
            routing: merged_experts(self.shard.skeleton, layer, experts, routing.kept, self.shard.held)
            for routing in plans
            if routing is not None
        }
        return LayerSystems(Moments(union_of(narrow), self._weights, held, neurons, device), shared, systems, merged)

    def add(
        self,
        layer: int,
        module: nn.Module,
        batches: Sequence[Microbatch],
        states: list[torch.Tensor],
        sums: LayerSystems,
    ) -> None:
        for i, batch in enumerate(batches):
            run = BlockRun(self.shard, layer, module, batch)
            self.add_run(run, run.whole_layer(states[i], sums.moments), batch.domain, sums)

    def add_run(self, run: BlockRun, dispatch: Dispatch, domain: int, sums: LayerSystems) -> None:
        """Add a microbatch that has run. dispatch: what the source's experts computed of it."""
        weight = self._weights[domain]
        shared_TF = None if sums.shared is None else sums.shared.features(run.x_TD)
        run.check_sum(dispatch, shared_TF, sums.shared)
        for routing, system in sums.systems.items() if weight else ():
            own = dispatch if routing is None else run.restricted(routing.kept, sums.merged[routing])
            system.add(run, own, shared_TF, weight**0.5)

    def settle(self, layer: int, sums: LayerSystems, down_EDF: torch.Tensor) -> None:
        """Begin solving every plan, from its experts solved one by one."""
        for target in self.task.targets:
            kept = kept_of(target, layer)
            if prunes(kept, down_EDF.shape[2]) and key_of(kept) not in sums.plans:
                start = self._start(layer, kept, sums, down_EDF)
                sums.plans[key_of(kept)] = start, sums.systems[routing_of(kept)].begin(start)
            self.shard.count_work()
        for system in sums.systems.values():
            system.close()

    def _start(self, layer: int, kept: KeptNeurons, sums: LayerSystems, down_EDF: torch.Tensor) -> Start:
        system = sums.systems[routing_of(kept)]
        reached = {b: ids for b, ids in blocks_of(kept, sums.shared).items() if system.tokens[b]}
        columns = columns_of([reached])  # there is nothing to learn for others
        merged = sums.merged.get(routing_of(kept))
        if merged is not None:
            down_EDF = merged.down_EDF
        plain = {
            b: self._source(layer, b, ids, down_EDF, merged) for b, ids in columns.neurons.items() if system.owns(b)
        }
        prior = dict(plain)
        if routing_of(kept) is None:
            narrow = self._apart.narrow_of(kept, down_EDF.shape[2])
            for expert in self._apart.solved(layer, narrow, sums.moments, down_EDF):
                prior[int(expert.row[0])] = expert.down_DW.T
        least = self._layer_damping(kept, sums)
        starved = {b: max(least, ENOUGH * len(ids) / system.tokens[b]) for b, ids in columns.neurons.items()}
        damping = {block: self.task.joint_ridge * factor for block, factor in starved.items()}
        return Start(columns, damping, plain, prior)

    def _layer_damping(self, kept: KeptNeurons, sums: LayerSystems) -> float:
        features = sum(map(len, blocks_of(kept, sums.shared).values()))
        return layer_damping(features, sums.systems[routing_of(kept)].all_tokens)

    def _source(
        self, layer: int, block: int, ids: np.ndarray, down_EDF: torch.Tensor, merged: MergedExperts | None
    ) -> torch.Tensor:
        """The columns of a block that it would have unsolved, [W, D] float64: the source's, or merged ones."""
        if block == SHARED:
            skeleton = self.shard.skeleton
            with TensorReader(skeleton.index) as reader:
                source_DF = reader.tensor(skeleton.family.shared_down(layer))
        elif merged is not None:
            source_DF = merged.down_EDF[block - self.shard.held.start]
        else:
            source_DF = self._apart.source_down(layer, down_EDF, [block - self.shard.held.start])[0]
        return source_DF[:, torch.from_numpy(ids.astype(np.int64)).to(source_DF.device)].T.to(down_EDF.device).double()

    def finish(self, layer: int, sums: LayerSystems, down_EDF: torch.Tensor) -> None:
        """Solve every plan and store this rank's part, once where several do the same to the layer."""
        alike: dict[bytes, Target] = {}
        for target in self.task.targets:
            kept, path = kept_of(target, layer), self.task.file(target, layer, self.shard.rank)
            same = alike.setdefault(key_of(kept), target)
            if self.task.stored(target, layer, self.shard.rank):
                continue
            if same is not target:
                copy_layer(self.task.file(same, layer, self.shard.rank), path)
            elif not prunes(kept, down_EDF.shape[2]):
                write_layer(path, [], [], layer=layer, key=self.task.file_key)
            else:
                self._store(layer, kept, target, sums)
            self.shard.count_work()

    def _store(self, layer: int, kept: KeptNeurons, target: Target, sums: LayerSystems) -> None:
        start, solved = sums.plans[key_of(kept)]
        solution, tokens = solved(), sums.systems[routing_of(kept)].tokens
        said = {"features": start.columns.count, "apart": solution.apart, "falls": solution.falls}
        said["layer_damping"] = self._layer_damping(kept, sums)
        own = [block for block in start.columns.neurons if block in solution.weights]

        def experts() -> Iterator[CompensatedExpert]:
            errors = (solution.energy, solution.before, solution.after)
            for block in own:
                row = (block, tokens[block], start.damping[block] * solution.damping, *errors)
                yield CompensatedExpert(solution.weights[block].T, row)

        path = self.task.file(target, layer, self.shard.rank)
        tensors = self._tensors(layer, kept, own)
        write_layer(path, tensors, experts(), layer=layer, key=self.task.file_key, said=said)

    def _tensors(self, layer: int, kept: KeptNeurons, blocks: Sequence[int]) -> list[TensorHeader]:
        skeleton = self.shard.skeleton
        routed = [block for block in blocks if block != SHARED]
        tensors = compensated_tensors(skeleton.index, skeleton.family, layer, routed, kept)
        if SHARED in blocks:
            entry = skeleton.index.entry(skeleton.family.shared_down(layer))
            tensors.append(TensorHeader(entry.name, entry.dtype, entry.shape))
        return tensors


def prunes(kept: KeptNeurons, neurons: int) -> bool:
    """Whether a plan takes anything out of a layer whose experts have so many neurons, or merges some of them."""
    return bool((kept.widths < neurons).any()) or kept.merging is not None


def routing_of(kept: KeptNeurons) -> Routing | None:
    """None where the layer routes as in the source, to the source's experts."""
    if kept.experts is None and kept.merging is None:
        return None
    parts = None if kept.merging is None else {name: part.tolist() for name, part in kept.merging.tensors().items()}
    digest = None if parts is None else digest_of(parts)
    return Routing(tuple(kept.routed.tolist()), digest, kept)


def key_of(kept: KeptNeurons) -> bytes:
    """Equal where two plans do the same to a layer."""
    return repr(routing_of(kept)).encode() + kept.offsets.tobytes() + kept.indices.tobytes()


def blocks_of(kept: KeptNeurons, shared: SharedExpert | None) -> Mapping[int, np.ndarray]:
    """The blocks of features that a plan keeps of a layer: its experts that have neurons, and the shared expert."""
    blocks = {expert: kept.of(expert) for expert in kept.routed.tolist() if kept.widths[expert]}
    return blocks if shared is None else {**blocks, SHARED: np.arange(shared.down_DF.shape[1])}
