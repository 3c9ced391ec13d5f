"""The rows of a source, in a seeded order that is drawn from the whole of it: files, folders or `datasets` names.

A file of more rows than are shuffled in memory is read once for every 10,000 of its rows, drawn without replacement,
until its reader has enough; a named dataset, which cannot be counted, is shuffled in a window of 10,000 rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tenp_dist.config import Source, Text
from tenp_dist.errors import CalibrationError, one_line

_BUILDERS: Mapping[str, Mapping[str, Any]] = {
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
    ".parquet": {"path": "parquet"},
    ".arrow": {"path": "arrow"},
    ".csv": {"path": "csv"},
    ".txt": {"path": "text", "sample_by": "paragraph"},
}
_PACKED = (".gz", ".bz2", ".xz")  # of text files; `datasets` opens them
_IN_MEMORY = 10_000  # rows
_NUMBER = "__row__"
_WHOLE = "train"  # the split that a file is, and the default


class Row(NamedTuple):
    """number: of the row in its source, counted from 0. values: column -> value."""

    number: int
    values: Mapping[str, Any]


def check_sources(text: Text) -> None:
    """Raise CalibrationError where a file that a source names is not there or of no known kind."""
    for source in text.sources:
        if source.path is not None:
            _check_parts(source, _builder(source.path))


def _check_parts(source: Source, builder: Mapping[str, Any] | None) -> None:
    """Refuse the part of a source that says nothing of what it names; it would be ignored."""
    ignored = "subset" if source.subset else "split" if builder and source.split != _WHOLE else None
    if ignored:
        raise CalibrationError(
            f"A {'file' if builder else 'saved folder'} has no {ignored}",
            where=f"{label_of(source)} (domain {source.domain})",
            found=f"{ignored}: {getattr(source, ignored)}",
            wanted="`subset` and `split` for a dataset by `name`, `split` for a folder with several",
            next_step=f"take `{ignored}` out of the source; `samples` says how much of it is taken",
        )


def rows_of(source: Source, seed: int) -> Iterator[Row]:
    """All rows of a source, each once. Raises CalibrationError where it cannot be read."""
    with _readable(source):
        count = _count(source)
        numbered = _numbered(source)
    if count is None or count <= _IN_MEMORY:
        yield from _shuffled(source, numbered, seed)
        return
    drawn = np.random.default_rng(seed).permutation(count)
    for start in range(0, count, _IN_MEMORY):
        chosen = frozenset(drawn[start : start + _IN_MEMORY].tolist())
        yield from _shuffled(source, _numbered(source).filter(partial(_is_among, chosen)), seed)


def _is_among(chosen: frozenset[int], row: Mapping[str, Any]) -> bool:
    return row[_NUMBER] in chosen


def _shuffled(source: Source, dataset: Any, seed: int) -> Iterator[Row]:
    with _readable(source):
        records = iter(dataset.shuffle(seed=seed, buffer_size=_IN_MEMORY))
    while True:
        with _readable(source):
            record = next(records, None)
        if record is None:
            return
        yield Row(record.pop(_NUMBER), record)


def _numbered(source: Source) -> Any:
    return _load(source).map(lambda row, number: {_NUMBER: number}, with_indices=True)


def _count(source: Source) -> int | None:
    """Rows of a file or folder, None for a named dataset: the whole of that may be elsewhere."""
    if source.path is None:
        return None
    return sum(len(table) for table in _load(source).with_format("arrow").iter(batch_size=_IN_MEMORY))


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turn what `datasets` and the readers below it raise into a CalibrationError."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    others = (DatasetsError, ArrowException, RuntimeError, ImportError)
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, *others) as error:
        cause = error.__cause__ or error
        raise (_cache_error(source, cause) or _source_error(source, cause)) from error


def _cache_error(source: Source, cause: BaseException) -> CalibrationError | None:
    """Where `datasets` cannot make its own folders, which the source has no part in."""
    folder = cause.filename if isinstance(cause, OSError) else None
    if folder is None or (source.path and Path(str(folder)).is_relative_to(source.path)):
        return None
    return CalibrationError(
        "The folder of caches cannot be used",
        where=folder,
        found=f"{type(cause).__name__}: {one_line(cause)}",
        wanted="a folder that can be written to",
        next_step=f"make {folder} writable, or set HF_HOME to a folder that is",
    )


def _source_error(source: Source, cause: BaseException) -> CalibrationError:
    return CalibrationError(
        "Source cannot be read",
        where=f"{label_of(source)} (domain {source.domain})",
        found=f"{type(cause).__name__}: {one_line(cause)}",
        wanted="jsonl with one object a line, json, parquet, arrow, csv, txt, or a dataset that exists",
        next_step="correct the file" if source.path else "correct `name`, `subset` and `split`",
    )


def _load(source: Source) -> Any:
    """A streaming `datasets` dataset: nothing is copied into a cache."""
    import datasets

    datasets.disable_progress_bars()
    if source.path is None:
        return datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
    builder = _builder(source.path)
    if builder is not None:
        return datasets.load_dataset(**builder, data_files=str(source.path), split="train", streaming=True)
    saved = datasets.load_from_disk(str(source.path))
    if isinstance(saved, datasets.DatasetDict):
        saved = _split(source, saved)
    return saved.to_iterable_dataset()


def _split(source: Source, splits: Mapping[str, Any]) -> Any:
    if source.split not in splits:
        raise CalibrationError(
            "Folder has no such split",
            where=source.path,
            found=", ".join(splits),
            wanted=source.split,
            next_step="set `split` to one of them",
        )
    return splits[source.split]


def _builder(path: Path) -> Mapping[str, Any] | None:
    """What makes `datasets` read a file, None for a folder saved by `datasets`."""
    if not path.exists():
        raise CalibrationError(
            "Calibration source not found",
            where=path,
            wanted="a file or a folder",
            next_step="give one source for each file: patterns are not expanded"
            if "*" in str(path)
            else "correct `path`",
        )
    if path.is_dir():
        _check_saved(path)
        return None
    if path.stat().st_size == 0:
        raise CalibrationError(
            "Calibration file is empty", where=path, found="0 bytes", wanted="text", next_step="give another file"
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _PACKED else (suffixes or [""])[-1]
    if kind not in _BUILDERS:
        raise CalibrationError(
            "Unknown kind of calibration file",
            where=path,
            found="".join(suffixes[-2:]) or "no suffix",
            wanted=f"{', '.join(sorted(_BUILDERS))}, or such a file packed as {', '.join(_PACKED)}",
            next_step="convert the file to jsonl",
        )
    return _BUILDERS[kind]


def _check_saved(folder: Path) -> None:
    """Raise CalibrationError where a folder was not saved by `datasets`."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return
    files = sorted(path.name for path in folder.iterdir())
    raise CalibrationError(
        "Folder is no saved dataset",
        where=folder,
        found=", ".join(files[:5]) or "nothing",
        wanted="what save_to_disk of `datasets` writes: state.json or dataset_dict.json",
        next_step="give one source for each file in it",
    )


def label_of(source: Source) -> str:
    """What to call a source in a message."""
    return str(source.path or source.name)
