"""Compare models on held-out tokens: layer by layer through shards, then the tail over what left them.

Every pass takes its variants through the layers of one checkpoint, on the same shards as scoring, and
stores the final hidden states of every wave. One worker then reads them, wave by wave, and makes the
figures. What is stored is what a run goes on from, after a worker or the driver was lost.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tenp_dist.artifacts import digest_of, file_digest
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.checkpoint.index import open_index
from tenp_dist.config import Cluster
from tenp_dist.engine.carrier import DEFAULT_WAVES, read_hidden, run_here
from tenp_dist.engine.compute import Compute, Progress, microbatches
from tenp_dist.engine.controller import Ledger, Retries
from tenp_dist.engine.drive import cut_model, drive
from tenp_dist.engine.local import Pool
from tenp_dist.engine.schedule import split_waves
from tenp_dist.errors import WorkerLost
from tenp_dist.evaluation.metrics import Metrics, compare, open_tail
from tenp_dist.evaluation.shard import EvaluateShard, PassTask


@dataclass(frozen=True)
class Pass:
    """One pass over a checkpoint's layers. variants: name -> kept-neurons file, None for no mask."""

    checkpoint: Path
    variants: Mapping[str, Path | None]


@dataclass(frozen=True)
class EvaluateTask:
    """passes[0] holds the variant `source`, whose checkpoint also gives the head.

    folder: for hidden states, until the figures are made. key: of the evaluate stage. waves, ranks: see `CarryTask`.
    """

    passes: Sequence[Pass]
    corpus: Path
    folder: Path
    key: str
    compute: Compute
    waves: int = DEFAULT_WAVES
    ranks: int = 1

    def pass_tasks(self) -> list[PassTask]:
        """What the workers of each pass need; compute must be settled."""
        return [self._pass_task(number, one) for number, one in enumerate(self.passes)]

    def _pass_task(self, number: int, one: Pass) -> PassTask:
        masks = {name: path and file_digest(path) for name, path in one.variants.items()}
        made_from = [self.key, read_corpus(self.corpus).digest, number, open_index(one.checkpoint).fingerprint, masks]
        return PassTask(
            one.checkpoint,
            self.corpus,
            self.folder,
            digest_of(made_from),
            self.compute,
            waves=self.waves,
            ranks=self.ranks,
            number=number,
            variants=one.variants,
        )


def evaluate_model(
    pool: Pool,
    task: EvaluateTask,
    nbytes: Sequence[int],
    cluster: Cluster,
    progress: Callable[[Progress], None],
    ledger: Ledger,
) -> Metrics:
    """Run all passes on the pool's shards, then the tail in one worker.

    Args:
        task: settled (no `auto` in it); compute.threads: of the tail's worker.
        nbytes: of every decoder layer at its full width in compute dtype.

    Raises:
        ClusterError: more shards than layers, the cluster is smaller than asked, or a worker was lost too often.
        NumericalError: NaN or Inf left a layer.
    """
    passes = replace(task, ranks=cluster.tensor_parallel).pass_tasks()
    cut = cut_model(cluster, nbytes, task.compute.device)
    waves = passes[0].count_waves()
    steps = len(nbytes) * waves
    total = len(passes) * steps + waves
    for one in passes:
        drive(pool, EvaluateShard, one, cut, cluster, _shifted(progress, one.number * steps, total), ledger)
    metrics = _tail_on(pool, passes, _shifted(progress, len(passes) * steps, total), ledger)
    drop_hidden(task)
    return metrics


def _shifted(progress: Callable[[Progress], None], before: int, total: int) -> Callable[[Progress], None]:
    """Report a part's progress as that of the whole."""
    return lambda step: progress(replace(step, done=before + step.done, total=total))


def _tail_on(pool: Pool, passes: Sequence[PassTask], progress: Callable[[Progress], None], ledger: Ledger) -> Metrics:
    """`run_tail` in one worker, started again where it is lost: what it reads is stored."""
    losses = 0
    while True:
        try:
            for event in pool.stream(run_tail, passes, gpus=int(passes[0].compute.device == "cuda")):
                if isinstance(event, Metrics):
                    return event
                progress(event)
            raise AssertionError("the tail yields its metrics last")
        except WorkerLost as error:
            losses += 1
            Retries().after(losses, error, "The worker of norm and head", "final hidden states", ledger, time.sleep)


@torch.inference_mode()
def run_tail(passes: Sequence[PassTask]) -> Iterator[Progress | Metrics]:
    """Norm and head over the final hidden states of all passes, wave by wave; the Metrics last."""
    first = passes[0]
    compute = first.compute.resolved()
    corpus = read_corpus(first.corpus)
    batches = microbatches(corpus, compute.batch_tokens, compute.device)
    waves = split_waves(len(batches), first.waves)
    frame, metrics = open_tail(first.model, compute), Metrics(corpus.domains)
    for wave, numbers in enumerate(waves):
        started = time.monotonic()
        final = {}
        for one in passes:
            final |= read_hidden(
                one.boundaries, wave, frame.skeleton.num_layers, tuple(one.variants), numbers, compute.device
            )
        compare(metrics, frame, [batches[i] for i in numbers], final)
        tokens = sum(batches[i].tokens_BS.numel() for i in numbers) * len(final)
        yield Progress(wave + 1, len(waves), tokens, time.monotonic() - started, "norm and head")
    yield metrics


def evaluate_shard(task: EvaluateTask) -> Iterator[Progress | Metrics]:
    """All passes as one shard each, here and now: yields progress, then the Metrics."""
    task = replace(task, compute=task.compute.resolved())
    passes = task.pass_tasks()
    for one in passes:
        shard = EvaluateShard(one)
        shard.open()
        yield from run_here(shard, [one.boundaries.position(wave) for wave in range(len(shard.waves))])
    yield from run_tail(passes)
    drop_hidden(task)


def drop_hidden(task: EvaluateTask) -> None:
    """Remove what only an unfinished evaluation needs."""
    shutil.rmtree(task.folder / "hidden", ignore_errors=True)
