"""A slice finds an expert's matrix in every form that tensors of experts have, and is a view of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenp_dist.checkpoint.expert_slices import ExpertSlice, ExpertSlices
from tenp_dist.checkpoint.families.base import DOWN, GATE, NEURON_AXIS, UP
from tenp_dist.checkpoint.families.table import FAMILIES


@dataclass
class Layer:
    """Experts as a layer multiplies with them, drawn without equal numbers. gate, up: [E, F, D]; down: [E, D, F]."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray

    @classmethod
    def of(cls, experts: int, neurons: int, hidden: int) -> Layer:
        numbers = np.arange(3 * experts * neurons * hidden).reshape(3, experts, neurons, hidden)
        return cls(numbers[0], numbers[1], numbers[2].transpose(0, 2, 1))

    def matrix(self, expert: int, matrix: str) -> np.ndarray:
        return {GATE: self.gate, UP: self.up, DOWN: self.down}[matrix][expert]


def own(layer: Layer, expert: int) -> dict[str, tuple]:
    slices = ExpertSlices(FAMILIES["qwen3_moe"])
    return {m: (layer.matrix(expert, m).copy(), slices.of(3, expert, m)) for m in NEURON_AXIS}


def concatenated(layer: Layer, expert: int) -> dict[str, tuple]:
    """[E, 2F, D]: all of gate, then all of up; down [E, D, F]."""
    gate_up, neurons = np.concatenate([layer.gate, layer.up], axis=1), layer.gate.shape[1]
    return {
        GATE: (gate_up, ExpertSlice("gate_up", 0, expert, count=neurons)),
        UP: (gate_up, ExpertSlice("gate_up", 0, expert, offset=neurons)),
        DOWN: (layer.down.copy(), ExpertSlice("down", 1, expert)),
    }


def interleaved(layer: Layer, expert: int) -> dict[str, tuple]:
    """[E, 2F, D]: gate and up of a neuron one after the other."""
    gate_up = np.stack([layer.gate, layer.up], axis=2).reshape(len(layer.gate), -1, layer.gate.shape[2])
    return {
        GATE: (gate_up, ExpertSlice("gate_up", 0, expert, stride=2)),
        UP: (gate_up, ExpertSlice("gate_up", 0, expert, offset=1, stride=2)),
        DOWN: (layer.down.copy(), ExpertSlice("down", 1, expert)),
    }


def transposed(form):
    """The same with every matrix the other way round: [E, D, 2F] and [E, F, D]."""

    def made(layer: Layer, expert: int) -> dict[str, tuple]:
        return {
            matrix: (
                np.ascontiguousarray(tensor.swapaxes(-1, -2)),
                ExpertSlice(s.tensor, 1 - s.axis, s.index, s.offset, s.stride, s.count),
            )
            for matrix, (tensor, s) in form(layer, expert).items()
        }

    made.__name__ = f"transposed_{form.__name__}"
    return made


FORMS = (own, concatenated, interleaved, transposed(own), transposed(concatenated), transposed(interleaved))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@given(sizes=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)), data=st.data())
def test_every_form(form, library, sizes, data):
    layer, expert = Layer.of(*sizes), data.draw(st.integers(0, sizes[0] - 1))
    for matrix, (tensor, place) in form(layer, expert).items():
        written, wanted = tensor.copy(), layer.matrix(expert, matrix)
        view = place.view(library(written), NEURON_AXIS[matrix])
        assert np.array_equal(np.asarray(view), wanted)
        assert place.view(written).shape[place.axis] == sizes[1]
        view[:] = -1  # into the tensor, and nowhere else
        assert np.array_equal(written == -1, np.isin(tensor, wanted))


def test_names_of_an_own_tensor():
    slices = ExpertSlices(FAMILIES["deepseek_v3"])
    assert slices.of(7, 12, UP) == ExpertSlice("model.layers.7.mlp.experts.12.up_proj.weight", 0)
    found = [(expert, matrix, place.axis) for expert, matrix, place in slices.of_layer(0, range(2, 4))]
    assert found == [(2, GATE, 0), (2, UP, 0), (2, DOWN, 1), (3, GATE, 0), (3, UP, 0), (3, DOWN, 1)]
