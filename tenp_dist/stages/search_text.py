"""What a search measures individuals on: text, or items whose answers count; and the development split of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import file_digest
from tenp_dist.calibration.corpus import read_corpus, write_corpus
from tenp_dist.calibration.items import Item, build_items, read_items, write_items
from tenp_dist.calibration.shortened import first_sequences
from tenp_dist.evaluation.answers import ERROR
from tenp_dist.evaluation.selection import weighted_mean
from tenp_dist.job_parts import ACCURACY
from tenp_dist.stages.base import tokenizer_digest
from tenp_dist.stages.run import Run

_OF_TEXT = ("nll", "kl", "top1_agreement")


@dataclass(frozen=True)
class SearchText:
    """fitness, development: files of tokens, on which nothing is measured twice.

    items: whether they are items.
    """

    fitness: Path
    development: Path
    items: bool = False


def search_text(run: Run) -> SearchText:
    """The text of a search, in files.

    Raises:
        CalibrationError: as `read_items` and `build_items`.
    """
    files, asked = run.files, run.job.search
    if asked.items is not None:
        parts = split_items(read_items(asked.items), run.job.selection_share, asked.sequences)
        paths = (files.search.fitness_text, files.search.development_text)
        for path, items in zip(paths, parts, strict=True):
            vocab_size, longest = run.source.facts.vocab_size, run.job.calibration.sequence_length
            write_items(path, build_items(asked.items, items, run.model, vocab_size, longest))
        return SearchText(*paths, items=True)
    if asked.sequences is None:
        return SearchText(files.calibration, files.selection_text)
    write_corpus(files.search.fitness_text, first_sequences(read_corpus(files.calibration), asked.sequences))
    return SearchText(files.search.fitness_text, files.selection_text)


def split_items(
    items: Sequence[Item], share: Fraction, count: int | None = None
) -> tuple[Sequence[Item], Sequence[Item]]:
    """Items that fitness is measured on, at most `count`, and the last `share`, which is set aside: at least one."""
    cut = len(items) - max(1, math.floor(share * len(items)))
    return items[: cut if count is None else min(count, cut)], items[cut:]


def item_fields(run: Run) -> dict[str, Any]:
    """What changes a search that asks items."""
    asked = run.job.search
    return {} if asked.items is None else {"items": [file_digest(asked.items), tokenizer_digest(run)]}


def criterion(run: Run) -> str:
    """The figure that is least in the best individual."""
    fitness = run.job.search.fitness
    return ERROR if fitness == ACCURACY else fitness


def figures_of(run: Run, own: Mapping[str, Any]) -> dict[str, float]:
    """What a variant measured, domains by their weights; items have none."""
    if run.job.search.items is not None:
        return dict(own)
    return {name: weighted_mean(own, name, run.domain_weights) for name in _OF_TEXT}
