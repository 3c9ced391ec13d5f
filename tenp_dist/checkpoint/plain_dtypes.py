"""The dtypes that plain weights and the factors of stored ones have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

PLAIN: Mapping[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""By their names in safetensors."""
