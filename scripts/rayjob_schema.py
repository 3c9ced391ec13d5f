"""The schema of a RayJob, v1, from KubeRay's own definition: without `status`, equal parts said once.

    python scripts/rayjob_schema.py ray.io_rayjobs.yaml COMMIT > tests/helpers/kuberay/rayjob-v1.json

The definition lies in KubeRay's repository as helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

_WORTH = 120  # characters from which a part that occurs again is said once


def main(path: str, commit: str) -> None:
    with open(path, encoding="utf-8") as stream:
        versions = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = (one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")
    schema["properties"].pop("status")
    origin = (
        "The RayJob schema of KubeRay (https://github.com/ray-project/kuberay, Apache License 2.0), commit "
        f"{commit}, helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml. Changed by scripts/rayjob_schema.py: version "
        "v1 alone, without status, equal parts moved to $defs."
    )
    json.dump({"$comment": origin, **_said_once(schema)}, sys.stdout, separators=(",", ":"))
    print()


def _said_once(schema: dict[str, Any]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}

    def count(schema: dict[str, Any]) -> None:
        counts[_text(schema)] += len(_text(schema)) > _WORTH
        for inner in _inside(schema):
            count(inner)

    def shrink(schema: dict[str, Any]) -> dict[str, Any]:
        text = _text(schema)
        if counts[text] < 2:
            return _with_inner(schema, shrink)
        if text not in names:
            names[text] = f"p{len(names)}"
            parts[names[text]] = _with_inner(schema, shrink)
        return {"$ref": f"#/$defs/{names[text]}"}

    count(schema)
    return {**shrink(schema), "$defs": parts}


def _inside(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of an object's properties, of other keys' values and of a list's items."""
    others = [schema[key] for key in ("additionalProperties", "items") if isinstance(schema.get(key), dict)]
    return [*schema.get("properties", {}).values(), *others]


def _with_inner(schema: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    changed = {
        key: change(schema[key]) for key in ("additionalProperties", "items") if isinstance(schema.get(key), dict)
    }
    if "properties" in schema:
        changed["properties"] = {name: change(inner) for name, inner in schema["properties"].items()}
    return {**schema, **changed}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
