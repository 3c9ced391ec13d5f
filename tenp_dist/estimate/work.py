"""What a job does, counted from headers: bytes and operations of every layer, and how often tokens go through them.

A multiply and an add are two operations. An expert costs a token 6 D F; 2 D F more where it is scored (every neuron's
share of the output is `y @ W_down`, Eq. 8), 2 F^2 where its Gram matrix is summed; `refits.py` has what compensation
takes. Attention costs 4 S per token and channel of its output beside its matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import JOINT, PRUNED, Job
from tenp_dist.estimate.refits import NOTHING, Sums, apart, apart_checked, joint, joint_checked
from tenp_dist.evaluation.selection import candidates
from tenp_dist.layouts.base import output_sizes
from tenp_dist.layouts.table import layouts_of, written_source
from tenp_dist.passes.placement import active_bytes, layer_bytes
from tenp_dist.preflight.disk_space import bytes_needed, streams, tokens_of

_GRADIENTS = 3  # plain passes that one up and back takes as long as, about (scripts/bench/gradients.py)
_OVER_NETWORK = ("fetch", "publish")
_OUTPUT_PROJECTIONS = ("o_proj.weight", "out_proj.weight", "dense.weight")


@dataclass(frozen=True)
class Asked:
    """What is estimated.

    job: what is to be done.
    source: the checkpoint to prune.
    stages: names of the job's stages, in order.
    """

    job: Job
    source: Source
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    stored: bytes on the disk.
    loaded: bytes in the compute dtype.
    dense, routed: operations that a token costs outside its experts, and in them.
    """

    stored: int
    loaded: int
    dense: float
    routed: float


@dataclass(frozen=True)
class Pass:
    """Tokens on their way through all layers, once.

    stage: whose pass it is.
    tokens: of one stream.
    streams: forms of the model that go through it.
    reads: models that are read: plans and controls are made of one that is in memory.
    routed_extra: operations of a routed token and expert beside the forward, in the compute dtype.
    sums: what else is made of them.
    turns: whether layers come one after another in any mode, and several shards take turns (`passes/layer_sums.py`).
    """

    stage: str
    tokens: int
    streams: int = 1
    reads: int = 1
    routed_extra: float = 0.0
    sums: Sums = NOTHING
    turns: bool = False


@dataclass(frozen=True)
class Work:
    """What a run does.

    run: what is asked for.
    itemsize: bytes of a number in the compute dtype.
    """

    run: Asked
    itemsize: int

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Those of the job but for what comes and goes over the network, whose rate nobody states."""
        return tuple(stage for stage in self.run.stages if stage not in _OVER_NETWORK)

    def layers(self, sequence_length: int) -> list[Layer]:
        """Decoder layers, for tokens in sequences of so many."""
        if sequence_length not in self._layers:
            self._layers[sequence_length] = self._counted(sequence_length)
        return self._layers[sequence_length]

    @cached_property
    def _layers(self) -> dict[int, list[Layer]]:
        """Those that were counted already, for every split is tried on them."""
        return {}

    def _counted(self, sequence_length: int) -> list[Layer]:
        facts = self.run.source.facts
        loaded = layer_bytes(facts, self.itemsize)
        parameters = active_bytes(facts, 1)  # that a token meets
        routed = facts.top_k * 3 * facts.hidden_size * facts.intermediate_size
        stored = self._stored()
        found = []
        for number in range(facts.num_layers):
            own = routed if number in facts.moe_layers else 0
            attention = 4 * sequence_length * self.attention_width
            found.append(Layer(stored[number], loaded[number], 2.0 * (parameters[number] - own) + attention, 2.0 * own))
        return found

    @cached_property
    def attention_width(self) -> int:
        """Channels that attention puts out, before its last matrix; the model's width where no name tells."""
        tensors = self.run.source.index.tensors.items()
        widths = [e.shape[1] for name, e in tensors if name.endswith(_OUTPUT_PROJECTIONS) and len(e.shape) == 2]
        return max(widths, default=self.run.source.facts.hidden_size)

    def _stored(self) -> dict[int, int]:
        """Decoder layer -> bytes on the disk: its share of what all layers take."""
        facts, index = self.run.source.facts, self.run.source.index
        share = facts.bytes.stored / max(1, index.nbytes)
        return {layer: int(nbytes * share) for layer, nbytes in facts.bytes.per_layer.items()}

    @cached_property
    def written(self) -> int:
        """Bytes of all checkpoints that the job writes."""
        source = written_source(self.run.job, self.run.source)
        sizes = output_sizes(source, output_form(source, self.run.job.output.dtype))
        return sum(layout.nbytes(sizes, self.run.job) for layout in layouts_of(self.run.job))

    @cached_property
    def disk(self) -> int:
        """Bytes of the run directory."""
        return bytes_needed(self.run.job, self.run.source)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """In the order in which the job makes them."""
        return tuple(self._passes())

    def _passes(self) -> Iterator[Pass]:
        job, facts = self.run.job, self.run.source.facts
        neurons, hidden = facts.intermediate_size, facts.hidden_size
        kept = int(neurons * job.budget.retention)
        tokens = tokens_of(job.calibration)
        if "score" in self.stages:
            yield Pass("score", tokens, routed_extra=2.0 * hidden * neurons, sums=Sums(held=8 * 4 * neurons))
        if "eliminate" in self.stages:
            solve = 2.0 * neurons**3 + 2.0 * neurons**2 * hidden
            yield Pass("eliminate", tokens, sums=Sums(2.0 * neurons**2, 0.0, solve, 16 * neurons**2), turns=True)
        if "gradients" in self.stages:
            yield from [Pass("gradients", tokens, turns=True)] * _GRADIENTS
        if "select" in self.stages:
            share = int(tokens * job.selection_share)
            yield Pass("select", share, 1 + len(job.forms) * len(candidates(job.budget)))
        if "compensate" in self.stages:
            forwards = 3 if job.output.compensate_on == PRUNED else 1  # of the source; twice of the pruned model
            makes, checks = (joint, joint_checked) if JOINT in job.forms else (apart, apart_checked)
            yield Pass("compensate", tokens, forwards, sums=makes(facts, kept), turns=True)
            yield Pass("verify", tokens, forwards, sums=checks(facts, kept), turns=True)
        if job.evaluation is not None and "evaluate" in self.stages:
            models = 1 + job.evaluation.checkpoint  # what was written is a model of its own, at most as large
            measured = streams(job, job.evaluation, self.run.source)
            yield Pass("evaluate", tokens_of(job.evaluation), measured, models)
