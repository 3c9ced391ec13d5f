"""What a joint compensation did, for people: `compensation.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION
from tenp_dist.checkpoint.compensated import read_said, read_table
from tenp_dist.checkpoint.kept import KeptNeurons, read_kept
from tenp_dist.compensation.joint_features import SHARED
from tenp_dist.compensation.moments import ENOUGH

FEW = 0.1  # share of solved experts with few tokens above which there is a warning


def joint_outcome(plan: Path, files: Mapping[int, Sequence[Path]], ridge: float, joint_ridge: float) -> dict[str, Any]:
    """What was done to every layer of a plan. plan: its kept neurons. files: layer -> its file of every rank.

    `before`, `apart` and `after`: the error of the layer's MoE block on the calibration tokens, as a share of the
    energy of what it gives: with the source's columns, solved expert by expert, and solved together. `damped`: experts
    with few tokens; `left_alone`: with none. `layer_damping`: by what all of a layer are damped for want of tokens.
    `shared`: whether the shared expert was solved too.
    """
    kept = read_kept(plan)
    layers = {str(layer): _layer(kept[layer], paths, joint_ridge) for layer, paths in files.items()}
    solved = [one for one in layers.values() if one["compensated"]]
    totals: dict[str, Any] = {"compensated": sum(one["compensated"] for one in layers.values())}
    totals |= {name: sum(len(one[name]) for one in layers.values()) for name in ("damped", "left_alone")}
    totals |= {name: sum(one[name] for one in solved) / max(1, len(solved)) for name in ("before", "apart", "after")}
    totals["shared"] = sum(one["shared"] for one in layers.values())
    about = {"schema_version": SCHEMA_VERSION, "form": "joint", "ridge": ridge, "joint_ridge": joint_ridge}
    return about | totals | {"warnings": _warnings(totals), "layers": layers}


def _layer(kept: KeptNeurons, paths: Sequence[Path], joint_ridge: float) -> dict[str, Any]:
    tables = [read_table(path) for path in paths]
    damping = {
        block: value
        for table in tables
        for block, value in zip(table["experts"], table["damping"], strict=True)
    }  # fmt: skip
    made = [(table, read_said(path)) for table, path in zip(tables, paths, strict=True) if table["experts"]]
    if not made:
        errors = dict.fromkeys(("before", "apart", "after"), 0.0)
        return {"compensated": 0, **errors, "damped": [], "left_alone": [], "shared": False}
    table, said = made[0]
    experts, least = sorted(set(damping) - {SHARED}), joint_ridge * said.get("layer_damping", 1.0)
    return {
        "compensated": len(experts),
        "before": table["before"][0],
        "after": table["after"][0],
        **said,
        "damped": [expert for expert in experts if damping[expert] > least * (1 + 1e-9)],
        "left_alone": sorted({e for e in kept.routed.tolist() if kept.widths[e]} - set(experts)),
        "shared": SHARED in damping,
    }


def _warnings(totals: Mapping[str, Any]) -> list[str]:
    experts, few = totals["compensated"] + totals["left_alone"], totals["damped"] + totals["left_alone"]
    if few <= FEW * experts:
        return []
    return [
        f"{few} of {experts} experts saw fewer than {ENOUGH} calibration tokens per kept neuron: "
        "their compensation is damped or left out; calibrate on more text"
    ]
