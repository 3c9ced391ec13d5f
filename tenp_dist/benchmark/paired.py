"""Two columns of a benchmark side by side, and what changed on the same items.

Both models answer the same items, so the mean of the differences is known better than the difference of two means: its
standard error is that of n numbers d_i, `sqrt(sum (d_i - mean d)^2 / (n - 1) / n)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SAME = 1e-6  # how near a metric has to be to the mean of its items to count as that mean
Items = Mapping[str, float]


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and its standard error; no error for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"value": mean, "stderr": None}
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {"value": mean, "stderr": math.sqrt(squares / (len(values) - 1) / len(values))}


def paired(source: Items, pruned: Items) -> dict[str, float | None] | None:
    """Mean of pruned - source over the items that both have, and its standard error; None without any."""
    both = [item for item in source if item in pruned]
    return mean_and_error([pruned[item] - source[item] for item in both]) if both else None


def compared(source: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every metric of every task that both columns have.

    Returns:
        rows of task, metric, items, source and pruned (value, stderr), difference (value, stderr; None where the metric
        is no mean over items) and answer_tokens (the same three, None where nothing is generated).
    """
    rows = []
    for task, one in source["tasks"].items():
        other = pruned["tasks"].get(task, {"metrics": {}})
        tokens = _answer_tokens(one, other)
        rows += [
            {
                "task": task,
                "metric": metric.removesuffix(",none").replace(",", ", "),
                "items": one["items"],
                "source": one["metrics"][metric],
                "pruned": other["metrics"][metric],
                "difference": _difference(one, other, metric),
                "answer_tokens": tokens,
            }
            for metric in one["metrics"]
            if metric in other["metrics"]
        ]
    return rows


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> dict[str, float | None] | None:
    columns = [column["samples"].get(metric, {}) for column in (one, other)]
    if not all(_is_mean(column, items, metric) for column, items in zip((one, other), columns, strict=True)):
        return None
    return paired(*columns)


def _is_mean(column: Mapping[str, Any], items: Items, metric: str) -> bool:
    value = column["metrics"][metric]["value"]
    return bool(items) and value is not None and abs(mean_and_error(list(items.values()))["value"] - value) <= _SAME


def _answer_tokens(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    lengths = [column.get("answer_tokens", {}) for column in (one, other)]
    if not all(lengths):
        return None
    source, pruned = (mean_and_error(list(items.values())) for items in lengths)
    return {"source": source, "pruned": pruned, "difference": paired(*lengths)}
