"""What was found about layers: `layers/greedy.json`, and the same as statistics of a layer, beside those of scoring.

| statistic     | of a layer                                                                                     |
|---------------|------------------------------------------------------------------------------------------------|
| `greedy_step` | at which step of the greedy order it leaves, one more than there are for those that stay        |
| `alone_loss`  | loss of the model without this layer alone; of layers that may not leave as large as any        |
| `trsp_step`   | after which round of TRSP's learning it leaves, one more than there were for those that stay    |
| `trsp_weight` | magnitude of the weight that the first round gave it                                            |

The last two are of `layers/trsp.json`. All are float64 [1], of all domains together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tenp_dist.artifacts import SCHEMA_VERSION, read_json, write_json
from tenp_dist.depth.learn import Learning
from tenp_dist.depth.order import Step
from tenp_dist.errors import StaleError
from tenp_dist.run_files import greedy_file, learning_file
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
    values = _greedy_values(read_steps(folder), layer) | _learnt_values(read_learning(folder), layer)
    if not set(wanted) <= set(values):
        raise StaleError(
            "It was not measured yet which layers leave",
            where=folder,
            wanted=", ".join(wanted),
            next_step="run `tenp-dist layers`",
        )
    found = {name: torch.tensor([values[name]], dtype=torch.float64) for name in wanted}
    return replace(statistics, tensors={**statistics.tensors, **found})


def write_learning(folder: Path, key: str, state: Learning) -> Path:
    """Store where learning is. key: of the stage."""
    path = learning_file(folder)
    write_json(path, {"schema_version": SCHEMA_VERSION, "key": key, **state.plain()})
    return path


def read_learning(folder: Path, key: str | None = None) -> Learning | None:
    """Where learning is; None where nothing is stored, or something else than `key` names."""
    path = learning_file(folder)
    document = read_json(path) if path.is_file() else {}
    return Learning.from_plain(document) if document and key in (None, document["key"]) else None


def _learnt_values(state: Learning | None, layer: int) -> dict[str, float]:
    if state is None or not state.rounds:
        return {}
    step = state.gone.index(layer) + 1 if layer in state.gone else len(state.gone) + 1
    first = {other: abs(weight) for other, weight in state.rounds[0].weights.items()}
    return {"trsp_step": float(step), "trsp_weight": first.get(layer, max(first.values()))}


def _greedy_values(steps: Sequence[Step], layer: int) -> dict[str, float]:
    if not steps:
        return {}
    order, first = [step.removed for step in steps], steps[0].tried
    step = order.index(layer) + 1 if layer in order else len(order) + 1
    return {"greedy_step": float(step), "alone_loss": first.get(layer, max(first.values()))}
