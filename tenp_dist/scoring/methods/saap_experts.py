"""SAAP with whole experts as structures: those of lowest fused importance leave. What is ours: see `saap.py`."""

from __future__ import annotations

from tenp_dist.scoring.methods.registry import Method
from tenp_dist.scoring.methods.saap import expert_importance, read_of

METHOD = Method(
    name="saap-experts",
    source="SAAP, arXiv 2412.15127, on whole experts; as many leave in every layer, which is ours",
    experts=expert_importance,
    expert_statistics=read_of("expert"),
)
