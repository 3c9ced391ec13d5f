"""Check that a written checkpoint is stored in the form that the job asks for, every tensor, and its config says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify_uniform import Names
from tenp_dist.errors import VerifyError


def check_stored_as(source: Source, written: CheckpointIndex, names: Mapping[str, str], dtype: str) -> None:
    """Every tensor is stored as the job says, and config.json says how that is.

    Args:
        names: written name -> source name.
        dtype: `source`, `bfloat16`, or the name of a format that experts of a plain source are encoded in.

    Raises:
        VerifyError: names the first tensor that is not.
    """
    stored = {name for name, entry in source.index.tensors.items() if entry.stored}
    encode = dtype not in ("source", "bfloat16") and not stored
    experts = Names(source.family, source.facts.num_layers)
    for name, origin in names.items():
        wanted = (experts.expert(origin) is not None) if encode else origin in stored and dtype != "bfloat16"
        if wanted != (written.entry(name).stored is not None):
            raise _unequal(f"{written.folder}: {name}", written.entry(name).dtype, f"output.dtype {dtype}")
    stated = dict(written.stored_as)
    wanted_entry = _decoded(_moved(dict(source.index.stored_as), source, names)) if dtype != "bfloat16" else {}
    if not encode and stated != wanted_entry:
        raise _unequal(f"{written.folder / 'config.json'}", stated, "the source's quantization_config, or none")
    if encode:
        _check_plain_modules(written)


def _decoded(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with `dequantize`, where there are float8 numbers of compressed-tensors: see `with_factors_read`."""
    value = entry.get("quantization_config", {})
    groups = value.get("config_groups", {}).values() if value.get("quant_method") == "compressed-tensors" else ()
    if not any(group["weights"].get("type") == "float" for group in groups):
        return entry
    return {**entry, "quantization_config": {**value, "dequantize": True}}


def _moved(value: Any, source: Source, names: Mapping[str, str]) -> Any:
    """What the source says of its form, with modules under their written names, those that left left out."""
    if isinstance(value, Mapping):
        return {key: _moved(inner, source, names) for key, inner in value.items()}
    if not isinstance(value, list) or all(name == origin for name, origin in names.items()):
        return value
    return [new for item in value if (new := _module_now(item, source, names)) is not None]


def _module_now(item: Any, source: Source, names: Mapping[str, str]) -> Any:
    """A module's written name, None where all its tensors left; what is no module of the source's as it is."""
    inside = f"{item}."
    found = next(((name, origin) for name, origin in names.items() if origin.startswith(inside)), None)
    if found is not None:
        return found[0].removesuffix(found[1].removeprefix(str(item)))
    return None if any(name.startswith(inside) for name in source.index.tensors) else item


def _check_plain_modules(written: CheckpointIndex) -> None:
    """config.json names those matrices that stayed plain, and no other."""
    told = set(written.stored_as["quantization_config"]["modules_to_not_convert"])
    for name, entry in written.tensors.items():
        matrix, plain = name.endswith(".weight") and len(entry.shape) == 2, entry.stored is None
        if matrix and (name.removesuffix(".weight") in told) != plain:
            where = f"{written.folder / 'config.json'}: modules_to_not_convert"
            raise _unequal(where, name, "the matrices that are plain")


def _unequal(where: str, found: object, wanted: object) -> VerifyError:
    return VerifyError(
        "A tensor is stored in another form than the job says",
        where=where,
        found=found,
        wanted=wanted,
        next_step="write again with --overwrite; if it stays, report it with this message",
    )
