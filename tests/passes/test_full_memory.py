"""Where no memory is left a worker ends with one error, whichever allocator said so; others stay as they are."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helpers.scoring import pass_context, random_corpus
from tenp_dist.calibration.corpus import write_corpus
from tenp_dist.errors import MemoryFullError
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.full_memory import whose_memory
from tenp_dist.passes.layer_step import LayerStep, OpenShard
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.run_pass import run_pass

TOO_MUCH = 1 << 60  # bytes


def on_an_accelerator() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total of 79.10 GiB")


ALLOCATIONS = {
    "torch": lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
    "numpy": lambda: np.empty(TOO_MUCH, dtype=np.uint8),
    "mapping": lambda: mmap.mmap(-1, TOO_MUCH),
    "accelerator": on_an_accelerator,
}


class Greedy(LayerStep):
    """Asks for more than there is in layer 2."""

    def __init__(self, allocate: str):
        self.allocate = allocate

    def take(self, layer, wave, module, hidden) -> None:
        if layer == 2:
            ALLOCATIONS[self.allocate]()


@dataclass(frozen=True)
class GreedyTask(PassTask):
    allocate: str = ""

    def step(self, shard: OpenShard) -> Greedy:
        return Greedy(self.allocate)


@pytest.mark.parametrize(
    ("allocate", "mode", "whose", "advice"),
    [
        ("torch", "streaming", "this machine", "or cluster.tensor_parallel"),
        ("numpy", "resident", "this machine", "cluster.mode: streaming"),
        ("mapping", "streaming", "this machine", "or cluster.tensor_parallel"),
        ("accelerator", "resident", "the accelerator", "cluster.mode: streaming"),
    ],
)
def test_full_memory_says_whose_where_and_what_to_do(allocate, mode, whose, advice, tiny_model, tmp_path):
    write_corpus(tmp_path / "corpus.arrow", random_corpus(256, sequences=6))
    task = GreedyTask(
        tiny_model("deepseek_v3"),
        tmp_path / "corpus.arrow",
        tmp_path / "pass",
        "key",
        Compute("cpu", "float32", 24),
        mode=mode,
        allocate=allocate,
    )
    with pytest.raises(MemoryFullError, match=f"The memory of {whose} is full") as caught:
        run_pass(pass_context(task.model, tmp_path / "ledger", mode=mode), task)
    message = str(caught.value)
    assert caught.value.exit_code == 15 and "a microbatch of 24 tokens" in message and advice in message
    assert "layer" in str(caught.value.where) and (allocate != "accelerator" or "GPU 0" in message)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), FileNotFoundError("x"), ValueError("out of memory")])
def test_other_errors_are_of_no_memory(error):
    assert whose_memory(error) is None
