"""What comes along of the files that a source has beside its weights: only what is still true of a pruned checkpoint.

A list of what is known to stay true, by meaning. Whatever else lies there stays behind: adapters and quantisation
entries speak of other weights, and loaders take them up unasked.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path

CARRIED: Mapping[str, Sequence[str]] = {
    "tokenizer": (
        "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken",
        "*.model", "*.vocab", "normalizer.json", "spiece*", "sentencepiece*",
    ),
    "chat": ("chat_template*", "additional_chat_templates/*.jinja", "encoding/*.py"),
    "generation": ("generation_config.json",),
    "images and sound": ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "code": ("*.py",),
    "licence": ("licen[sc]e*", "notice*", "copying*", "use_policy*", "third_party*"),
}  # fmt: skip
"""What it is for -> patterns of paths below the source's folder, in small letters."""

_OURS = ("config.json", "readme.md", ".gitattributes")  # written anew, or of no use
_WEIGHTS = ("*.safetensors", "*.index.json")


def side_files(source: Path) -> dict[str, Path]:
    """Name inside the checkpoint -> file of the source that comes along, in the order of names."""
    return {name: path for name, path in _files(source).items() if comes_along(name)}


def comes_along(name: str) -> bool:
    """Whether a file of this name, below the source's folder, is one of these."""
    patterns = [pattern for group in CARRIED.values() for pattern in group]
    return any(_fits(name, pattern) for pattern in patterns) and not any(_fits(name, one) for one in _WEIGHTS)


def left_behind(source: Path) -> list[str]:
    """Names of the files at the top of the source that are neither weights, nor written anew, nor come along."""
    carried = side_files(source)
    others = (name for name in _files(source) if "/" not in name and name not in carried)
    return [name for name in others if name.lower() not in _OURS and not any(_fits(name, one) for one in _WEIGHTS)]


def _files(source: Path) -> dict[str, Path]:
    """Files of the folder and of those right below it, hidden folders left out."""
    found = [path for path in source.iterdir() if path.is_file()]
    found += [
        path
        for folder in source.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
        for path in folder.iterdir()
        if path.is_file()
    ]
    return {path.relative_to(source).as_posix(): path for path in sorted(found)}


def _fits(name: str, pattern: str) -> bool:
    """A pattern without a folder fits files at the top only."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name.lower(), pattern)
