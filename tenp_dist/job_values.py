"""Kinds of values that a job file may hold: sizes, exact fractions, models, protected experts, ways to divide files.

Each is read from what YAML gives and raises ValueError with what to write instead.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainValidator

NONE = "none"  # of `budget.protect`: an empty list

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: object) -> int:
    """`5GB`, `512MiB` or a plain number of bytes -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"not a size: {value!r} (write 5GB, 512MiB or a number of bytes)")
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError("a size must be above zero")
    return size


Size = Annotated[int, BeforeValidator(parse_bytes)]
Exact = Annotated[Decimal, BeforeValidator(lambda value: str(value) if isinstance(value, float) else value)]


def parse_protected(value: object) -> str:
    """`5` for a decoder layer, `5/17` for expert 17 of it. Raises ValueError."""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(/\d+)?", str(value)):
        raise ValueError(f"not a layer or an expert: {value!r} (write 5 for a decoder layer, 5/17 for its expert 17)")
    return "/".join(str(int(part)) for part in str(value).split("/"))


Protected = Annotated[str, BeforeValidator(parse_protected)]
Protection = Annotated[tuple[Protected, ...], BeforeValidator(lambda given: () if given == NONE else given)]


def parse_layout_by(value: object) -> object:
    """`expert-parallel=8` -> the same. Raises ValueError."""
    if value is not None and not re.fullmatch(r"expert-parallel=[1-9]\d*", str(value)):
        raise ValueError(f"not a way to divide files: {value!r} (write expert-parallel=8 for a set of files per rank)")
    return value


LayoutBy = Annotated[str | None, BeforeValidator(parse_layout_by)]


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
_URL = re.compile(r"[a-z][a-z0-9+]*://\S+")


def names_elsewhere(text: str) -> bool:
    """Whether it can be the id of a repository on the Hub, with or without a revision, or the address of a bucket."""
    return bool(_URL.fullmatch(text) or (_HUB_ID.fullmatch(text) and "--" not in text and ".." not in text))


def names_repository(text: str) -> bool:
    """Whether it can be the id of a repository on the Hub, without a revision."""
    return names_elsewhere(text) and not is_address(text) and "@" not in text


def is_address(text: str) -> bool:
    """Whether it is an address such as `s3://bucket/folder`."""
    return bool(_URL.fullmatch(text))


def parse_model(value: object) -> Path | str:
    """A folder, or a name as the job gives it. Raises ValueError."""
    if isinstance(value, Path) or (isinstance(value, str) and value.strip()):
        return value
    raise ValueError("not a model (write a folder, org/name of the Hugging Face Hub, or an address such as s3://...)")


Model = Annotated[Path | str, PlainValidator(parse_model)]
"""A folder (Path, once the job is read), or a name of what lies elsewhere (str)."""
