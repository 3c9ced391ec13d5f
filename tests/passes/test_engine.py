"""Shards, waves and losses with real workers: the same bytes however a run is cut and by whatever it is carried."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from helpers.deaths import Death, cuts, lives, only_the_units_in_flight_were_lost
from helpers.scoring import random_corpus, run_scores
from tenp_dist.errors import ClusterError, StaleError
from tenp_dist.passes.hidden_states import GuardedHiddenStateFiles, HiddenStateFiles
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.scoring.statistics import read_statistics

CASES = [
    {"shards": 1, "mode": "resident"},
    {"shards": 2, "mode": "resident"},
    {"shards": 3, "mode": "resident"},
    {"shards": 2, "mode": "streaming"},
    {"shards": 1, "host_memory": 1000, "commit_seconds": 0},
    {"shards": 2, "mode": "streaming", "host_memory": 1000},
    {"shards": 4, "mode": "resident", "host_memory": 1000},
]


@pytest.mark.parametrize("cluster", CASES, ids=str)
def test_scores_are_the_same_bytes_for_every_number_of_shards_and_mode(cluster, tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    assert run_scores(InProcessPool(cores=1), model, tmp_path / "other", **cluster) == reference


def test_the_number_of_waves_changes_no_sum(tiny_model, tmp_path):
    """Microbatches are added one by one: cutting them into 1 or 4 waves gives the same bits."""
    model = tiny_model("deepseek_v3")
    run_scores(InProcessPool(cores=1), model, tmp_path / "4")
    run_scores(InProcessPool(cores=1), model, tmp_path / "1", waves=1)
    for path in (tmp_path / "4" / "scores").glob("layer_*"):
        four, one = read_statistics(path), read_statistics(tmp_path / "1" / "scores" / path.name)
        for name, tensor in four.tensors.items():
            assert one[name].equal(tensor), (path.name, name)


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("mode", ["resident", "streaming"])
@pytest.mark.parametrize("where", ["part", "boundary"])
def test_a_run_cut_anywhere_goes_on_with_another_number_of_shards(mode, where, tiny_model, tmp_path, monkeypatch):
    """Cut at the n-th write of a part or a boundary, for every n; resumed with 1 to 3 shards: same bytes."""
    from tenp_dist.passes import hidden_states as boundaries
    from tenp_dist.scoring import partial_sums as parts

    model, corpus = tiny_model("qwen3_moe"), random_corpus(256, sequences=4)
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference", corpus=corpus)
    module, name = {"part": (parts, "write_statistics"), "boundary": (boundaries, "atomic_write")}[where]

    def begin(folder: Path) -> None:
        run_scores(InProcessPool(cores=1), model, folder, corpus=corpus, shards=2, mode=mode, commit_seconds=0)

    for cut, folder in enumerate(cuts(monkeypatch, module, name, begin, tmp_path), start=1):
        resumed = run_scores(InProcessPool(cores=1), model, folder, corpus=corpus, shards=1 + cut % 3, mode=mode)
        assert resumed == reference, cut
    assert cut >= 3


def test_a_position_is_read_while_its_wave_goes_on(tmp_path):
    """Between the listing and the look the next boundary is stored and the one that was listed dropped."""

    class Busy(HiddenStateFiles):
        def _layers(self, wave):
            listed = super()._layers(wave)
            if listed == [2]:
                HiddenStateFiles(self.folder, self.key).write(wave, 4, {})
            return listed

    for kind in (Busy, type("Guarded", (Busy, GuardedHiddenStateFiles), {})):
        folder = tmp_path / kind.__name__
        HiddenStateFiles(folder, "key").write(0, 2, {})
        guard = [lambda: 9] if issubclass(kind, GuardedHiddenStateFiles) else []
        assert kind(folder, "key", *guard).position(0) == 4


def test_a_name_that_is_listed_and_cannot_be_opened(tmp_path, monkeypatch):
    """For ever: an error that names it. For a moment: the position."""
    ours, link = HiddenStateFiles(tmp_path, "key"), tmp_path / "wave_000.layer_00004.safetensors"
    ours.write(0, 2, {})
    link.symlink_to(tmp_path / "nowhere")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(StaleError, match="cannot be opened") as caught:
        ours.position(0)
    assert link.name in caught.value.found and 3 < sum(pauses) < 20
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "nowhere").exists() or target())

    def target():
        HiddenStateFiles(tmp_path / "other", "key").write(0, 4, {})
        (tmp_path / "other" / link.name).rename(tmp_path / "nowhere")

    assert ours.position(0) == 4


def test_another_number_of_ranks_is_refused_in_a_run_that_was_begun(tiny_model, tmp_path):
    model = tiny_model("deepseek_v3")
    part = tmp_path / "scores" / "parts" / "layer_00001.rank_000-of-002.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    with pytest.raises(StaleError, match="another tensor_parallel"):
        run_scores(InProcessPool(cores=1), model, tmp_path)


def test_more_shards_than_layers_are_refused(tiny_model, tmp_path):
    with pytest.raises(ClusterError, match="More shards than decoder layers"):
        run_scores(InProcessPool(cores=1), tiny_model("deepseek_v3"), tmp_path, shards=5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "streaming"])
def test_two_shards_on_ray_survive_a_killed_worker(mode, ray_pool, tiny_model, tmp_path, monkeypatch):
    """The same bytes as an undisturbed run in this process."""
    model = tiny_model("deepseek_v3")
    reference = run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", Death("pass", 1, wave=1))
    found = run_scores(ray_pool, model, tmp_path / "ray", shards=2, mode=mode, commit_seconds=0)
    assert died() == 1 and found == reference
    ledger = tmp_path / "ray" / "stages" / "score.ledger.jsonl"
    only_the_units_in_flight_were_lost(ledger, layers=4, waves=4, deaths=1)


def close_to(found: Path, reference: Path) -> None:
    """Every statistic within 1e-5 of the largest entry of its expert (or layer)."""
    for path in sorted((reference / "scores").glob("layer_*")):
        wanted, other = read_statistics(path), read_statistics(found / "scores" / path.name)
        for name, tensor in wanted.tensors.items():
            scale = tensor.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            assert ((other[name] - tensor).abs() / scale).max() < 1e-5, (path.name, name)


@pytest.mark.slow
def test_two_ranks_on_ray_give_the_same_scores_and_survive_a_killed_rank(ray_pool, tiny_model, tmp_path, monkeypatch):
    """1x2 and 2x2 equal 1x1 within 1e-5; killed or not, one or two shards: the same bytes among themselves."""
    model = tiny_model("deepseek_v3")
    run_scores(InProcessPool(cores=1), model, tmp_path / "reference")
    alone = run_scores(ray_pool, model, tmp_path / "1x2", tensor_parallel=2)
    close_to(tmp_path / "1x2", tmp_path / "reference")
    died = lives(monkeypatch, ray_pool, tmp_path / "deaths", Death("pass", 1, wave=1, ranks=(1,)))
    disturbed = run_scores(ray_pool, model, tmp_path / "2x2", shards=2, tensor_parallel=2, mode="resident")
    assert died() == 1 and disturbed == alone


@pytest.mark.slow
def test_a_cluster_smaller_than_asked_is_an_error_in_time(ray_pool, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool.nodes, "cores", [1000])
    with pytest.raises(ClusterError, match="smaller than asked") as caught:
        run_scores(ray_pool, tiny_model("deepseek_v3"), tmp_path, shards=2, start_timeout=2)
    assert "free: " in caught.value.found and "500 CPU" in caught.value.wanted
