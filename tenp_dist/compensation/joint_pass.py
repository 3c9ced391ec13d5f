"""Compensate plans layer by layer as one system: all kept experts and the shared expert against the full model's block.

Every microbatch goes through the layer as it is, which gives the target and the features of plans that keep every
expert; for plans that remove experts its MoE block runs again with their routers (`model/routing.py`). When all waves
are through, experts are solved one by one first (`moments.py`), and the whole starts from there.

Ranks of a shard add up their features in float32, which is exact, for each fills in its own experts alone; then all of
them sum and solve the same and each stores its own experts, the first one the shared expert too. So a layer is stored
when all ranks have stored it: one of them alone could not go through it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tenp_dist.checkpoint.compensated import CompensatedExpert, compensated_tensors, copy_layer, write_layer
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.recipes import TensorHeader
from tenp_dist.compensation.compensate_pass import CompensateSum, CompensateTask, Target, kept_of
from tenp_dist.compensation.joint_block import BlockRun
from tenp_dist.compensation.joint_features import SHARED, Columns, SharedExpert, columns_of, routed_features
from tenp_dist.compensation.joint_features import shared_expert as load_shared_expert
from tenp_dist.compensation.joint_outcome import joint_outcome
from tenp_dist.compensation.moments import ENOUGH, Moments, union_of
from tenp_dist.compensation.normal_equations import JointSolution, NormalEquations
from tenp_dist.model.experts import Dispatch, FusedExperts
from tenp_dist.model.layers import Microbatch
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.passes.layer_sums import LayerSum

Routing = tuple[int, ...] | None
"""The experts that a plan's router knows, None for all: plans of one routing have their features in common."""


@dataclass(frozen=True)
class JointTask(CompensateTask):
    """What the workers of a joint compensation need, beyond `CompensateTask`.

    joint_ridge: r_b over the mean diagonal of a block; `ridge` is that of solving expert by expert.
    """

    joint_ridge: float = 1e-3

    def layer_sum(self, shard: OpenShard) -> JointSum:
        return JointSum(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        """Whether all ranks have stored a layer."""
        return all(self.stored(target, layer, one) for target in self.targets for one in range(self.ranks))

    def outcome(self, target: Target, neurons: int) -> dict[str, Any]:
        files = {layer: [self.file(target, layer, rank) for rank in range(self.ranks)] for layer in self.moe}
        return joint_outcome(target.plan, files, self.ridge, self.joint_ridge)


@dataclass
class System:
    """What is summed for plans of one routing.

    equations: the sums over the features that any of them keeps.
    tokens: block -> tokens that reached it.
    """

    equations: NormalEquations
    tokens: dict[int, int] = field(default_factory=dict)

    @property
    def columns(self) -> Columns:
        return self.equations.columns


@dataclass
class LayerSystems:
    """The sums of a layer.

    moments: of narrow experts, to solve them one by one.
    shared: the shared expert, None where there is none.
    systems: routing -> its sums.
    starts: routing and kept neurons of a plan -> the source's columns and those solved one by one, [M, D] float64.
    """

    moments: Moments
    shared: SharedExpert | None
    systems: dict[Routing, System]
    starts: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class JointSum(LayerSum[LayerSystems]):
    """Sums what the system of a layer needs, on one rank, and stores this rank's part of its solution."""

    def __init__(self, task: JointTask, shard: OpenShard):
        self.task, self.shard = task, shard
        self._apart = CompensateSum(task, shard)
        self._weights = task.weights_of(shard.domains)

    def begin(self, layer: int, experts: FusedExperts) -> LayerSystems:
        held, hidden, neurons = experts.down_proj.shape
        device = experts.down_proj.device
        shared = load_shared_expert(self.shard.skeleton, layer)
        plans: dict[Routing, list[KeptNeurons]] = {}
        for target in self.task.targets:
            kept = kept_of(target, layer)
            if prunes(kept, neurons):
                plans.setdefault(routing_of(kept), []).append(kept)
        narrow = [self._apart.narrow_of(kept, neurons) for kept in plans.get(None, [])]
        systems = {
            routing: System(NormalEquations(columns_of([blocks_of(kept, shared) for kept in some]), hidden, device))
            for routing, some in plans.items()
        }
        return LayerSystems(Moments(union_of(narrow), self._weights, held, neurons, device), shared, systems)

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
            weight = self._weights[batch.domain]
            dispatch = run.whole_layer(states[i], sums.moments)
            shared_TF = None if sums.shared is None else sums.shared.features(run.x_TD)
            run.check_sum(dispatch, shared_TF, sums.shared)
            for routing, system in sums.systems.items() if weight else ():
                own = dispatch if routing is None else run.restricted(routing)
                self._add_features(system, own, run, shared_TF, weight**0.5)

    def _add_features(
        self, system: System, dispatch: Dispatch, run: BlockRun, shared_TF: torch.Tensor | None, scale: float
    ) -> None:
        columns, held = system.columns, self.shard.held
        x_TN = torch.zeros(len(run.x_TD), columns.count, device=run.x_TD.device)
        routed_features(x_TN, columns, dispatch, held)
        count_E = torch.zeros(1, self.shard.skeleton.num_experts, device=run.x_TD.device)
        ends_E = dispatch.offsets_E.float()
        count_E[0, held.start : held.stop] = ends_E.diff(prepend=ends_E.new_zeros(1))
        x_TN, count_E = (self._added_up(part) for part in (x_TN, count_E))
        if shared_TF is not None:
            x_TN[:, columns.spans[SHARED]] = shared_TF
        x_TN, y_TD = run.valid(x_TN), run.valid(run.y_TD)
        system.equations.add(x_TN * scale, y_TD * scale)
        for block in columns.neurons:
            reached = len(x_TN) if block == SHARED else int(count_E[0, block])
            system.tokens[block] = system.tokens.get(block, 0) + reached

    def _added_up(self, part: torch.Tensor) -> torch.Tensor:
        """Over the ranks; float32, and exact where one rank alone holds a value."""
        reduce = self.shard.share.get("reduce")
        return part if reduce is None else reduce(part)

    def settle(self, layer: int, sums: LayerSystems, down_EDF: torch.Tensor) -> None:
        """Gather the source's columns and those solved expert by expert of every plan."""
        for target in self.task.targets:
            kept = kept_of(target, layer)
            if prunes(kept, down_EDF.shape[2]) and key_of(kept) not in sums.starts:
                sums.starts[key_of(kept)] = self._start(layer, kept, sums, down_EDF)
            self.shard.count_work()

    def _start(
        self, layer: int, kept: KeptNeurons, sums: LayerSystems, down_EDF: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[M, D] of the plan's features; what other ranks hold comes from them."""
        columns, held = self._features_of(kept, sums), self.shard.held
        plain_MD = torch.zeros(columns.count, down_EDF.shape[1], dtype=torch.float64, device=down_EDF.device)
        for block, span in columns.spans.items():
            ids = torch.from_numpy(columns.neurons[block].astype(np.int64))
            if block in held:
                source_DF = self._apart.source_down(layer, down_EDF, [block - held.start])[0]
                plain_MD[span] = source_DF[:, ids.to(source_DF.device)].T.double()
            elif block == SHARED and self.shard.rank == 0:
                plain_MD[span] = self._shared_down(layer).T.to(plain_MD)
        prior_MD = plain_MD.clone()
        if kept.experts is None:
            narrow = self._apart.narrow_of(kept, down_EDF.shape[2])
            for expert in self._apart.solved(layer, narrow, sums.moments, down_EDF):
                prior_MD[columns.spans[int(expert.row[0])]] = expert.down_DW.T
        return self._gathered(plain_MD), self._gathered(prior_MD)

    def _gathered(self, part_MD: torch.Tensor) -> torch.Tensor:
        return part_MD if "reduce" not in self.shard.share else self._added_up(part_MD.float()).double()

    def _shared_down(self, layer: int) -> torch.Tensor:
        skeleton = self.shard.skeleton
        with TensorReader(skeleton.index) as reader:
            return reader.tensor(skeleton.family.shared_down(layer))

    def _features_of(self, kept: KeptNeurons, sums: LayerSystems) -> Columns:
        """The blocks that a plan keeps and that a token reached: there is nothing to learn for others."""
        tokens = sums.systems[routing_of(kept)].tokens
        return columns_of([{b: ids for b, ids in blocks_of(kept, sums.shared).items() if tokens.get(b)}])

    def finish(self, layer: int, sums: LayerSystems, down_EDF: torch.Tensor) -> None:
        """Solve every plan and store this rank's part, once where several do the same to the layer."""
        alike: dict[bytes, Target] = {}
        for target in self.task.targets:
            kept, path = kept_of(target, layer), self.task.file(target, layer, self.shard.rank)
            same = alike.setdefault(key_of(kept), target)
            if same is not target:
                copy_layer(self.task.file(same, layer, self.shard.rank), path)
            elif not prunes(kept, down_EDF.shape[2]):
                write_layer(path, [], [], layer=layer, key=self.task.file_key)
            elif not self.task.stored(target, layer, self.shard.rank):
                self._store(layer, kept, target, sums)
            self.shard.count_work()

    def _store(self, layer: int, kept: KeptNeurons, target: Target, sums: LayerSystems) -> None:
        columns, system = self._features_of(kept, sums), sums.systems[routing_of(kept)]
        plain_MD, prior_MD = sums.starts[key_of(kept)]
        places_M = system.columns.places(columns.neurons)
        diagonal_M = system.equations.gram_NN.diagonal()[torch.from_numpy(places_M)]
        damping = self._damping(columns, system)
        ridge_M = torch.cat([
            torch.full_like(part, damping[block] * (float(part.mean()) or 1.0))
            for block, part in ((block, diagonal_M[span]) for block, span in columns.spans.items())
        ])  # fmt: skip
        solution = system.equations.solve(places_M, ridge_M, plain_MD, prior_MD)
        self._write(layer, kept, target, columns, system, solution)

    def _damping(self, columns: Columns, system: System) -> dict[int, float]:
        """Block -> r_b over its mean diagonal: the ridge, more of it for an expert that few tokens reached."""
        starved = {b: max(1.0, ENOUGH * len(ids) / system.tokens[b]) for b, ids in columns.neurons.items()}
        return {block: self.task.joint_ridge * factor for block, factor in starved.items()}

    def _write(
        self,
        layer: int,
        kept: KeptNeurons,
        target: Target,
        columns: Columns,
        system: System,
        solution: JointSolution,
    ) -> None:
        skeleton, held = self.shard.skeleton, self.shard.held
        own = [b for b in columns.neurons if b in held or (b == SHARED and self.shard.rank == 0)]
        experts = [block for block in own if block != SHARED]
        tensors = compensated_tensors(skeleton.index, skeleton.family, layer, experts, kept)
        if SHARED in own:
            entry = skeleton.index.entry(skeleton.family.shared_down(layer))
            tensors.append(TensorHeader(entry.name, entry.dtype, entry.shape))
        damping = self._damping(columns, system)

        def solved() -> Iterator[CompensatedExpert]:
            errors = (solution.energy, solution.before, solution.after)
            for block in own:
                row = (block, system.tokens[block], damping[block] * solution.damping, *errors)
                yield CompensatedExpert(solution.weights_MD[columns.spans[block]].T, row)

        said = {"features": columns.count, "apart": solution.apart}
        path = self.task.file(target, layer, self.shard.rank)
        write_layer(path, tensors, solved(), layer=layer, key=self.task.file_key, said=said)


def prunes(kept: KeptNeurons, neurons: int) -> bool:
    """Whether a plan takes anything out of a layer whose experts have so many neurons."""
    return bool((kept.widths < neurons).any())


def routing_of(kept: KeptNeurons) -> Routing:
    return None if kept.experts is None else tuple(kept.experts.tolist())


def key_of(kept: KeptNeurons) -> bytes:
    """Equal where two plans do the same to a layer."""
    return repr(routing_of(kept)).encode() + kept.offsets.tobytes() + kept.indices.tobytes()


def blocks_of(kept: KeptNeurons, shared: SharedExpert | None) -> Mapping[int, np.ndarray]:
    """The blocks of features that a plan keeps of a layer: its experts that have neurons, and the shared expert."""
    blocks = {expert: kept.of(expert) for expert in kept.routed.tolist() if kept.widths[expert]}
    return blocks if shared is None else {**blocks, SHARED: np.arange(shared.down_DF.shape[1])}
