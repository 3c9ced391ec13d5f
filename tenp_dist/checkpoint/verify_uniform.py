"""Check a `uniform` checkpoint against its source and plan: renumbering, router rows, config and every byte.

Nothing here comes from the writer: where a written tensor comes from is read off its own name, and what the
config must say is counted in the written tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch

from tenp_dist.checkpoint.families.base import PART_AXIS, UP, Family
from tenp_dist.checkpoint.index import CheckpointIndex
from tenp_dist.checkpoint.kept import KeptNeurons, leaving_layers
from tenp_dist.checkpoint.source import Source
from tenp_dist.checkpoint.verify import Expected, Readers, Verified, Wanted, check_tensor
from tenp_dist.checkpoint.verify_depth import counted_layers
from tenp_dist.checkpoint.verify_merged import check_merged
from tenp_dist.errors import VerifyError


class Names:
    """Reads layer, expert and matrix off the names of one family's tensors. num_layers: of the decoder."""

    def __init__(self, family: Family, num_layers: int):
        self.rows = ((family, 0), (family.mtp_row, num_layers))  # the second counts from there on
        self._layers = [re.compile(re.escape(row.layer).replace(r"\{layer\}", r"(\d+)")) for row, _ in self.rows]

    def _find(self, name: str) -> tuple[int, Family, str, str] | None:
        """(layer, its row, its prefix, the rest of the name)."""
        for (row, first), pattern in zip(self.rows, self._layers, strict=True):
            found = pattern.match(name)
            if found:
                return first + int(found[1]), row, found[0], name[found.end() :]
        return None

    def layer(self, name: str) -> int | None:
        found = self._find(name)
        return found and found[0]

    def expert(self, name: str) -> tuple[int, str] | None:
        """(expert, matrix) of a routed expert's tensor."""
        found = self._find(name)
        if found is None:
            return None
        _, row, _, rest = found
        pattern = re.escape(row.expert_tensor).replace(r"\{expert\}", r"(\d+)").replace(r"\{matrix\}", r"([\w.]+)")
        inside = re.fullmatch(pattern, rest)
        parts = {text: part for part, text in row.matrices.items()}
        return (int(inside[1]), parts[inside[2]]) if inside and inside[2] in parts else None

    def moved(self, name: str, leaving: Collection[int]) -> str:
        """The name once these decoder layers are gone: layers behind them move up, those of other prefixes stay."""
        found = self._find(name)
        if found is None or not leaving or found[1] is not self.rows[0][0]:
            return name
        layer, row, _, rest = found
        return row.layer.format(layer=layer - len([gone for gone in leaving if gone < layer])) + rest

    def renamed(self, name: str, expert: int, matrix: str) -> str:
        """The name that this matrix of another expert of the layer has."""
        found = self._find(name)
        assert found is not None, "a tensor of an expert"
        _, row, prefix, _ = found
        return prefix + row.expert_tensor.format(expert=expert, matrix=row.matrices[matrix])

    def of_router(self, name: str) -> bool:
        """Whether a layer's tensor holds rows, or entries, of experts."""
        found = self._find(name)
        return found is not None and found[3].startswith(found[1].router_tensors)

    def inside(self, name: str, module: str) -> str | None:
        """What follows `module.` in the name of a layer's tensor, None for tensors of other modules."""
        found = self._find(name)
        return found[3].removeprefix(f"{module}.") if found and found[3].startswith(f"{module}.") else None


def renumbered_names(source: Source, kept: Mapping[int, KeptNeurons]) -> dict[str, str]:
    """Written name -> source name of every tensor that has to be there."""
    names, result = Names(source.family, source.facts.num_layers), {}
    leaving = leaving_layers(kept)
    for name in source.index.tensors:
        layer, expert = names.layer(name), names.expert(name)
        if layer in leaving:
            continue
        if layer is None or expert is None or layer not in kept:
            result[names.moved(name, leaving)] = name
        elif expert[0] in kept[layer].routed:
            number = int((kept[layer].routed < expert[0]).sum())
            result[names.moved(names.renamed(name, number, expert[1]), leaving)] = name
    return result


def check_counts(source: Source, written: CheckpointIndex, kept: Mapping[int, KeptNeurons]) -> None:
    """The config is the source's, but for the numbers of experts, widths and layers that the tensors show.

    Raises:
        VerifyError: names the keys that differ.
    """
    leaving = leaving_layers(kept)
    depth = source.facts.num_layers - len(leaving)
    counted = _counted(source, written, depth) | _fewer_active(source, kept)
    if leaving:
        counted |= counted_layers(source, written, Names(source.family, depth).layer, leaving)
    wanted = source.family.with_numbers(source.index.config, counted)
    keys = [key for key in {**wanted, **written.config} if wanted.get(key) != written.config.get(key)]
    if keys:
        raise VerifyError(
            "Config disagrees with the tensors or with the source's config",
            where=f"{written.folder / 'config.json'}: {', '.join(keys)}",
            found={key: written.config.get(key) for key in keys},
            wanted={key: wanted.get(key) for key in keys},
            next_step="write again with --overwrite; if it stays, report it with this message",
        )


def _counted(source: Source, written: CheckpointIndex, depth: int) -> dict[str, object]:
    """Config keys and what the written tensors show them to be; a list where they disagree with each other.

    depth: decoder layers that were written.
    """
    family = source.family
    names = Names(family, depth)
    experts: dict[int | None, set[int]] = {}
    widths: set[int] = set()
    shared: set[int] = set()
    for name, entry in written.tensors.items():
        expert = names.expert(name)
        if expert is not None:
            experts.setdefault(names.layer(name), set()).add(expert[0])
            axis = PART_AXIS[expert[1]]
            widths.update(() if axis is None else (entry.shape[axis],))
        elif names.inside(name, family.shared_prefix) == f"{family.shared_matrices[UP]}.weight":
            shared.add(entry.shape[0])
    predicting = {layer for layer in map(names.layer, written.tensors) if layer is not None and layer >= depth}
    width = _only(widths)
    counted = dict.fromkeys(family.experts_keys, _only({len(ids) for ids in experts.values()}))
    counted |= dict.fromkeys(family.mtp_keys, len(predicting)) | {family.width_key: width}
    if family.shared_key and family.shared_widths(source.index.config):
        counted[family.shared_key] = _only({wide / width if isinstance(width, int) else wide for wide in shared})
    return counted


def _fewer_active(source: Source, kept: Mapping[int, KeptNeurons]) -> dict[str, object]:
    """The number of experts that a token goes to, where the plan has another."""
    found = {neurons.merging.top_k for neurons in kept.values() if neurons.merging is not None}
    stated = found - {None}
    return {source.family.top_k_key: _only(stated)} if stated else {}


def _only(values: set) -> object:
    return next(iter(values)) if len(values) == 1 else sorted(values)


def verify_uniform(names: Sequence[str], readers: Readers, expected: Expected) -> Verified:
    """Compare the named tensors with what source and plan say they are.

    Raises:
        VerifyError: the first tensor whose dtype, shape or bytes differ.
    """
    family, found = expected.source.family, Verified()
    reading = Names(family, expected.source.facts.num_layers)
    for name in names:
        origin, shape = expected.names[name], readers.written.index.entry(name).shape
        wanted = Wanted(origin, solved=readers.solved(origin))
        layer, expert = reading.layer(origin), reading.expert(origin)
        if layer is not None and layer in expected.kept:
            neurons, same = expected.kept[layer], shape == readers.source.index.entry(origin).shape
            if expert is not None and expert[0] in neurons.merged and readers.solved(origin) is None:
                terms = neurons.merged[expert[0]]
                found += check_merged(
                    name, readers, origin, [(reading.renamed(origin, e, expert[1]), factor) for e, factor in terms]
                )
                continue
            if expert is not None and (axis := PART_AXIS[expert[1]]) is not None:
                ids = torch.from_numpy(neurons.of(expert[0]).copy()).long()
                cut = partial(torch.index_select, dim=axis, index=ids)
                wanted = Wanted(origin, cut, readers.solved(origin))
            elif neurons.experts is not None and reading.of_router(name):
                wanted = Wanted(
                    origin, partial(_chosen, num_experts=neurons.num_experts, kept=neurons.experts.tolist())
                )
            elif reading.inside(name, family.shared_prefix):
                solved = readers.solved(origin)
                filled = None if same or not family.shared_key else partial(_filled, shape=shape)
                wanted = Wanted(origin, filled, solved if solved is None or filled is None else filled(solved))
        found += check_tensor(name, readers, wanted)
    return found


def _chosen(tensor: torch.Tensor, num_experts: int, kept: Sequence[int]) -> torch.Tensor:
    """The entries of kept experts, along the one axis that has an entry for each."""
    axis = list(tensor.shape).index(num_experts)
    return torch.stack([tensor.select(axis, expert) for expert in kept], dim=axis)


def _filled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensor with zeros behind it, up to a shape that is nowhere smaller."""
    more = [wanted - now for wanted, now in zip(shape, tensor.shape, strict=True)]
    if min(more) < 0:
        return tensor
    return torch.nn.functional.pad(tensor, [side for amount in reversed(more) for side in (0, amount)])
