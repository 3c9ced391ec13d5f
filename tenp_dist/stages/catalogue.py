"""The stages of a run, in their order: a file of this room for every name in `pipeline/names.py`.

inspect -> [fetch ->] calibrate -> score -> [eliminate ->] [gradients ->] [layers ->] [select ->] [search ->] plan ->
[compensate ->] write -> verify -> [evaluate ->] [benchmark ->] report [-> publish]; every arrow is a file.
"""

from __future__ import annotations

import importlib
from functools import partial

from tenp_dist.errors import JobError
from tenp_dist.pipeline.names import STAGE_NAMES
from tenp_dist.pipeline.stage import Stage
from tenp_dist.stages.base import RunStage
from tenp_dist.stages.run import Run


def stage_called(name: str) -> RunStage:
    """What the file of that name defines."""
    return importlib.import_module(f"{__package__}.{name}").STAGE


def stages_of(run: Run) -> list[Stage]:
    """The stages that the run's job asks for, in order."""
    asked = {name: stage for name in STAGE_NAMES if (stage := stage_called(name)).not_asked(run) is None}
    return [
        Stage(
            name=name,
            title=stage.title,
            needs=tuple(need for need in stage.needs(run) if need in asked),
            fields=partial(stage.fields, run),
            run=partial(stage.run, run),
            owns=stage.owns,
            remote=stage.remote,
            scratch=stage.scratch,
            there=partial(stage.there, run),
            gist=stage.gist,
        )
        for name, stage in asked.items()
    ]


def why_not_asked(run: Run, name: str) -> JobError | None:
    """Why the run has no such stage, None where it has."""
    return stage_called(name).not_asked(run)
