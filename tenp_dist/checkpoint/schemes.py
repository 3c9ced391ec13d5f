"""What `quantization_config` of a compressed-tensors checkpoint says of a module: in which form its weight is, if any.

A group of the config has `targets` (names of modules, `re:` patterns matched from the front, or the class `Linear`)
and the form of their weights; `ignore` names modules that stay plain. Source: quantization/quant_args.py and
utils/match.py of https://github.com/vllm-project/compressed-tensors. What is not read has a reason here (`unread`),
which people are shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

METHOD = "compressed-tensors"

BITS = (2, 4, 8)  # numbers of other sizes lie across words, in two ways by the version that packed them

_PLAIN_FORMATS = ("float-quantized", "naive-quantized")

_PACKED_FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored.

    bits: of a number.
    packed: whether they are whole numbers in 32-bit words; float8 otherwise.
    strategy: tensor, channel, group or block: what a factor is for.
    rows, columns: of the part of a matrix that has one factor; None for as many as the matrix has.
    symmetric: whether the numbers lie around zero; each factor has a zero point otherwise.
    """

    bits: int
    packed: bool
    strategy: str
    rows: int | None
    columns: int | None
    symmetric: bool = True

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a factor, where the strategy is block."""
        return self.rows or 1, self.columns or 1

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Factors down and across a matrix of this shape."""
        down, across = (
            1 if of is None else math.ceil(n / of) for n, of in zip(shape, (self.rows, self.columns), strict=True)
        )
        return down, across


@dataclass(frozen=True)
class Schemes:
    """Of a checkpoint. groups: targets, and the form of what they match. ignore: what stays plain."""

    groups: Sequence[tuple[Sequence[str], Scheme]]
    ignore: Sequence[str]

    def of(self, module: str) -> Scheme | None:
        """The form of a module's weight, None where the config says that it is plain: a name goes before a pattern."""
        if self.ignored_by(module) is not None:
            return None
        tests: tuple[Callable[[str], bool], ...] = (
            lambda target: target == module,
            lambda target: _is_pattern(target) and bool(re.match(target.removeprefix("re:"), module)),
            lambda target: not _is_pattern(target) and "." not in target,  # a class
        )
        found = (scheme for test in tests for targets, scheme in self.groups if any(map(test, targets)))
        return next(found, None)

    def ignored_by(self, module: str) -> str | None:
        """The entry of `ignore` that names this module."""
        if module in self._ignored_names:
            return module
        return next((entry for entry, pattern in self._ignored_patterns if pattern.match(module)), None)

    @cached_property
    def _ignored_names(self) -> frozenset[str]:
        return frozenset(entry for entry in self.ignore if not _is_pattern(entry))

    @cached_property
    def _ignored_patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(entry, re.compile(entry.removeprefix("re:"))) for entry in self.ignore if _is_pattern(entry)]


def stated(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of compressed-tensors, None where it says nothing."""
    value = config.get("quantization_config")
    return value if isinstance(value, dict) and value.get("quant_method") == METHOD else None


def with_factors_read(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a written config.json says of its form, so that transformers reads float8 experts with their factors.

    transformers (5.23) leaves the factors of experts out without a word unless `dequantize` is true; engines do not
    read that key. entry: what the source says.
    """
    value = stated(entry)
    if value is None or all(scheme.packed for _, scheme in read_schemes(value).groups):
        return entry
    return {**entry, "quantization_config": {**value, "dequantize": True}}


def read_schemes(value: Mapping[str, Any]) -> Schemes:
    """The forms that a `quantization_config` states, in which nothing is `unread`."""
    groups = [(group["targets"], _scheme(group["weights"])) for group in value["config_groups"].values()]
    return Schemes(groups, value.get("ignore") or ())


def unread(value: Mapping[str, Any]) -> str | None:
    """Why a `quantization_config` states something that is not read; None where all of it is."""
    groups = value.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "no config_groups"
    sparse = value.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense":
        return f"sparse weights ({sparse['format']})"
    if value.get("transform_config"):
        return "rotated weights (transform_config)"
    if value.get("kv_cache_scheme"):
        return "a quantised cache of keys and values (kv_cache_scheme)"
    wrong = [entry for entry in value.get("ignore") or () if not _is_readable(entry)]
    if wrong:
        return f"an entry of `ignore` that is no name and no pattern: {wrong[0]}"
    reasons = (_unread_group(group, value.get("format")) for group in groups.values())
    return next((reason for reason in reasons if reason), None)


def _unread_group(group: object, form: object) -> str | None:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return "a group without a form of weights"
    weights, form = group["weights"], group.get("format") or form
    targets = group.get("targets") or ()
    if not targets or not all(map(_is_readable, targets)):
        return f"targets {targets}"
    bits, kind, symmetric = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("symmetric", True)
    strategy, block, size = _strategy(weights), _block(weights), weights.get("group_size")
    if form in _PLAIN_FORMATS:
        known = kind == "float" and bits == 8 and symmetric
        known = known and (strategy in ("tensor", "channel") or (strategy == "block" and block is not None))
        return None if known else f"format {form} of {bits}-bit {kind} numbers by {strategy}"
    if form != _PACKED_FORMAT:
        return f"format {form}"
    if weights.get("actorder") not in (None, False, "weight", "static"):
        return f"columns in an order of their own (actorder {weights['actorder']})"
    known = kind == "int" and bits in BITS
    known = known and (strategy == "channel" or (strategy == "group" and type(size) is int and size > 0))
    return None if known else f"{bits}-bit {kind} numbers by {strategy}"


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    bits, strategy = weights.get("num_bits", 8), _strategy(weights)
    block = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, weights.get("group_size")),
        "block": _block(weights),
    }
    rows, columns = block[strategy] or (None, None)
    return Scheme(bits, weights.get("type", "int") == "int", strategy, rows, columns, weights.get("symmetric", True))


def _strategy(weights: Mapping[str, Any]) -> str:
    """As compressed-tensors fills it in where it is not stated."""
    size = weights.get("group_size")
    given = {None: "tensor", -1: "channel"}.get(size, "group")
    return str(weights.get("strategy") or given)


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block: `[128, 128]`, or `128x128` in older files."""
    value = weights.get("block_structure")
    sizes = value.split("x") if isinstance(value, str) else value
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or not all(str(size).isdigit() and int(size) > 0 for size in sizes)
    ):
        return None
    return int(sizes[0]), int(sizes[1])


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:")


def _is_readable(entry: object) -> bool:
    """A name, or a pattern that can be compiled."""
    if not isinstance(entry, str):
        return False
    try:
        re.compile(entry.removeprefix("re:") if _is_pattern(entry) else "")
    except re.error:
        return False
    return True
