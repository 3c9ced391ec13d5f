"""What a search of experts is refused for before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tenp_dist.budget.sizes import Shape
from tenp_dist.calibration.items import build_items, read_items
from tenp_dist.checkpoint.source import Source
from tenp_dist.config import Job
from tenp_dist.errors import BudgetError, CalibrationError, JobError
from tenp_dist.layouts.table import layouts_of
from tenp_dist.scoring.methods import registry


def check_search(job: Job, source: Source, shapes: Sequence[Shape]) -> None:
    """Refuse what a search could not do, or what nothing could be written of.

    Raises:
        JobError: a mapped router where a checkpoint is asked for, or more groups than layers.
        BudgetError: tokens cannot go to so many experts.
        CalibrationError: items of another form, too long, or too few.
    """
    if not registry.of_budget(job.budget).searched:
        return
    asked, facts = job.search, source.facts
    if asked.router == "mapped" and layouts_of(job):
        raise JobError(
            "A router that mixes the scores of the source's experts has no checkpoint that stock engines load",
            where="search.router",
            found=f"mapped, and output.layouts {', '.join(layout.name for layout in layouts_of(job))}",
            wanted="selection, for which a router is rows of the source's; or no layout",
            next_step="set search.router to selection, or output.layouts to [] and measure RUN/plan.json with "
            "`tenp-dist evaluate JOB.yaml --plans`",
        )
    if asked.depth_groups is not None and asked.depth_groups > len(facts.moe_layers):
        raise JobError(
            "More depth groups than layers with experts",
            where="search.depth_groups",
            found=asked.depth_groups,
            wanted=f"at most {len(facts.moe_layers)}",
            next_step="leave it out for a group per layer",
        )
    if asked.items is not None:
        _check_items(job, source, asked.items)
    most = min(facts.top_k, *(min(shape.whole) for shape in shapes))
    if asked.active is not None and max(asked.active) > most:
        raise BudgetError(
            "Tokens cannot go to more experts than in the source, or than stay",
            where="search.active",
            found=max(asked.active),
            wanted=f"at most {most}",
            next_step="give smaller numbers, or leave it out",
        )


def _check_items(job: Job, source: Source, path: Path) -> None:
    items = read_items(path)
    if len(items) < 2:
        raise CalibrationError(
            "Too few items",
            where=path,
            found=len(items),
            wanted="one to measure fitness on and one to decide on, at least",
            next_step="give more items",
        )
    build_items(path, items, source.folder, source.facts.vocab_size, job.calibration.sequence_length)
