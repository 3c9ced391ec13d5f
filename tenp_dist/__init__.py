"""Distributed pruning of Mixture-of-Experts language models by narrowing their experts.

Importing this package is enough to load a `ragged` checkpoint with the Auto classes of
`transformers`, whichever of the two is imported first. It stays cheap: neither torch nor
transformers is imported here, the families are registered when transformers loads its Auto modules.

`run_job` runs a job from Python.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from tenp_dist.stages.run_job import run_job

__all__ = ["run_job"]

__version__ = "0.1.0"


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_configs(module: ModuleType) -> None:
    from tenp_dist.runtime.auto_classes import register_configs

    register_configs(module)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_models(module: ModuleType) -> None:
    from tenp_dist.runtime.auto_classes import register_models

    register_models(module)


def __getattr__(name: str) -> object:
    """`run_job`, imported when it is asked for: it needs torch."""
    if name == "run_job":
        from tenp_dist.stages.run_job import run_job

        return run_job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
