"""What `run_layer` tells an observer, whoever it is: the passes over layers know no method and no sums."""

from __future__ import annotations

import typing

import pytest
import torch

from helpers.paths import ROOT
from helpers.scoring import random_corpus
from helpers.source_files import imports_of
from tenp_dist.compensation.moments import Moments
from tenp_dist.compensation.random_vectors import Probe
from tenp_dist.model.experts import Dispatch, Observer
from tenp_dist.model.layers import Frame
from tenp_dist.passes.compute import Compute, open_skeleton
from tenp_dist.passes.layer_ops import embed_all, microbatches, run_layer
from tenp_dist.scoring.accumulate import LayerAccumulator
from tenp_dist.scoring.statistics import LayerStatistics


class Slots:
    """The least that an observer is: it counts the slots of every domain."""

    def __init__(self) -> None:
        self.domain = -1
        self.seen: list[tuple[int, int]] = []

    def __call__(self, dispatch: Dispatch) -> None:
        self.seen.append((self.domain, dispatch.expert_S.numel()))


def test_an_observer_sees_every_microbatch_with_its_domain(tiny_model):
    """6 rows of 24 tokens in two domains, 2 rows a microbatch, 2 experts a token; a dense layer shows nothing."""
    skeleton = open_skeleton(tiny_model("deepseek_v3"), Compute("cpu", "float32", 48, 1))
    frame, batches = Frame(skeleton), microbatches(random_corpus(256, sequences=6), 48)
    observer = Slots()
    with torch.inference_mode():
        hidden = embed_all(frame, batches)
        for layer, seen in ((0, []), (1, [(0, 96), (0, 48), (1, 96), (1, 48)])):
            module = skeleton.load_layer(layer, skeleton.read_layer(layer))
            run_layer(frame, layer, module, batches, hidden, {}, observer)
            assert observer.seen == seen


@pytest.mark.parametrize(
    "observer",
    [
        LayerAccumulator(LayerStatistics.zeros(("text",), 2, 4), torch.ones(2, 4, dtype=torch.float64)),
        Moments({}, [1.0], 2, 4),
        Probe({}, [1.0], (2, 4), 0),
        Slots(),
    ],
    ids=lambda observer: type(observer).__name__,
)
def test_what_sums_a_layer_is_an_observer(observer):
    assert callable(observer) and isinstance(observer.domain, int)


def test_the_annotation_says_what_is_taken():
    assert typing.get_type_hints(run_layer)["observer"] == Observer | None


@pytest.mark.parametrize("path", sorted((ROOT / "tenp_dist" / "passes").glob("*.py")), ids=lambda path: path.name)
def test_passes_know_nothing_of_what_is_summed(path):
    above = ("tenp_dist.scoring", "tenp_dist.compensation", "tenp_dist.budget", "tenp_dist.evaluation")
    assert not [module for module in imports_of(path) if module.startswith(above)]
