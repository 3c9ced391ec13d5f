"""Files of a run at work that somebody removes by hand: made again, or refused; never left out of a sum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.deaths import PowerCut, failing, work
from helpers.marks import VARIANT
from helpers.scoring import run_scores
from tenp_dist.errors import StaleError
from tenp_dist.passes import hidden_states as boundaries
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.pool.ray_pool import RayPool


@pytest.fixture(scope="module")
def reference(tiny_model, tmp_path_factory) -> dict[str, bytes]:
    return run_scores(InProcessPool(cores=1), tiny_model("deepseek_v3"), tmp_path_factory.mktemp("reference"))


def robbed(worker: type[LayerWorker], mark: Path) -> type[LayerWorker]:
    """The worker, whose boundary file of wave 1 at layer 2 is removed once, right after it was stored."""

    class Robbed(worker):
        def open(self):
            super().open()
            write = self.hidden_state_files.write

            def writing(wave, layer, hidden):
                write(wave, layer, hidden)
                if (wave, layer) == (1, 2) and not mark.exists():
                    mark.touch()
                    self.hidden_state_files._path(wave, layer).unlink()

            self.hidden_state_files.write = writing

    return Robbed


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["resident", pytest.param("streaming", marks=VARIANT)])
def test_a_boundary_between_shards(mode, ray_pool, reference, tiny_model, tmp_path, monkeypatch):
    """On Ray. The shard upstream makes it again, the later waves wait; it counts as one loss."""
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    mark, real = tmp_path / "removed", RayPool.groups
    monkeypatch.setattr(ray_pool, "groups", lambda worker, *rest: real(ray_pool, robbed(worker, mark), *rest))
    found = run_scores(ray_pool, tiny_model("deepseek_v3"), tmp_path, shards=2, mode=mode, commit_seconds=0)
    ledger = tmp_path / "stages" / "score.ledger.jsonl"
    lost = [line for line in map(json.loads, ledger.read_text().splitlines()) if line["event"] == "lost"]
    assert mark.exists() and found == reference
    assert [one["error"] for one in lost] == ["Hidden states are not where they were"]
    assert "wave_001.layer_00002.safetensors" in lost[0]["found"]
    again = [unit for unit in work(ledger, "unit") if work(ledger, "unit").count(unit) > 1]
    assert set(again) == {(0, 0, 1), (0, 1, 1)}, "wave 1 through the shard upstream, and nothing else"


def cut(pool, model, folder: Path, monkeypatch, write: int, **cluster) -> None:
    """A run that ends at its n-th boundary file."""
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(boundaries, "atomic_write", failing(boundaries.atomic_write, write))
        run_scores(pool, model, folder, **cluster)


class Uneven(InProcessPool):
    """Of the shards at work the first, or the last, is always the fastest. choose: min or max."""

    def __init__(self, choose):
        super().__init__(cores=1)
        self._choose = choose

    def groups(self, *arguments):
        self._made = super().groups(*arguments)
        return self._made

    def wait(self, groups):
        return self._choose(groups, key=self._made.index)


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("shards", [2, 3])
def test_a_boundary_removed_before_the_run_goes_on(shards, reference, tiny_model, tmp_path, monkeypatch):
    """Of any wave that was stored when the run was cut, at any moment."""
    model, resident = tiny_model("deepseek_v3"), {"shards": 2, "mode": "resident"}
    tried = 0
    for write in range(3, 8):
        for nth in range(3):
            folder = tmp_path / f"{write}-{nth}"
            folder.mkdir()
            cut(Uneven(min), model, folder, monkeypatch, write, **resident)
            stored = sorted((folder / "scores" / "hidden").glob("wave_*"))
            if nth < len(stored):
                stored[nth].unlink()
                tried += 1
                again = run_scores(Uneven(max), model, folder, shards=shards, mode="resident")
                assert again == reference, (write, nth)
    assert tried > 9


def test_a_part_removed_before_the_run_goes_on_is_refused(reference, tiny_model, tmp_path, monkeypatch):
    """The sums of waves whose hidden states have gone on; what the message says to do brings the same bytes."""
    model, resident = tiny_model("deepseek_v3"), {"shards": 2, "mode": "resident"}
    cut(InProcessPool(cores=1), model, tmp_path, monkeypatch, 6, **resident)
    part = tmp_path / "scores" / "parts" / "layer_00002.rank_000-of-001.safetensors"
    part.unlink()
    with pytest.raises(StaleError, match="sums of earlier waves are missing") as caught:
        run_scores(InProcessPool(cores=1), model, tmp_path, **resident)
    assert caught.value.where == part and "remove scores/hidden" in caught.value.next_step
    for path in (tmp_path / "scores" / "hidden").glob("wave_*"):
        path.unlink()
    assert run_scores(InProcessPool(cores=1), model, tmp_path, **resident) == reference
