"""Random damage to documents and files: what a hand, a download or another tool may have done to them."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD = st.sampled_from(
    [
        None, True, False, 0, 1, 2, 3, 5, 7, -1, 10**6, 10**12, 2**70, 0.5, 1e-30, -2.5, 1e400, "", "x", "0", "auto",
        "é\u0000", "${NOT_SET}", "/", "..", [], {}, [1, 2], [None], ["x"], {"x": 1}, {"x": {}}, [[[]]],
    ]
)  # fmt: skip
"""Values of every type that JSON and YAML have."""


def paths(value: Any, at: tuple = ()) -> list[tuple]:
    """Where every value inside a document lies, the document itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*at, key), *paths(inner, (*at, key)))]


def _holder(document: Any, path: tuple) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


@st.composite
def changed(draw: Callable, document: Any, longest: int = 60) -> Any:
    """A copy of a document with one of its values lost, replaced, changed a little, renamed or put elsewhere.

    longest: of lists and mappings with more values than this, only the first ones are touched.
    """
    document = copy.deepcopy(document)
    where = [path for path in paths(document) if not any(isinstance(key, int) and key > longest for key in path)]
    path = draw(st.sampled_from(where))
    holder, key = _holder(document, path), path[-1]
    value = holder[key]
    kinds = ["lost", "odd", "wrapped", "other"] + ["renamed"] * isinstance(holder, dict)
    kinds += ["near"] * (2 if isinstance(value, int | float | str) and value is not True else 0)
    kind = draw(st.sampled_from(kinds))
    if kind == "lost":
        del holder[key]
    elif kind == "renamed":
        holder[draw(st.sampled_from([f"{key}_", str(key).upper(), ""]))] = holder.pop(key)
    elif kind == "other":
        holder[key] = copy.deepcopy(_value(document, draw(st.sampled_from(where))))
    else:
        holder[key] = draw(
            {"odd": ODD, "wrapped": st.sampled_from([[value], {"x": value}]), "near": _near(value)}[kind]
        )
    return document


def _value(document: Any, path: tuple) -> Any:
    return _holder(document, path)[path[-1]]


def _near(value: Any) -> st.SearchStrategy:
    if isinstance(value, str):
        return st.sampled_from([value[:-1], f"{value} ", value.upper(), value * 2, f"../{value}"])
    if isinstance(value, int | float):
        return st.sampled_from([value + 1, value - 1, value * 2, -value, value // 2, str(value), float(value)])
    return st.just(value)


@st.composite
def spoiled_bytes(draw: Callable, data: bytes) -> bytes:
    """The content of a file, cut, with a byte changed, empty, twice, in another encoding, or with bytes before it."""
    at = draw(st.integers(0, max(0, min(len(data) - 1, 4000))))
    flipped = data[:at] + bytes([data[at] ^ draw(st.sampled_from([1, 0x20, 0x80, 0xFF]))]) + data[at + 1 :]
    others = [
        data[:at],
        flipped,
        b"",
        data * 2,
        b"\xef\xbb\xbf" + data,
        b"\x00" * len(data),
        b"null",
        b"[]",
        b"\xff\xfe",
    ]
    with contextlib.suppress(UnicodeDecodeError):
        others.append(data.decode().encode("utf-16"))
    return draw(st.sampled_from(others))


@st.composite
def damaged_json(draw: Callable, path: Path) -> bytes:
    """The bytes of a JSON file, changed as a document or as bytes."""
    if draw(st.integers(0, 5)) == 0:
        return draw(spoiled_bytes(path.read_bytes()))
    return json.dumps(draw(changed(json.loads(path.read_text(encoding="utf-8"))))).encode()


@st.composite
def damaged_shard(draw: Callable, path: Path) -> bytes:
    """The bytes of a safetensors file with another header, or changed as bytes."""
    data = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return draw(spoiled_bytes(data))
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(draw(changed(json.loads(data[8 : 8 + length])))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
