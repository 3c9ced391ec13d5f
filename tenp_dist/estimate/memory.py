"""Bytes that a rank needs: weights, a microbatch, sums; and those that a node and the disk need."""

from __future__ import annotations

from dataclasses import dataclass

from tenp_dist.compensation.moments import WORKSPACE
from tenp_dist.estimate.work import Work
from tenp_dist.passes.placement import cut_layers
from tenp_dist.passes.schedule import Mode

PROCESS = 400 * 10**6  # interpreter, libraries and skeleton
CONTEXT = 1_500 * 10**6  # what an accelerator's libraries take of its memory


@dataclass(frozen=True)
class Split:
    """How layers lie over workers.

    shards: groups of ranks, each with a range of layers.
    ranks: of each shard.
    mode: whether a shard keeps its layers or takes one after another.
    """

    shards: int
    ranks: int
    mode: Mode

    def __str__(self) -> str:
        return f"{self.shards} x {self.ranks}, {self.mode}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    weights: of layers in the compute dtype.
    microbatch: activations of a microbatch.
    sums: what a layer's experts are summed in.
    hidden: hidden states of all tokens, in host memory or on the disk.
    formula: how they come about.
    """

    weights: int
    microbatch: int
    sums: int
    hidden: int
    formula: str

    @property
    def device(self) -> int:
        return self.weights + self.microbatch + self.sums


def rank_memory(work: Work, split: Split, device: str = "cpu") -> Memory:
    """At the pass that needs the most: shards that keep their layers let go of them where a pass streams."""
    job, facts = work.run.job, work.run.source.facts
    loaded = [layer.loaded for layer in work.layers(1)]
    weights, held, sums = (
        2 * max(loaded),
        "two of the largest layer",
        max(_held(work, split, device, t) for t in (False, True)),
    )
    if split.mode == "resident":
        shards = cut_layers(job.cluster.model_copy(update={"shards": split.shards}), loaded)
        largest, own = max(sum(loaded[layer] for layer in shard) for shard in shards), _held(work, split, device, False)
        streams = any(one.turns for one in work.passes)
        if not streams or largest // split.ranks + own >= weights // split.ranks + _held(work, split, device, True):
            weights, held, sums = largest, "the largest shard", own
    batch, length = job.score.batch_tokens, job.calibration.sequence_length
    sequences = max(1, batch // length) * length
    expert = facts.top_k * (3 * facts.intermediate_size + 2 * facts.hidden_size) / split.ranks
    microbatch = int(sequences * work.itemsize * (expert + 6 * facts.hidden_size + 4 * work.attention_width))
    hidden = max(one.tokens * one.streams for one in work.passes) * facts.hidden_size * work.itemsize
    text = (
        f"{held} / {split.ranks} ranks + {sequences:,} tokens x (top-{facts.top_k} x (3 F + 2 D) / ranks + 6 D + 4 A) "
        f"x {work.itemsize} B + {facts.num_experts} experts' sums / ranks"
    )
    return Memory(weights // split.ranks, microbatch, sums, hidden, text)


def _held(work: Work, split: Split, device: str, turns: bool) -> int:
    """Bytes of sums of a rank, and of solving them, in passes that always stream, or in the others."""
    own = [one.sums for one in work.passes if one.turns is turns]
    each = max((sums.held for sums in own), default=0)
    solving = WORKSPACE[device] if any(sums.solve for sums in own) else 0
    return each * work.run.source.facts.num_experts // split.ranks + solving
