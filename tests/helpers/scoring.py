"""Random corpora, places to work at, and the scores of small models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tenp_dist.calibration.corpus import Corpus, write_corpus
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import read_config
from tenp_dist.checkpoint.source import open_source
from tenp_dist.config import Cluster
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.layer_ops import microbatches
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.passes.pass_task import PassTask
from tenp_dist.passes.placement import layer_bytes
from tenp_dist.passes.run_pass import PassContext
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.progress import Ledger
from tenp_dist.scoring.score_pass import ScoreTask, score_model
from tenp_dist.scoring.statistics import LayerStatistics, read_statistics

FAMILIES = ("deepseek_v2", "deepseek_v3", "qwen2_moe", "qwen3_moe")
COMPUTE = Compute("cpu", "float32", batch_tokens=64, threads=1)


def random_corpus(vocab_size: int, *, sequences=6, length=24, padded=False, seed=0) -> Corpus:
    """Two domains of random tokens; with `padded`, every other sequence is cut short."""
    generator = np.random.default_rng(seed)
    mask = np.ones((sequences, length), dtype=bool)
    if padded:
        mask[::2, length // 3 :] = False
    tokens = generator.integers(2, vocab_size, (sequences, length)).astype(np.int32)
    return Corpus(tokens, mask, np.arange(sequences, dtype=np.int32) % 2, ("first", "second"))


def depth(model: Path) -> int:
    """Decoder layers."""
    family, config = family_and_config(read_config(model))
    return family.num_layers(config)


def pass_context(model: Path, ledger: Path, pool=None, progress=lambda step: None, **cluster) -> PassContext:
    """A place for the model's shards, this process if no pool is given; layers of equal size."""
    layers = depth(model)
    return PassContext(pool or InProcessPool(cores=1), Cluster(**cluster), [1] * layers, Ledger(ledger), progress)


def moe_layers(model: Path) -> list[int]:
    return list(open_source(model).facts.moe_layers)


def whole_worker(task: PassTask) -> LayerWorker:
    """A worker that owns all layers of the task's model; not open yet."""
    return LayerWorker(task, range(depth(task.model)))


def score(model, corpus, folder, compute=COMPUTE) -> dict[int, LayerStatistics]:
    write_corpus(folder / "corpus.arrow", corpus)
    task = ScoreTask(model, folder / "corpus.arrow", folder / "scores", "key", compute)
    score_model(pass_context(model, folder / "ledger"), task, moe_layers(model))
    return read_scores(folder)


def read_scores(folder) -> dict[int, LayerStatistics]:
    return {int(p.stem.split("_")[1]): read_statistics(p) for p in sorted((folder / "scores").glob("layer_*"))}


def batches_of(corpus):
    return [(b.tokens_BS, b.mask_BS, b.domain) for b in microbatches(corpus, COMPUTE.batch_tokens)]


def task_of(tmp_path, model, **compute):
    write_corpus(tmp_path / "corpus.arrow", random_corpus(256, sequences=6))
    options = {"device": "cpu", "dtype": "float32", "batch_tokens": 24, "threads": 1} | compute
    return ScoreTask(model, tmp_path / "corpus.arrow", tmp_path / "run" / "scores", "key", Compute(**options), waves=4)


def run_scores(pool, model, folder: Path, *, corpus=None, waves=4, **cluster) -> dict[str, bytes]:
    """Score with microbatches of one sequence; the bytes of the score files."""
    corpus = corpus or random_corpus(256, sequences=10)
    write_corpus(folder / "corpus.arrow", corpus)
    task = ScoreTask(
        model, folder / "corpus.arrow", folder / "scores", "key", Compute("cpu", "float32", 24, 1), waves=waves
    )
    context = pass_context(model, folder / "stages" / "score.ledger.jsonl", pool, **cluster)
    score_model(replace(context, nbytes=layer_bytes(open_source(model).facts, 4)), task, moe_layers(model))
    assert sorted(path.name for path in (folder / "scores").iterdir() if path.is_dir()) == []
    return {path.name: path.read_bytes() for path in sorted((folder / "scores").glob("layer_*"))}
