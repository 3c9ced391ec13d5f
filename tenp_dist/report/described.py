"""The job as a report shows it: what was asked for, in JSON types, without folders of the machine that asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def described_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, without folders of the machine that asked."""
    return {
        "calibration": _text(job.get("calibration")),
        "evaluation": _text(job.get("evaluation")),
        "score": plain(job.get("score")),
        "budget": plain(job.get("budget")),
        "output": plain(job.get("output")),
    }


def _text(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if part is None:
        return None
    sources = [
        {
            "domain": source.get("domain"),
            "origin": _origin(source),
            "samples": source.get("samples"),
            "weight": None if source.get("weight") is None else str(source["weight"]),
        }
        for source in part.get("sources") or []
    ]
    return {"sources": sources, **{key: part.get(key) for key in ("sequence_length", "packing", "seed")}}


def _origin(source: Mapping[str, Any]) -> str:
    if source.get("path"):
        return PurePath(str(source["path"])).name
    return " / ".join(str(source[key]) for key in ("name", "subset", "split") if source.get(key))


def plain(value: Any) -> Any:
    """JSON types only; an absolute path becomes its last part, anything else its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return PurePath(str(value)).name if PurePath(str(value)).is_absolute() else str(value)


def is_auto(job: Mapping[str, Any]) -> bool:
    """Whether something was chosen by measuring plans."""
    keys = {"budget": ("method", "important", "slope"), "output": ("compensate",)}
    return any((job.get(part) or {}).get(key) == "auto" for part, names in keys.items() for key in names)


def domain_weights(job: Mapping[str, Any]) -> dict[str, float]:
    """Domain -> the weight of its first source, as in plans."""
    sources = (job.get("calibration") or {}).get("sources") or []
    return {source["domain"]: float(source.get("weight", 1)) for source in reversed(sources)}
