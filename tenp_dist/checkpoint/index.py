"""What a safetensors checkpoint holds, read from config, index and headers only.

Opening an index proves that every named tensor lies complete in a file inside the folder; no
tensor data is read. The fingerprint covers config, index, all headers and file sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tenp_dist.checkpoint.entries import TensorEntry, parse_entry
from tenp_dist.checkpoint.families.table import row_of, stock_config
from tenp_dist.checkpoint.formats.table import format_of
from tenp_dist.checkpoint.fused import Fused, apart
from tenp_dist.checkpoint.headers import Beginning, read_header, unreadable
from tenp_dist.checkpoint.stated_once import stated_once
from tenp_dist.errors import SourceError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class CheckpointIndex:
    """An opened checkpoint. One in a stored format is seen as the plain one that it stands for (`formats/`).

    folder: where it lies.
    config: config.json, under its family's own model_type.
    tensors: name -> entry, in the order in which they lie in the files.
    files: file name -> size in bytes.
    fingerprint: digest of config, index, headers and file sizes.
    stored_as: what config.json says of its stored format, which `config` leaves out.
    fused: name -> tensor of the files that holds a layer's experts; `tensors` has a part of every expert instead.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, int]
    fingerprint: str
    stored_as: Mapping[str, Any] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise SourceError(
                "Checkpoint lacks a tensor that its config calls for",
                where=self.folder,
                wanted=name,
                next_step="download the checkpoint again, or correct config.json",
            )
        return self.tensors[name]


def open_index(folder: Path, beginning: Beginning | None = None) -> CheckpointIndex:
    """Read config, index and headers of a checkpoint.

    beginning: gives the headers of files that are not in the folder yet; None where they are.

    Raises:
        SourceError: anything missing, truncated, outside the folder or contradictory.
    """
    folder = Path(folder)
    config = read_config(folder)
    weight_map = _weight_map(folder, beginning)
    digest = hashlib.sha256(_canonical(config))
    digest.update(_canonical(weight_map))
    names = sorted(set(weight_map.values()))
    tensors, files = _read_files(folder, names, digest, lambda name, file: weight_map.get(name) == file, beginning)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise SourceError(
            "Index names a tensor that its file does not hold",
            where=folder / weight_map[absent[0]],
            found=f"{len(absent)} absent",
            wanted=absent[0],
            next_step="download the shard and the index again",
        )
    form = format_of(config)
    tensors, fused = apart(folder, row_of(config), config, tensors)
    tensors = form.fold(folder, config, tensors)
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)))
    plain = form.plain_config(config)
    held = any(entry.stored for entry in tensors.values())  # otherwise the entry speaks of tensors that are not there
    stored_as = {key: value for key, value in config.items() if held and key not in plain}
    return CheckpointIndex(folder, plain, ordered, files, digest.hexdigest(), stored_as, fused)


def index_files(folder: Path, files: Sequence[str], skip: Collection[str] = ()) -> CheckpointIndex:
    """The tensors of safetensors files that have neither config nor index, but those named in `skip`.

    Raises:
        SourceError: a file is missing, truncated or contradictory.
    """
    digest = hashlib.sha256()
    tensors, sizes = _read_files(folder, files, digest, lambda name, file: name not in ("__metadata__", *skip))
    return CheckpointIndex(folder, {}, tensors, sizes, digest.hexdigest())


def _read_files(
    folder: Path,
    files: Sequence[str],
    digest: hashlib._Hash,
    wanted: Callable[[str, str], bool],
    beginning: Beginning | None = None,
) -> tuple[dict[str, TensorEntry], dict[str, int]]:
    """Wanted (name, file) entries and file sizes; headers go into the digest."""
    tensors: dict[str, TensorEntry] = {}
    sizes: dict[str, int] = {}
    for file in files:
        header, data, size = read_header(folder, file, beginning)
        sizes[file] = size
        digest.update(_canonical([file, size, header]))
        tensors.update(
            (name, parse_entry(folder / file, file, name, value, data, size))
            for name, value in header.items()
            if wanted(name, file)
        )
    return tensors, sizes


def read_config(folder: Path) -> dict:
    """config.json under its family's own model_type (`stock_config`), its stored form at the top (`stated_once`).

    Raises:
        SourceError: it cannot be read, or contradicts itself.
    """
    path = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        raise SourceError(
            "Model folder not found",
            where=folder,
            wanted="a folder with config.json and safetensors",
            next_step="set `model` to a checkpoint folder, or to a name on the Hugging Face Hub (`org/name`)",
        )
    if not path.is_file():
        cached = sorted(Path(folder).glob(f"snapshots/*/{CONFIG_NAME}"))
        raise SourceError(
            "Model folder has no config.json",
            where=folder,
            found=f"the cache of a download, {cached[-1].parent.relative_to(folder)} in it" if cached else None,
            wanted=CONFIG_NAME,
            next_step=f"set `model` to {cached[-1].parent}"
            if cached
            else "download it, or give the folder of a finished checkpoint",
        )
    return stated_once(stock_config(_load_json(path)), str(path))


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that the index tells of, by which they can be asked for before they are there.

    Raises:
        SourceError: as `open_index`, of the index alone.
    """
    return sorted(set(_weight_map(folder, None).values())) if (folder / INDEX_NAME).is_file() else [SINGLE_NAME]


def _weight_map(folder: Path, beginning: Beginning | None) -> dict[str, str]:
    if (folder / INDEX_NAME).is_file():
        weight_map = _load_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(
                "Index holds no weight_map",
                where=folder / INDEX_NAME,
                wanted="weight_map: tensor name -> file name",
                next_step="download the index again",
            )
        _check_inside(folder, weight_map.values())
        return weight_map
    if beginning is not None or (folder / SINGLE_NAME).is_file():
        header, _, _ = read_header(folder, SINGLE_NAME, beginning)
        return {name: SINGLE_NAME for name in header if name != "__metadata__"}
    raise _no_safetensors(folder)


def _no_safetensors(folder: Path) -> SourceError:
    """By what lies there instead."""
    causes = (
        (("*.safetensors",), f"download {INDEX_NAME} too; a single file may be renamed to {SINGLE_NAME}"),
        (("*/*.safetensors",), "set `model` to the folder that holds the files"),
        (("*.bin", "*.pt", "*.pth"), "convert pickled weights to safetensors (only safetensors is read)"),
        (("*.gguf",), "GGUF is not read: give the checkpoint that it was made from, and convert the pruned one"),
    )
    found = ((sorted(path for pattern in patterns for path in folder.glob(pattern)), step) for patterns, step in causes)
    paths, step = next((pair for pair in found if pair[0]), ([], "download the weights"))
    names = ", ".join(str(path.relative_to(folder)) for path in paths[:3])
    return SourceError(
        "No safetensors checkpoint in the model folder",
        where=folder,
        found=f"{names}, ..." if len(paths) > 3 else names or "no weights",
        wanted=f"{INDEX_NAME} or {SINGLE_NAME}",
        next_step=step,
    )


def _check_inside(folder: Path, files: Iterable[str]) -> None:
    for file in files:
        path = PurePosixPath(str(file))
        if not isinstance(file, str) or path.is_absolute() or ".." in path.parts or "\\" in file:
            raise SourceError(
                "Index points outside the model folder",
                where=folder / INDEX_NAME,
                found=file,
                wanted="a file name inside the folder",
                next_step="do not use this checkpoint, or download its index again",
            )


def _load_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise SourceError("Not valid JSON", where=path, found=error, next_step="download the file again") from error
    if not isinstance(value, dict):
        raise SourceError(
            "Not a JSON mapping",
            where=path,
            found=type(value).__name__,
            wanted="a mapping",
            next_step="download the file again",
        )
    return value


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
