"""What a pass has to bring: a task that makes a `LayerStep`, or a `LayerSum` where it sums a layer over all waves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers.scoring import pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.hidden_states import GuardedHiddenStateFiles
from tenp_dist.passes.layer_ops import run_layer
from tenp_dist.passes.layer_step import SINGLE_STREAM, LayerStep, OpenShard
from tenp_dist.passes.layer_sums import LayerSum, LayerSumTask, run_layer_sums
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.run_pass import run_pass

SEEN: list[Any] = []  # what the steps of a test did, in order; the pool is this process


def made(kind: type[PassTask], tmp_path, model, **options) -> PassTask:
    write_corpus(tmp_path / "corpus.arrow", random_corpus(256, sequences=6))
    compute = Compute("cpu", "float32", 24)
    return kind(model, tmp_path / "corpus.arrow", tmp_path / "pass", "key", compute, waves=3, **options)


class Doubled(LayerStep):
    """Doubles the hidden states instead of running the layer, and notes what it was called with."""

    keeps_final = True

    def __init__(self, shard: OpenShard):
        self.shard = shard

    def take(self, layer, wave, module, hidden) -> None:
        SEEN.append(("take", layer, wave, len(self.shard.batches[wave])))
        for state in hidden[SINGLE_STREAM]:
            state.mul_(2)

    def result(self, layer) -> Callable[[], None]:
        return lambda: SEEN.append(("stored", layer))


@dataclass(frozen=True)
class DoubledTask(PassTask):
    def step(self, shard: OpenShard) -> Doubled:
        return Doubled(shard)


def test_a_step_takes_every_wave_through_every_layer_and_its_results_are_stored(tiny_model, tmp_path):
    """4 layers, 3 waves of 2 microbatches; what leaves the last layer is 2^4 times what was embedded."""
    SEEN.clear()
    task = made(DoubledTask, tmp_path, tiny_model("deepseek_v3"))
    done = run_pass(pass_context(task.model, tmp_path / "ledger", mode="streaming"), task)
    assert (done.mode, done.resumed_share, done.tokens) == ("streaming", 0, 6 * 24)
    taken = [one for one in SEEN if one[0] == "take"]
    assert taken == [("take", layer, wave, 2) for layer in range(4) for wave in range(3)]
    assert [one for one in SEEN if one[0] == "stored"] == [("stored", layer) for layer in range(4)]
    stored = [task.hidden_state_files.read(wave, 4) for wave in range(3)]
    assert [list(one) for one in stored] == [["00000", "00001"], ["00002", "00003"], ["00004", "00005"]]
    with TensorReader(open_index(task.model)) as reader:
        embedding = reader.tensor("model.embed_tokens.weight")
    tokens = torch.from_numpy(random_corpus(256, sequences=6).tokens_NS[0]).long()
    torch.testing.assert_close(stored[0]["00000"][0], 16 * embedding[tokens])


class Slow(LayerSum[list]):
    """Sums nothing, and takes long to store it."""

    def __init__(self, task: SlowTask, shard: OpenShard):
        self.task, self.shard = task, shard

    def begin(self, layer, experts) -> list:
        SEEN.append(("begin", layer))
        return []

    def add(self, layer, module, batches, states, sums) -> None:
        run_layer(self.shard.frame, layer, module, batches, states, self.shard.share)
        sums.append(len(batches))

    def finish(self, layer, sums, down_EDF) -> None:
        time.sleep(0.3)
        SEEN.append(("finish", layer, sums, tuple(down_EDF.shape)))
        self.task.finished.add(layer)


@dataclass(frozen=True)
class SlowTask(LayerSumTask):
    finished: set = field(default_factory=set)

    def layer_sum(self, shard: OpenShard) -> Slow:
        return Slow(self, shard)

    def done_by(self, layer: int, rank: int) -> bool:
        return layer in self.finished


def test_the_sums_of_a_layer_begin_when_those_before_are_stored(tiny_model, tmp_path):
    """Also where nothing is committed between the layers. Layers that are there already are run and not summed."""
    SEEN.clear()
    task = made(SlowTask, tmp_path, tiny_model("deepseek_v3"), moe=(1, 2, 3), finished={2})
    assert isinstance(task.hidden_state_files, GuardedHiddenStateFiles)
    run_layer_sums(pass_context(task.model, tmp_path / "ledger"), task)
    wanted = [one for i in (1, 3) for one in (("begin", i), ("finish", i, [2, 2, 2], (8, 32, 24)))]
    assert wanted == SEEN
    assert not task.hidden_state_files.folder.exists()
