"""What an operator sees and relies on: progress figures, journal, logs, metrics, one run at a time."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import replace

import pytest
import torch

from helpers.deaths import Death, lives
from helpers.scoring import moe_layers, pass_context, task_of, whole_worker
from tenp_dist.artifacts import exclusive
from tenp_dist.calibration.corpus import read_corpus
from tenp_dist.cli.view import describe
from tenp_dist.errors import OutputError, SourceError, WorkerLost
from tenp_dist.passes.compute import side_thread
from tenp_dist.passes.fence import Fence
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.passes.pass_progress import PassProgress
from tenp_dist.passes.schedule import Unit
from tenp_dist.pool.heartbeat import Heartbeat
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.pool.ray_pool import RayPool
from tenp_dist.pool.worker_log import last_words
from tenp_dist.progress import Journal, Progress
from tenp_dist.run_files import RunFiles
from tenp_dist.scoring.score_pass import score_model


def test_figures_of_units_and_pulses(monkeypatch):
    """Two shards of two ranks; hand arithmetic. A restarted worker counts from zero again."""
    clock = iter([0.0, *(t for second in (2.0, 4.0, 5.0) for t in (second, second))])
    monkeypatch.setattr("tenp_dist.passes.pass_progress.time.monotonic", lambda: next(clock))
    told = []
    watch = PassProgress(20, 2, told.append)
    rank = Heartbeat(steps=3, tokens=600, seconds=1.5, read_bytes=1000, memory=70, device_memory=5)
    units = [Unit(0, 5, (0,)), Unit(5, 9, (1,)), Unit(9, 10, (2,))]
    watch.beat([[rank, replace(rank, read_bytes=3000)], []], [0, 0], units)
    assert (told[0].done, told[0].tokens, told[0].seconds, told[0].read_bytes) == (3, 600, 2.0, 4000)
    assert told[0].workers == ["shard_0.rank_000", "shard_0.rank_001"]
    assert told[0].note == "layers 0-4, wave 0; layers 5-8, wave 1 and 1 more" and told[0].layer == 0
    assert told[0].memory == [75, 75] and told[0].tokens_per_second == 300 and told[0].bytes_per_second == 2000
    end = replace(rank, steps=5, tokens=1000, seconds=3.0)
    watch.ended(Unit(0, 5, (0,)), 0, [end, end], [5, 0])
    assert (told[1].done, told[1].tokens, watch.slowest) == (5, 400, 3.0)
    watch.lost(0)
    new = Heartbeat(steps=1, tokens=200, seconds=0.5)
    watch.beat([[new, new], []], [5, 3], units[:1])
    assert (told[2].done, told[2].tokens, told[2].retries, watch.tokens) == (9, 200, 1, 1200)
    assert told[2].layer == 3 and told[2].note == "layers 0-4, wave 0"
    assert "300 tokens/s" in describe(told[0]) and "2 workers, 75 B + 75 B" in describe(told[0])
    assert "5 workers, 1 B to 9 B" in describe(replace(told[0], memory=[9, 1, 2, 3, 4]))
    assert "1 started again" in describe(told[2])


def test_the_journal_tells_pace_and_time_left(tmp_path, monkeypatch):
    """8 of 20 were there; 3 more in 6 s leave 9, which take 18 s."""
    clock = iter([100.0, 100.0, 106.0])
    monkeypatch.setattr("tenp_dist.progress.time.monotonic", lambda: next(clock))
    journal = Journal(tmp_path)
    journal.started("score")
    journal.progress("score", Progress(8, 20, 0, 0.0, message="going on from 40%"))
    figures = journal.progress("score", Progress(11, 20, 50, 2.0, "layer 3", memory=(7,)))
    assert figures["eta_seconds"] == 18 and figures["tokens_per_second"] == 25
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "message", "progress"]
    assert lines[2]["memory"] == [7] and lines[2]["note"] == "layer 3"


def test_one_run_at_a_time(tenp, job_file, tmp_path):
    with exclusive(RunFiles(tmp_path / "run").lock, tmp_path / "run"):
        refused = tenp("run", job_file())
    assert refused.exit_code == OutputError.exit_code
    assert "Another run is at work" in refused.stderr
    assert tenp("inspect", job_file()).exit_code == 0


def score(pool, task, **cluster):
    told = []
    ledger = task.folder.parent / "stages" / "score.ledger.jsonl"
    score_model(pass_context(task.model, ledger, pool, told.append, **cluster), task, moe_layers(task.model))
    return told


def test_a_worker_that_was_given_up_writes_nothing_more(tiny_model, tmp_path):
    task = task_of(tmp_path, tiny_model("deepseek_v3"))
    old, new = whole_worker(task), whole_worker(task)
    old.open()
    new.open()
    with pytest.raises(WorkerLost, match="Another worker has taken over"):
        old.run(Unit(0, 1, (0, 1, 2, 3)))
        old.run(Unit(1, 2, (0, 1, 2, 3)))
        old.wait_for_results([1])
    assert not list(task.folder.glob("**/layer_0*.safetensors"))
    new.run(Unit(0, 1, (0, 1, 2, 3)))
    new.run(Unit(1, 2, (0, 1, 2, 3)))
    new.wait_for_results([1])
    assert (task.folder / "layer_00001.safetensors").exists()
    other = Fence(task.hidden_state_files.folder, 2, 0)
    other.take()
    new.fence.check()  # another shard's mark is not its own


def test_what_a_given_up_worker_still_stored_is_found_when_its_successor_starts_again(tiny_model, tmp_path):
    """It had looked for its mark just before the successor came; the file that the successor was to read is gone."""
    task = task_of(tmp_path, tiny_model("deepseek_v3"))
    old, new = whole_worker(task), whole_worker(task)
    waves = tuple(range(4))
    old.open()
    old.run(Unit(0, 1, waves))
    old._commit(waves, 1, force=True)
    new.open()
    old.fence.check = lambda: None
    old.run(Unit(1, 2, waves))
    old._commit(waves, 2, force=True)
    with pytest.raises(WorkerLost, match="not where they were"):
        new.run(Unit(1, 2, waves))
    assert {task.hidden_state_files.position(wave) for wave in waves} == {2}
    again = whole_worker(task)
    again.open()
    again.run(Unit(2, 3, waves))


def test_a_resident_shard_gets_ready_before_its_first_wave(tiny_model, tmp_path):
    """The same sums as without it, and what is wrong with a layer is said by the unit that needs it."""
    model = tiny_model("deepseek_v3")
    stored = []
    for name, warm in (("cold", False), ("warm", True)):
        worker = whole_worker(replace(task_of(tmp_path, model), folder=tmp_path / name, mode="resident"))
        worker.open()
        if warm:
            worker.warm()
            assert sorted(worker.step._norms) == worker.shard.skeleton.moe_layers()
            assert sorted(worker.source._loaded) == list(worker.layers)
        for wave in range(4):
            worker.run(Unit(0, worker.shard.skeleton.num_layers, (wave,)))
        stored.append([path.read_bytes() for path in sorted((tmp_path / name).glob("layer_*.safetensors"))])
    assert stored[0] == stored[1] and len(stored[0]) == len(worker.shard.skeleton.moe_layers())

    broken = whole_worker(replace(task_of(tmp_path, model), folder=tmp_path / "broken", mode="resident"))
    broken.open()
    reader = broken.shard.skeleton.read_layer

    def read_layer(layer, *share):
        if layer == 2:
            raise SourceError("cut off", where=f"layer {layer}")
        return reader(layer, *share)

    broken.source.release()
    broken.source._pending.clear()
    broken.shard.skeleton.read_layer = read_layer
    broken.warm()
    with pytest.raises(SourceError, match="cut off"):
        broken.run(Unit(0, 3, (0,)))


def test_a_begun_run_keeps_its_threads(tiny_model, tmp_path, monkeypatch):
    """Begun with one thread, gone on with where there are three: workers still get one."""
    task = task_of(tmp_path, tiny_model("deepseek_v3"))
    seen = []
    real = LayerWorker.open

    def open_shard(self):
        seen.append(self.task.compute.threads)
        if len(seen) == 1:
            raise RuntimeError("power cut")
        real(self)

    monkeypatch.setattr(LayerWorker, "open", open_shard)
    with pytest.raises(RuntimeError):
        score(InProcessPool(cores=1), task)
    score(InProcessPool(cores=3), task)
    assert seen == [1, 1]


def test_resuming_says_what_is_there(tiny_model, tmp_path):
    task = task_of(tmp_path, tiny_model("deepseek_v3"))
    worker = whole_worker(replace(task, commit_seconds=0))
    worker.open()
    for layer in (0, 1):
        worker.run(Unit(layer, layer + 1, (0, 1, 2, 3)))
    told = score(InProcessPool(cores=1), task, mode="streaming")
    assert "going on from" in told[0].message and "streaming" in told[0].message and told[0].done == 8


def test_the_live_view_in_metrics_and_in_the_journal(tenp, job_file, tmp_path, monkeypatch):
    """Every worker's memory under its log's name, and the layer, from a run of three shards."""
    published = []
    monkeypatch.setattr(InProcessPool, "publish", lambda self, figures, tags: published.append((figures, tags)))
    job = job_file(cluster={"shards": 3, "mode": "resident"})
    for stage in ("inspect", "calibrate", "score"):
        assert tenp(stage, job).exit_code == 0
    workers = {tags["worker"]: figures for figures, tags in published if "worker" in tags}
    assert set(workers) == {f"shard_{shard}.rank_000" for shard in range(3)}
    assert all(figures["worker_memory_bytes"] > 10**7 for figures in workers.values())
    assert all(tags["stage"] == "score" and tags["run"] == "run" for _, tags in published)
    layers = [figures["layer"] for figures, tags in published if "worker" not in tags and "layer" in figures]
    assert layers == sorted(layers) and layers[-1] == 4
    last = json.loads((tmp_path / "run/stages/progress.jsonl").read_text().splitlines()[-2])
    assert last["layer"] == 4 and last["workers"] == sorted(workers) and len(last["memory"]) == 3


def test_a_wave_that_the_declared_host_memory_does_not_hold_is_told(tiny_model, tmp_path):
    """Twice a wave's hidden states, in bytes: enough says nothing, a byte less does."""
    task = task_of(tmp_path, tiny_model("deepseek_v3"))
    tokens = read_corpus(task.corpus).tokens_NS.size
    wave = 2 * -(-tokens // 4) * 32 * 4
    for name, memory, said in (("enough", wave, False), ("less", wave - 1, True)):
        own = replace(task, folder=tmp_path / name / "scores")
        message = score(InProcessPool(cores=1), own, host_memory=memory)[0].message
        assert ("more than cluster.host_memory" in message and "raise score.waves" in message) is said, message


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_logs_metrics_and_last_words_on_ray(tiny_model, tmp_path, monkeypatch):
    """A real worker's log holds its units; a killed one's end is quoted; Prometheus finds the figures."""
    pool = RayPool()
    try:
        task = task_of(tmp_path, tiny_model("deepseek_v3"))
        died = lives(monkeypatch, pool, tmp_path / "deaths", Death("pass", 0, wave=1))
        told = score(pool, task, shards=2, mode="resident")
        logs = tmp_path / "run" / "logs" / "scores"
        assert died() == 1
        assert {path.name for path in logs.glob("*.log")} == {
            "shard_0.rank_000.log",
            "shard_1.rank_000.log",
        }
        assert "wave" in (logs / "shard_0.rank_000.log").read_text() and "MB resident" in last_words(
            logs / "shard_1.rank_000.log"
        )
        ledger = [json.loads(line) for line in (tmp_path / "run/stages/score.ledger.jsonl").read_text().splitlines()]
        lost = next(line for line in ledger if line["event"] == "lost")
        assert "its log ends:" in lost["found"] and "wave" in lost["found"]
        assert told[-1].retries == 1 and len(told[-1].memory) == 2 and min(told[-1].memory) > 10**7
        pool.publish({"tokens_per_second": 12.5}, {"stage": "score", "run": "test"})
        assert "ray_tenp_tokens_per_second" in scraped(pool)
    finally:
        pool.close()


def scraped(pool) -> str:
    """What the node's metrics port shows once there is something of ours."""
    node = pool.client.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(60):
        with urllib.request.urlopen(address, timeout=20) as answer:
            text = answer.read().decode()
        if "tenp_" in text:
            return text
        time.sleep(1)
    return ""


def test_a_side_thread_computes_on_itself_alone():
    """Also after its first operation, where torch settles a new thread's number; the others keep theirs."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        executor = side_thread("reader")
        executor.submit(lambda: torch.ones(10**6).to(torch.bfloat16)).result()
        assert executor.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
