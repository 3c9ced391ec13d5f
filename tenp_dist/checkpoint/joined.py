"""The experts of a layer joined in one tensor again, as the source has them (`fused.py`), an expert at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tenp_dist.checkpoint.entries import ITEM_SIZE
from tenp_dist.checkpoint.families.base import PART_AXIS
from tenp_dist.checkpoint.fused import Fused
from tenp_dist.checkpoint.recipes import Inputs, OutputTensor, Recipe
from tenp_dist.errors import BudgetError


@dataclass(frozen=True)
class Joined(Recipe):
    """All experts of a layer in one tensor.

    fused: the source's tensor of that kind.
    experts: recipes of the parts of every expert that stays.
    """

    fused: Fused
    experts: tuple[tuple[Recipe, ...], ...]

    def read(self, inputs: Inputs) -> memoryview:
        return memoryview(b"".join(self.pieces(inputs)))

    def pieces(self, inputs: Inputs) -> Iterator[memoryview]:
        """An expert at a time."""
        for parts in self.experts:
            yield np.ascontiguousarray(self._expert([_array(part, inputs) for part in parts])).view(np.uint8).data

    def _expert(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """What lies in the file of one expert."""
        axis = self.fused.axis
        turned = [part.T for part in parts] if self.fused.transposed else parts
        if axis is None or len(turned) == 1:
            return turned[0]
        if not self.fused.form.interleaved:
            return np.concatenate(turned, axis=axis)
        shape = list(turned[0].shape)
        shape[axis] *= len(turned)
        return np.stack(turned, axis=axis + 1).reshape(shape)


def rejoined(fused: Mapping[str, Fused], tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """The tensors with the experts joined as the source has them, each where the first of its parts was.

    fused: of the source. tensors: of the new checkpoint, experts under their new ids, all of a layer alike.

    Raises:
        BudgetError: matrices of this width could be read the wrong way round.
    """
    made = {tensor.name: tensor.recipe for tensor in tensors}
    whole: dict[str, OutputTensor] = {}
    for name, one in fused.items():
        experts = tuple(tuple(made[part] for part in parts) for parts in one.names if parts[0] in made)
        if not experts:  # of a prediction layer that is left out
            continue
        joined = Joined(experts[0][0].source, experts[0][0].dtype, _joined_shape(one, experts), one, experts)
        _check_readable(name, joined)
        whole |= dict.fromkeys((part for parts in one.names for part in parts), OutputTensor(name, joined))
    found = {whole.get(tensor.name, tensor).name: whole.get(tensor.name, tensor) for tensor in tensors}
    return list(found.values())


def _check_readable(name: str, joined: Joined) -> None:
    """Engines that tell transposed matrices by their shape would take square ones as they lie."""
    fused, (_, *inside) = joined.fused, joined.shape
    if fused.form.transposed is None and fused.transposed and len(set(inside)) == 1:
        raise BudgetError(
            "Experts of this width would be read the wrong way round",
            where=f"output.layouts: {name}",
            found=f"{list(joined.shape)}, transposed as in the source, which its shape does not show",
            wanted="matrices that are not square",
            next_step="choose another retention or align, or layout ragged, where every expert has tensors of its own",
        )


def _joined_shape(fused: Fused, experts: Sequence[Sequence[Recipe]]) -> tuple[int, ...]:
    shape, axis = list(experts[0][0].shape), PART_AXIS[fused.form.parts[0]]
    if axis is not None:
        shape[axis] *= len(fused.form.parts)
    return (len(experts), *(shape[::-1] if fused.transposed else shape))


def _array(recipe: Recipe, inputs: Inputs) -> np.ndarray:
    """What a recipe makes, as unsigned integers of its item size, in its shape."""
    return np.frombuffer(recipe.read(inputs), dtype=f"u{ITEM_SIZE[recipe.dtype]}").reshape(recipe.shape)
