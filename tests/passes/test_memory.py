"""What a shard holds of a model: two layers when it streams, all of them when it is resident, and says so."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from tenp_dist.model.memory import own_zeros
from tenp_dist.pool.machine import resident_memory

BENCH = ROOT / "scripts" / "bench"
LAYERS, LAYER_BYTES = 10, 32 * 3 * 512 * 512 * 2  # MoE layers of the model below, and the experts of one in bfloat16

SCORE = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from tenp_dist.calibration.corpus import Corpus, write_corpus
from tenp_dist.passes.compute import Compute
from tenp_dist.pool.machine import resident_memory
from tenp_dist.passes.schedule import next_unit
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.scoring.score_pass import ScoreTask

model, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tokens_NS = np.random.default_rng(0).integers(0, 1000, (4, 64), dtype=np.int32)
corpus = Corpus(tokens_NS, np.ones_like(tokens_NS, dtype=bool), np.zeros(4, dtype=np.int64), ("text",))
write_corpus(folder / "corpus.arrow", corpus)
task = ScoreTask(model, folder / "corpus.arrow", folder / mode, "key", Compute("cpu", "bfloat16", 128, 1), mode=mode)
shard = LayerWorker(task, range(json.loads((model / "config.json").read_text())["num_hidden_layers"]))
shard.open()
begun, seen = resident_memory(), []
def watch():
    while True:
        seen.append(resident_memory())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
positions = [0] * len(shard.waves)
while unit := next_unit(shard.layers, positions, mode):
    shard.run(unit)
    for wave in unit.waves:
        positions[wave] = unit.stop
print(json.dumps([max(seen) - begun, shard.heartbeat().memory - begun]))
"""

FAULTS = """
import resource
import torch
from tenp_dist.model.memory import keep_heap

keep_heap()
def microbatch():
    return [torch.empty(15 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]
microbatch(), microbatch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    microbatch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sys.path.insert(0, str(BENCH))
    try:
        from synthetic import Shape, write_synthetic
    finally:
        sys.path.remove(str(BENCH))
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    write_synthetic(folder, Shape(hidden=512, layers=LAYERS, experts=32, neurons=512, heads=4))
    return folder


def used(model: Path, folder: Path, mode: str) -> list[int]:
    """Peak and last of what scoring adds to an open shard's anonymous memory, in a process of its own."""
    command = [sys.executable, "-c", SCORE, model, folder, mode]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def test_weights_count_as_memory_and_go_back():
    before = resident_memory()
    weights = own_zeros((64, 1 << 20), torch.uint8)
    weights.fill_(1)
    assert resident_memory() - before > 60 << 20
    del weights
    assert resident_memory() - before < 16 << 20


@pytest.mark.slow
@pytest.mark.beside
def test_what_a_microbatch_frees_is_kept_for_the_next():
    """Else its 60 MB are given back and taken again every time, but where chance has put something on top of them."""
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS], check=True, stdout=subprocess.PIPE).stdout) for _ in range(4)
    ]
    touched = 20 * 4 * (15 << 20) // resource.getpagesize()
    assert max(faults) < touched / 10, faults


@pytest.mark.slow
def test_streaming_memory_does_not_follow_depth(model, tmp_path):
    peak, _ = used(model, tmp_path, "streaming")
    assert peak < 2 * LAYER_BYTES + 60e6  # two layers; what the allocator keeps of the activations is most of the rest


@pytest.mark.slow
def test_a_resident_shard_says_that_it_holds_its_layers(model, tmp_path):
    peak, last = used(model, tmp_path, "resident")
    assert min(peak, last) > 0.7 * LAYERS * LAYER_BYTES  # some are read ahead in `open`
