"""Compare models on held-out tokens: layer by layer through shards, then norm and head over what left them.

Every pass takes its variants through the layers of one checkpoint, on the same shards as scoring, and stores the
final hidden states of every wave. The tail follows: one worker reads them, wave by wave and piece by piece, and makes
the figures. What is stored is what a run goes on from, after a worker or the driver was lost.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tenp_dist.artifacts import digest_of
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.calibration.items import stored_items
from tenp_dist.checkpoint.families.table import family_and_config
from tenp_dist.checkpoint.index import open_index
from tenp_dist.errors import WorkerLost
from tenp_dist.evaluation.answers import Answers
from tenp_dist.evaluation.evaluate_pass import VariantsTask
from tenp_dist.evaluation.metrics import Box, Metrics, States, open_tail
from tenp_dist.evaluation.variants import Variant
from tenp_dist.passes.compute import Compute
from tenp_dist.passes.hidden_states import tensor_name
from tenp_dist.passes.layer_ops import microbatches
from tenp_dist.passes.pass_task import DEFAULT_WAVES
from tenp_dist.passes.run_pass import PassContext, run_pass
from tenp_dist.passes.schedule import split_waves
from tenp_dist.pool.base import Retries
from tenp_dist.progress import Progress
from tenp_dist.run_files import HIDDEN


@dataclass(frozen=True)
class VariantsPass:
    """One pass over a checkpoint's layers, and the variants of it that go through them."""

    checkpoint: Path
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class EvaluateTask:
    """What an evaluation is asked for.

    passes: the first holds the variant `source`, whose checkpoint also gives the head.
    corpus: file of the held-out tokens, or of items.
    folder: for hidden states, until the figures are made.
    key: of the evaluate stage.
    compute: how workers compute.
    waves, ranks: see `PassTask`.
    items: whether the tokens are items, whose answers count.
    """

    passes: Sequence[VariantsPass]
    corpus: Path
    folder: Path
    key: str
    compute: Compute
    waves: int = DEFAULT_WAVES
    ranks: int = 1
    items: bool = False

    def pass_tasks(self) -> list[VariantsTask]:
        """What the workers of each pass need; compute must be without `auto`."""
        return [self._pass_task(number, one) for number, one in enumerate(self.passes)]

    def _pass_task(self, number: int, one: VariantsPass) -> VariantsTask:
        variants = {name: variant.digest for name, variant in one.variants.items()}
        checkpoint = open_index(one.checkpoint).fingerprint
        made_from = [self.key, read_corpus(self.corpus).digest, number, checkpoint, variants]
        return VariantsTask(
            one.checkpoint,
            self.corpus,
            self.folder,
            digest_of(made_from),
            self.compute,
            waves=self.waves,
            ranks=self.ranks,
            number=number,
            variants=one.variants,
            layers=_num_layers(one.checkpoint),
            items=self.corpus if self.items else None,
        )

    def waves_within(self, host_memory: int | None) -> int:
        """`waves`, or as many more as it takes for the variants' hidden states of one wave to fit `host_memory` twice.

        Twice because a wave is held once more while it is stored.
        """
        if host_memory is None:
            return self.waves
        tokens = read_corpus(self.corpus).tokens_NS.size
        family, config = family_and_config(open_index(self.passes[0].checkpoint).config)
        streams = max(len(one.variants) for one in self.passes)
        nbytes = 2 * tokens * family.hidden_size(config) * self.compute.torch_dtype.itemsize * streams
        return max(self.waves, -(-nbytes // host_memory))


Figures = Metrics | Answers


def evaluate_model(context: PassContext, task: EvaluateTask) -> Figures:
    """Run all passes on the context's shards, then the tail in one worker. The hidden states stay: see `drop_hidden`.

    Args:
        task: without `auto` in it; its ranks are those of the context.

    Raises:
        ClusterError: as `run_pass`.
        NumericalError: NaN or Inf left a layer or the head.
    """
    waves = task.waves_within(context.cluster.host_memory)
    passes = replace(task, ranks=context.cluster.tensor_parallel, waves=waves).pass_tasks()
    waves = passes[0].count_waves()
    total, before = sum(one.layers * waves for one in passes) + waves, 0
    for one in passes:
        run_pass(_shifted(_of_depth(context, one.layers), before, total), one)
        before += one.layers * waves
    return _tail_on(_shifted(context, before, total), passes)


def drop_hidden(task: EvaluateTask) -> None:
    """Remove what an evaluation goes on from; for when its figures are in a file."""
    shutil.rmtree(task.folder / HIDDEN, ignore_errors=True)


def _of_depth(context: PassContext, layers: int) -> PassContext:
    """The context for a checkpoint of so many layers, which may be fewer than the source has."""
    shards = min(context.cluster.shards, layers)
    cluster = context.cluster.model_copy(update={"shards": shards})
    return replace(context, nbytes=context.nbytes[:layers], active=context.active[:layers], cluster=cluster)


def _shifted(context: PassContext, before: int, total: int) -> PassContext:
    """The context, telling a part's progress as that of the whole."""
    return replace(context, progress=lambda step: context.progress(replace(step, done=before + step.done, total=total)))


def _tail_on(context: PassContext, passes: Sequence[VariantsTask]) -> Figures:
    """`run_tail` in one worker, started again where it is lost: what it reads is stored."""
    losses = 0
    while True:
        try:
            gpus = int(passes[0].compute.device == "cuda")
            for event in context.pool.stream(run_tail, passes, context.pool.threads, gpus=gpus):
                if not isinstance(event, Progress):
                    return event
                context.progress(replace(event, retries=losses))
            raise AssertionError("the tail yields its figures last")
        except WorkerLost as error:
            losses += 1
            where = "final hidden states"
            Retries().after(losses, error, "The worker of norm and head", where, context.ledger, time.sleep)


@torch.inference_mode()
def run_tail(passes: Sequence[VariantsTask], threads: int) -> Iterator[Progress | Figures]:
    """Norm and head over the final hidden states of all passes, microbatch by microbatch; the figures last.

    threads: CPU threads of this worker, which has its node to itself: all that the pool lets one worker have.
    """
    first = passes[0]
    compute = replace(first.compute.on_this_machine(), threads=threads)
    corpus = read_corpus(first.corpus)
    batches = microbatches(corpus, compute.batch_tokens, compute.device)
    waves = split_waves(len(batches), first.waves)
    frame = open_tail(first.model, compute)
    figures = Metrics(corpus.domains) if first.items is None else Answers.of(stored_items(first.items), batches)
    leaders = [_final_streams(one) for one in passes]
    for wave, numbers in enumerate(waves):
        with contextlib.ExitStack() as files:
            final: dict[str, States] = {}
            for one, streams in zip(passes, leaders, strict=True):
                stored = files.enter_context(one.hidden_state_files.open(wave, one.layers))
                final |= {name: partial(_read_box, stored, name, compute.device) for name in streams.values()}
            for count, i in enumerate(numbers, start=1):  # each may take minutes, with many variants
                started = time.monotonic()
                figures.add(frame, i, batches[i], final)
                figures.check_finite()
                done, tokens = wave + count / len(numbers), batches[i].tokens_BS.numel() * len(final)
                yield Progress(done, len(waves), tokens, time.monotonic() - started, "norm and head")
    yield figures.shared({name: leader for streams in leaders for name, leader in streams.items()})


def _final_streams(one: VariantsTask) -> dict[str, str]:
    """Variant -> the stream that it left the last layer in."""
    streams = one.streams()
    return {name: streams.leader(name, one.layers) for name in one.variants}


def _read_box(stored: Any, stream: str, device: str, number: int, box: Box) -> torch.Tensor:
    """Hidden states of a box of a microbatch, [b, s, D]; nothing else of the file is read."""
    return stored.get_slice(tensor_name(stream, number))[box].to(device)


def _num_layers(checkpoint: Path) -> int:
    family, config = family_and_config(open_index(checkpoint).config)
    return family.num_layers(config)
