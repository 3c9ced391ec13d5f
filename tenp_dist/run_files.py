"""The name of every file in a run directory, once."""

from __future__ import annotations


def layer_name(layer: int) -> str:
    """The name of a decoder layer in files and tensor names: `layer_00003`."""
    return f"layer_{layer:05d}"


def layer_of_name(name: str) -> int:
    """3 of `layer_00003.kept`, and of a file named so."""
    return int(name.split("_")[1].split(".")[0])
