"""No format: every tensor is stored as the numbers that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenp_dist.checkpoint.entries import TensorEntry


class Plain:
    """Tensors as they are."""

    described = "plain numbers"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return True

    def fold(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
    ) -> dict[str, TensorEntry]:
        return dict(tensors)

    def plain_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Without an entry for FP8 that no tensor is in: other engines would look for its factors."""
        stated = config.get("quantization_config")
        absent = isinstance(stated, Mapping) and stated.get("quant_method") == "fp8"
        return {key: value for key, value in config.items() if not (absent and key == "quantization_config")}
