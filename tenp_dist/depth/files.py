"""What was found about layers: `layers/greedy.json`, and the same as statistics of a layer, beside those of scoring.

| statistic     | of a layer                                                                                     |
|---------------|------------------------------------------------------------------------------------------------|
| `greedy_step` | at which step of the greedy order it leaves, one more than there are for those that stay        |
| `alone_loss`  | loss of the model without this layer alone; of layers that may not leave as large as any        |

All are float64 [1], of all domains together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, read_json, write_json
from tenp_dist.depth.order import Step
from tenp_dist.errors import StaleError
from tenp_dist.run_files import greedy_file
from tenp_dist.scoring.statistics import LAYER_CHOICES, LayerStatistics


def write_steps(folder: Path, key: str, steps: Sequence[Step], **more: Any) -> Path:
    """Store the steps so far. key: of the stage; more: what people may want to know besides."""
    path = greedy_file(folder)
    document = {"schema_version": SCHEMA_VERSION, "key": key, **more, "steps": [step.plain() for step in steps]}
    write_json(path, document)
    return path


def read_steps(folder: Path, key: str | None = None) -> list[Step]:
    """The stored steps; none where nothing is stored, or something else than `key` names."""
    path = greedy_file(folder)
    if not path.is_file():
        return []
    document = read_json(path)
    if key is not None and document.get("key") != key:
        return []
    return [Step.from_plain(step) for step in document["steps"]]


def with_choices(statistics: LayerStatistics, folder: Path, layer: int, names: Sequence[str]) -> LayerStatistics:
    """The statistics of a layer with those of `names` that were found about layers.

    Raises:
        StaleError: they were not found yet.
    """
    wanted = [name for name in names if name in LAYER_CHOICES]
    if not wanted:
        return statistics
    steps = read_steps(folder)
    if not steps:
        raise StaleError(
            "It was not measured yet which layers leave",
            where=folder,
            wanted=", ".join(wanted),
            next_step="run `tenp-dist layers`",
        )
    values = _values(steps, layer)
    found = {name: torch.tensor([values[name]], dtype=torch.float64) for name in wanted}
    return replace(statistics, tensors={**statistics.tensors, **found})


def _values(steps: Sequence[Step], layer: int) -> Mapping[str, float]:
    order, first = [step.removed for step in steps], steps[0].tried
    step = order.index(layer) + 1 if layer in order else len(order) + 1
    return {"greedy_step": float(step), "alone_loss": first.get(layer, max(first.values()))}
