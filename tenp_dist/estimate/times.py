"""Seconds of every stage.

A streaming shard reads a layer while it computes the one before: a layer takes the longer of both, and shards take
turns. Resident shards read all of theirs first; then W waves go through S of them in W + S - 1 steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tenp_dist.estimate.machines import Machines
from tenp_dist.estimate.memory import Split
from tenp_dist.estimate.work import Layer, Pass, Work
from tenp_dist.passes.placement import cores_per_rank
from tenp_dist.preflight.disk_space import tokens_of

TOKENIZER = 200_000  # tokens per second of a fast tokenizer on one core
PLAN_EXPERTS = 10_000  # experts per second that the solver of `global` takes
EXCHANGES = 3  # all-reduces of a layer
FLOAT64 = 16  # how much slower solves are where the machines do not say


@dataclass(frozen=True)
class StageTime:
    """What a stage takes.

    stage: its name.
    seconds: from its beginning to its end.
    formula: how they come about, with its numbers.
    """

    stage: str
    seconds: float
    formula: str


@dataclass(frozen=True)
class Clock:
    """The machines at work on a split model.

    work: what is to be done.
    machines: where.
    split: of the model over them.
    """

    work: Work
    machines: Machines
    split: Split

    @property
    def rank_flops(self) -> float:
        """Operations per second of one rank."""
        if self.machines.accelerators:
            return self.machines.flops
        cores = [self.machines.cores] * self.machines.nodes
        return self.machines.flops * cores_per_rank(cores, self.split.shards, self.split.ranks) / self.machines.cores

    @property
    def nodes_used(self) -> int:
        return min(self.machines.nodes, -(-self.split.shards * self.split.ranks // self.machines.workers))

    def stages(self) -> Iterator[StageTime]:
        """In the order of the job."""
        for stage in self.work.stages:
            own = [one for one in self.work.passes if one.stage == stage]
            rest = self.beside(stage)
            if own:
                found = [self.one_pass(one) for one in own]
                seconds = sum(one for one, _ in found) + self.machines.start * len(own)
                yield StageTime(stage, seconds + rest.seconds, " + ".join(text for _, text in found))
            else:
                yield rest

    def one_pass(self, one: Pass) -> tuple[float, str]:
        job = self.work.run.job
        text = job.evaluation if one.stage == "evaluate" and job.evaluation else job.calibration
        layers = self.work.layers(text.sequence_length)
        facts = self.work.run.source.facts
        moe = set(facts.moe_layers)
        compute = [self.layer_seconds(layer, one, moe=number in moe) for number, layer in enumerate(layers)]
        form = (
            f"{one.tokens * one.streams:,} tokens at {self.rank_flops * self.split.ranks / 1e12:,.2f} TFLOP/s a shard"
        )
        if self.split.mode == "streaming" or one.turns:
            reads = [self.read_seconds(layer, 1) * one.reads for layer in layers]
            seconds = sum(max(pair) for pair in zip(reads, compute, strict=True)) + reads[0]
            return seconds, f"sum over layers of max(read {sum(reads):,.0f} s, compute {sum(compute):,.0f} s); {form}"
        shards, waves = self.split.shards, job.score.waves
        reads = [self.read_seconds(layer, self.nodes_used) * one.reads for layer in layers]
        seconds = sum(reads) + sum(compute) / shards * (waves + shards - 1) / waves
        return seconds, f"read {sum(reads):,.0f} s + compute {sum(compute):,.0f} s / S (W + S - 1) / W; {form}"

    def layer_seconds(self, layer: Layer, one: Pass, *, moe: bool) -> float:
        """Of one layer for all tokens, on the ranks of one shard."""
        facts = self.work.run.source.facts
        rate = self.rank_flops * self.split.ranks
        flops = one.tokens * (layer.dense + layer.routed) * one.streams
        if not moe:
            return flops / rate + one.tokens * one.streams * self.exchange_seconds()
        slots, exact = one.tokens * facts.top_k, rate * self.exact
        flops += slots * one.routed_extra
        single = slots * one.sums.float32 / (exact if self.machines.accelerators else rate)
        double = (slots * one.sums.float64 + one.sums.solve * facts.num_experts) / exact
        return flops / rate + single + double + one.tokens * one.streams * self.exchange_seconds()

    @property
    def exact(self) -> float:
        """Rate of float64 as a share of `flops`; of float32 too on accelerators, which sum with all of its digits."""
        slow = self.machines.solve_flops or self.machines.flops / FLOAT64
        return slow / self.machines.flops

    def exchange_seconds(self) -> float:
        """For a token in a layer: attention, shared expert and routed output, summed over ranks in float32 each."""
        ranks, link = self.split.ranks, self.machines.link
        sent = EXCHANGES * 4 * self.work.run.source.facts.hidden_size * 2 * (ranks - 1) / ranks  # a ring all-reduce
        return sent / link if link else 0.0

    def read_seconds(self, layer: Layer, nodes: int) -> float:
        """From where the model lies, and on to the accelerators of one shard."""
        upload = layer.loaded / self.split.ranks / self.machines.upload if self.machines.upload else 0.0
        return max(layer.stored / (self.machines.read * nodes), upload)

    def beside(self, stage: str) -> StageTime:
        """What a stage does beside passes."""
        run, machines = self.work.run, self.machines
        facts, nodes = run.source.facts, machines.nodes
        if stage == "calibrate":
            texts = [run.job.calibration, *([run.job.evaluation] if run.job.evaluation else [])]
            tokens = sum(map(tokens_of, texts))
            return StageTime(stage, tokens / TOKENIZER, f"{tokens:,} tokens / {TOKENIZER:,} per second")
        if stage == "plan":
            experts = len(facts.moe_layers) * facts.num_experts
            return StageTime(stage, experts / PLAN_EXPERTS, f"{experts:,} experts / {PLAN_EXPERTS:,} per second")
        if stage in ("write", "verify"):
            read, write = facts.bytes.stored, self.work.written
            both = write + read if stage == "verify" else read
            seconds = max(both / machines.read, (write if stage == "write" else 0) / machines.write) / nodes
            text = f"max(read {both / 1e9:,.1f} GB, write {write / 1e9:,.1f} GB) on {nodes} nodes"
            return StageTime(stage, seconds, text)
        return StageTime(stage, 1.0, "headers and files of a few megabytes")
