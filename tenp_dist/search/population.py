"""Individuals and their figures as files, a pair a pass: what a search goes on from.

`pass_0003.safetensors` has the genes, `pass_0003.json` how each came to be and, once the pass is through, what it
measured. Matrices are stored by their entries that are not zero.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenp_dist.artifacts import SCHEMA_VERSION, atomic_write, read_json, write_json
from tenp_dist.errors import StaleError
from tenp_dist.run_files import SearchFiles
from tenp_dist.search.children import Born
from tenp_dist.search.individuals import Genes, Individual
from tenp_dist.search.space import Space

_MATRICES = ("experts_KE", "router_KE")


@dataclass(frozen=True)
class FileStore:
    """The passes of a search in a folder that belongs to one key.

    files: where they are.
    space: what the search may choose from.
    """

    files: SearchFiles
    space: Space

    def claim(self, key: str) -> None:
        """Make the folder that of this key: what another search left in it is removed."""
        owner = self.files.owner
        if not (owner.exists() and read_json(owner).get("key") == key):
            shutil.rmtree(self.files.folder, ignore_errors=True)
            write_json(owner, {"key": key})

    def individuals(self, number: int) -> Sequence[Born] | None:
        path = self.files.individuals(number)
        return read_individuals(path, self.space) if path.exists() else None

    def begin(self, number: int, born: Sequence[Born]) -> None:
        write_individuals(self.files.individuals(number), born)

    def figures(self, number: int) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]] | None:
        return read_figures(self.files.figures(number))

    def end(self, number: int, figures: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> None:
        write_figures(self.files.figures(number), figures, source)


def write_individuals(path: Path, individuals: Sequence[tuple[Individual, Mapping[str, Any]]]) -> None:
    """Store the genes of a pass and how each individual came to be. Raises DiskFullError."""
    from safetensors.numpy import save

    tensors: dict[str, np.ndarray] = {}
    for number, (individual, _) in enumerate(individuals):
        for group, genes in enumerate(individual.genes):
            tensors[_name(number, group, "places")] = genes.places_K.astype(np.int32)
            for matrix in _MATRICES:
                value = getattr(genes, matrix)
                if value is not None:
                    entries = np.flatnonzero(value)
                    tensors[_name(number, group, f"{matrix}.entries")] = entries.astype(np.int64)
                    tensors[_name(number, group, f"{matrix}.values")] = value.reshape(-1)[entries]
    told = [{"active": individual.active, "origin": dict(origin)} for individual, origin in individuals]
    metadata = {"search": json.dumps({"schema_version": SCHEMA_VERSION, "individuals": told})}
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata=metadata))


def read_individuals(path: Path, space: Space) -> list[tuple[Individual, Mapping[str, Any]]]:
    """What `write_individuals` stored.

    Raises:
        StaleError: the file is not what it was.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            told = json.loads((file.metadata() or {})["search"])["individuals"]
            names = set(file.keys())
            return [
                (Individual(tuple(_genes(file, names, n, g, space) for g in range(len(space.groups))), one["active"]),
                 one["origin"])
                for n, one in enumerate(told)
            ]  # fmt: skip
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _genes(file: Any, names: set[str], number: int, group: int, space: Space) -> Genes:
    matrices: dict[str, np.ndarray] = {}
    for matrix in _MATRICES:
        entries = _name(number, group, f"{matrix}.entries")
        if entries in names:
            flat = np.zeros(space.kept * space.experts)
            flat[file.get_tensor(entries)] = file.get_tensor(_name(number, group, f"{matrix}.values"))
            matrices[matrix] = flat.reshape(space.kept, space.experts)
    return Genes(file.get_tensor(_name(number, group, "places")).astype(np.int64), **matrices)


def _name(number: int, group: int, part: str) -> str:
    return f"individual_{number:04d}.group_{group:05d}.{part}"


def write_figures(path: Path, figures: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> None:
    """Store what the individuals of a pass measured, in their order, and the source beside them."""
    write_json(path, {"schema_version": SCHEMA_VERSION, "source": source, "individuals": list(figures)})


def read_figures(path: Path) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]] | None:
    """What `write_figures` stored, None where the pass is not through. Raises StaleError."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
        return found["individuals"], found["source"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StaleError:
    return StaleError(
        "What a search has measured cannot be read",
        where=path,
        found=error,
        wanted="the file as it was written",
        next_step=f"remove {path.parent} and run `tenp-dist search` again: the search begins anew",
    )
