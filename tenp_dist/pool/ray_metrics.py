"""Figures of a run as gauges of Ray's, which Prometheus collects from the driver's node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Gauges:
    """Gauges `ray_tenp_<name>`, made when a figure is first published."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def publish(self, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """figures: name -> value. tags: name -> value, the same names every time for a figure."""
        from ray.util.metrics import Gauge

        for name, value in figures.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"tenp_{name}", tag_keys=tuple(tags))
            self._gauges[name].set(value, dict(tags))
