"""Slurm scripts, uploads and status: what is rendered, packed and read, without Slurm or Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from helpers.paths import ROOT
from tenp_dist import job_file as job_files
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import ClusterError, DiskFullError, JobError
from tenp_dist.launch.slurm import SlurmScript, cluster_options
from tenp_dist.launch.status import read_status
from tenp_dist.launch.submit import pack
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.preflight import node_checks as places
from tenp_dist.preflight.cluster_split import Split, split_over
from tenp_dist.preflight.disk_space import bytes_needed

SHIPPED = ROOT / "cluster" / "slurm" / "prune.sbatch"
ORDER = ["inspect", "calibrate", "score", "plan", "write", "verify", "report"]


# Slurm


def test_the_shipped_script_is_what_the_command_line_writes(tenp, tmp_path, monkeypatch):
    """Job, environment and folders apart, which are the caller's."""
    script = SlurmScript(
        job="jobs/deepseek-v3.yaml",
        nodes=4,
        gpus=8,
        options=cluster_options({}, Split(4, 8)),
        models="/shared/models",
        runs="/shared/runs",
        text="/shared/text",
        venv="/shared/tenp-dist/.venv",
    )
    assert SHIPPED.read_text() == script.render()
    for name in ("MODELS", "RUNS", "TEXT"):
        monkeypatch.setenv(f"TENP_{name}", f"/shared/{name.lower()}")
    job, out = ROOT / "jobs" / "deepseek-v3.yaml", tmp_path / "x.sbatch"
    words = ("--nodes", 4, "--gpus", 8, "--venv", "/shared/tenp-dist/.venv", "--out", out)
    assert tenp("slurm", job, *words).exit_code == 0
    assert out.read_text() == SHIPPED.read_text().replace("JOB=jobs/", f"JOB={job.parent}/")


def test_script_lines_keep_awkward_words(tmp_path):
    script = SlurmScript(
        job="/shared/my jobs/a'b.yaml",
        nodes=3,
        gpus=0,
        cpus=7,
        account="physics",
        partition="long",
        directives=["--qos=high"],
        options=["--set", "output.layouts=[ragged, padded]"],
        container="apptainer exec --nv /shared/tenp.sif",
    )
    lines = script.render().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert "--nodes=3" in directives and "--account=physics" in directives and "--partition=long" in directives
    assert "--qos=high" in directives and not any("gpus" in line for line in directives)
    head = tmp_path / "head.sh"  # the lines that a person edits, read by bash itself
    head.write_text(
        "\n".join(line for line in lines[: lines.index("set -euo pipefail")])
        + '\nprintf "%s\\n" "$JOB" "${OPTIONS[@]}" "$CONTAINER" "$CPUS" "$GPUS" "$SCRATCH" "$TENP_RUNS"'
    )
    environment = {"PATH": os.environ["PATH"], "SLURM_TMPDIR": "/disk"}
    said = subprocess.run(["bash", head], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "/shared/my jobs/a'b.yaml", "--set", "output.layouts=[ragged, padded]",
        "apptainer exec --nv /shared/tenp.sif", "7", "0", "/disk", "",
    ]  # fmt: skip


def test_words_reach_the_run_as_they_are(tmp_path):
    """Through the lines that srun, Ray and the head's own bash hand on, with all of Slurm and Ray taken out."""
    words = ["--set", "output.layouts=[ragged, padded]", "--run-dir", "/shared/my runs/$x 'y\" *"]
    lines = SlurmScript(job="j", nodes=1, gpus=0, options=words).render().splitlines()
    given = next(line for line in lines if line.startswith("OPTIONS="))
    run = next(line.strip() for line in lines if line.strip().startswith("tenp-dist run"))
    assert run.startswith('tenp-dist run "$JOB" --address "$address" "$@" >>')
    handed_on = [line for line in lines if 'bash -c "$run" tenp-dist "$@" >' in line]
    handed_on += [line for line in lines if 'bash -c "$node" tenp-dist "${OPTIONS[@]}" &' in line]
    assert len(handed_on) == 2
    script = f"""{given}
run='printf "<%s>\\n" "$@"'; node='bash -c "$run" tenp-dist "$@"'; export run
bash -c "$node" tenp-dist "${{OPTIONS[@]}}"
"""
    said = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [f"<{word}>" for word in words]


def test_a_directive_of_the_caller_replaces_ours():
    script = SlurmScript(job="j", nodes=2, gpus=8, directives=["--mem=100G", "-t 1:00", "--exclusive=user", "--qos=x"])
    lines = [line.removeprefix("#SBATCH ") for line in script.render().splitlines() if line.startswith("#SBATCH ")]
    assert lines[-4:] == ["--mem=100G", "-t 1:00", "--exclusive=user", "--qos=x"]
    assert not {"--mem=0", "--exclusive", "--time=04:00:00"} & set(lines) and "--nodes=2" in lines


@pytest.mark.parametrize(
    "cluster, nodes, gpus, options",
    [
        ({}, 4, 8, ["shards=4", "tensor_parallel=8"]),
        ({}, 2, 0, ["shards=2", "tensor_parallel=1"]),
        ({"tensor_parallel": 4}, 2, 8, ["shards=4"]),
        ({"shards": 4, "tensor_parallel": 4}, 2, 8, []),
        ({"shards": 3, "tensor_parallel": 2}, 1, 0, []),
    ],
)
def test_cluster_options(cluster, nodes, gpus, options):
    found = cluster_options(cluster, split_over(cluster, nodes, gpus, None))
    assert found[1::2] == [f"cluster.{option}" for option in options] and set(found[::2]) <= {"--set"}


@pytest.mark.parametrize(
    "cluster, nodes, gpus, split",
    [
        ({}, 1, 8, Split(2, 4)),  # qwen3_moe of 4 key-value heads, 3 layers
        ({}, 4, 8, Split(3, 4)),  # no more shards than layers
        ({}, 1, 6, Split(2, 3)),
        ({}, 2, 1, Split(2, 1)),
        ({"tensor_parallel": 2}, 1, 4, Split(2, 2)),
    ],
)
def test_ranks_come_from_what_the_model_can_be_cut_into(cluster, nodes, gpus, split, tiny_model):
    assert split_over(cluster, nodes, gpus, open_source(tiny_model("qwen3_moe"))) == split


def test_ranks_that_the_model_cannot_have_are_refused_before_the_queue(tenp, job_file, tiny_model, tmp_path):
    job, out = job_file(model=tiny_model("qwen3_moe"), cluster={"tensor_parallel": 8}), tmp_path / "x.sbatch"
    result = tenp("slurm", job, "--nodes", 1, "--gpus", 8, "--out", out)
    assert result.exit_code == 4 and "4 attention key-value heads" in result.stderr and not out.exists()


def test_idle_accelerators_are_told_of(tenp, job_file, tmp_path):
    job = job_file(cluster={"shards": 1, "tensor_parallel": 4})
    result = tenp("slurm", job, "--nodes", 1, "--gpus", 8, "--out", tmp_path / "x.sbatch")
    assert result.exit_code == 0 and "4 of 8 accelerators stay idle" in result.stdout


@pytest.mark.parametrize(
    "cluster, nodes, gpus", [({"shards": 5}, 4, 8), ({"tensor_parallel": 16}, 4, 8), ({"shards": 3}, 1, 2)]
)
def test_a_job_that_does_not_fit_is_refused_before_the_queue(cluster, nodes, gpus):
    with pytest.raises(ClusterError, match="does not fit"):
        split_over(cluster | {"tensor_parallel": cluster.get("tensor_parallel", gpus)}, nodes, gpus, None)


def test_a_script_is_not_overwritten(tenp, job_file, tmp_path):
    job, out = job_file(), tmp_path / "x.sbatch"
    assert tenp("slurm", job, "--out", out).exit_code == 0
    assert tenp("slurm", job, "--out", out).exit_code == 0, "the same again"
    refused = tenp("slurm", job, "--out", out, "--nodes", 2)
    assert refused.exit_code == 8 and "--overwrite" in refused.stderr and "--nodes=1" in out.read_text()
    assert tenp("slurm", job, "--out", out, "--nodes", 2, "--overwrite").exit_code == 0
    assert "--nodes=2" in out.read_text()


def test_no_sbatch_here(tenp, job_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = tenp("slurm", job_file(), "--out", tmp_path / "x.sbatch", "--submit")
    assert result.exit_code == ClusterError.exit_code and "on a login node: sbatch" in result.stderr


# paths


def test_variables_in_paths(job_file, monkeypatch):
    job = job_file(run_dir="${TENP_RUNS:-here}/x")
    monkeypatch.delenv("TENP_RUNS", raising=False)
    assert job_files.load_job(job).run_dir == job.parent / "here" / "x"
    monkeypatch.setenv("TENP_RUNS", "")
    assert job_files.load_job(job).run_dir == job.parent / "here" / "x"
    monkeypatch.setenv("TENP_RUNS", "/shared/runs")
    assert job_files.load_job(job).run_dir == Path("/shared/runs/x")
    job = job_file(run_dir="${TENP_NOWHERE}/x")
    with pytest.raises(JobError, match="environment variable that is not set") as caught:
        job_files.load_job(job)
    assert "export TENP_NOWHERE=" in str(caught.value)


def test_run_directory_in_an_upload_is_refused(tenp, job_file):
    result = tenp("run", job_file(), "--run-dir", "/tmp/ray/session_1/runtime_resources/working_dir_files/x/run")
    assert result.exit_code == JobError.exit_code and "TENP_RUNS" in result.stderr


class TwoNodes(InProcessPool):
    """A pool of two nodes that see what `views` says of them."""

    def __init__(self, **views):
        super().__init__(cores=1)
        self.views = views

    def each_node(self, function, *arguments):
        seen = {"good": function(*arguments)}
        return seen | {"bad": replace(seen["good"], **self.views)}


@pytest.fixture
def loaded(job_file):
    from tenp_dist.checkpoint.source import open_source

    job = job_files.load_job(job_file())
    job.run_dir.mkdir()
    return job, open_source(job.model)


@pytest.mark.parametrize(
    "views, kind, text",
    [
        ({"model_seen": False, "model": "Model folder not found"}, ClusterError, "does not see the model"),
        ({"model": "0" * 64}, ClusterError, "another model under the same path"),
        ({"probe": False}, ClusterError, "without the driver's probe file"),
        ({"probe": False, "own_written": False}, ClusterError, "is not there"),
        ({"own_written": False, "own": "Read-only file system"}, ClusterError, "Read-only file system"),
        ({"own": ".probe-nowhere"}, ClusterError, "not seen by the driver"),
        ({"free": 1000}, DiskFullError, "Not enough space"),
    ],
)
def test_a_node_that_sees_something_else_is_named(views, kind, text, loaded, monkeypatch):
    job, source = loaded
    monkeypatch.setattr(places, "_PATIENCE_SECONDS", 0.3)
    places.check_nodes(TwoNodes(), job, source)
    with pytest.raises(kind) as caught:
        places.check_nodes(TwoNodes(**views), job, source)
    said = str(caught.value)
    assert text in said and "node bad: " in said
    assert str(job.model if "model" in text or "model_seen" in views else job.run_dir) in said
    assert not any(job.run_dir.iterdir()), "probes are removed"


def test_room_needed_by_hand(loaded):
    """4 samples x 2 domains x 32 tokens, D = 32; 3 MoE layers x 8 experts x 24 neurons of 3 x 32 float32 values."""
    job, source = loaded
    facts, routed = source.facts, 3 * 8 * 24 * 3 * 32 * 4
    assert facts.bytes.routed == routed
    sums = 8 * 2 * (4 * 24 + 7) * 8 * 3
    hidden = 4 * (4 * 2 * 32) * 32
    assert bytes_needed(job, source) == facts.bytes.total - int(routed * 2 / 5) + sums + hidden
    orders = 3 * 8 * 24 * (4 + 8)
    for budget in ({"method": "obs"}, {"neurons": "obs"}):
        eliminated = job.model_copy(update={"budget": job.budget.model_copy(update=budget)})
        assert bytes_needed(eliminated, source) == bytes_needed(job, source) + orders


# submission


def test_a_packed_job_is_the_same_job(job_file, tmp_path):
    """Its paths are settled, its text is packed, and every stage has the same key."""
    from tenp_dist.stages.catalogue import stages_of
    from tenp_dist.stages.run import open_run

    job = job_files.load_job(
        job_file(evaluation={"sources": [{"path": "own.jsonl", "domain": "own"}], "sequence_length": 32}),
        ["budget.retention=0.45", "budget.slope=1.0", "calibration.sources.0.weight=2.50"],
    )
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "experts"}) + "\n")
    folder = tmp_path / "upload"
    folder.mkdir()
    pack(job, folder)
    again = job_files.load_job(folder / "job.yaml")
    assert again.model == job.model and again.run_dir == job.run_dir and again.budget == job.budget
    assert all(folder in source.path.parents for source in (*again.calibration.sources, *again.evaluation.sources))
    for one, two in zip(stages_of(open_run(job)), stages_of(open_run(again)), strict=True):
        assert one.fields() == two.fields(), one.name


def test_text_that_is_too_large_stays_where_it_is(job_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tenp_dist.launch.submit._MAX_TEXT_BYTES", 10)
    job = job_files.load_job(job_file())
    pack(job, tmp_path)
    assert job_files.load_job(tmp_path / "job.yaml").calibration == job.calibration


BUSY = (500, "No available agent to submit job, please try again later.")  # as Ray 2.60 answers


@pytest.fixture
def job_server(monkeypatch):
    """job_server(*answers): the address of what answers Ray's job client; the last answer is given for ever."""
    servers = []

    def start(*answers: tuple[int, str]) -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # the version, and that every package is there already
                self.answer(200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": ""}))

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(*(left.pop(0) if len(left) > 1 else left[0]))

            def answer(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    monkeypatch.setattr("tenp_dist.launch.submit._PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("tenp_dist.launch.submit._AGENT_SECONDS", 1.0)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_address_that_is_given_is_the_one_that_is_used(scheme, variable, tenp, job_file, job_server, monkeypatch):
    wanted, other = (job_server((200, json.dumps({"job_id": None, "submission_id": name}))) for name in "ab")
    monkeypatch.setenv(variable, other)
    found = tenp("submit", job_file(), "--address", wanted.replace("http://", scheme), "--no-wait")
    assert found.exit_code == 0 and "Job:     a" in found.stderr
    assert f"env -u {variable} ray job status a --address {wanted}" in found.stderr
    found = tenp("submit", job_file(), "--no-wait")
    assert "Job:     b" in found.stderr and f"--address {other}" in found.stderr


def test_a_job_server_is_no_cluster(tenp, job_file, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    found = tenp("run", job_file(), ray=True)
    assert found.exit_code == ClusterError.exit_code and "HOST:6379" in found.stderr and "submit" in found.stderr


@pytest.mark.parametrize("given, mode", [("nothing", "None"), ("variable", "token"), ("file", "token"), ("off", "off")])
def test_a_token_that_is_there_is_used(given, mode, tmp_path):
    """Also where Ray was imported before: it reads the environment then."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    environment |= {"RAY_AUTH_TOKEN": "x"} if given in ("variable", "off") else {}
    environment |= {"RAY_AUTH_MODE": "off"} if given == "off" else {}
    if given == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
    early = "import ray; " if given == "variable" else ""
    late = "; from ray._raylet import get_authentication_mode as m; print(m())" if early else ""
    script = f"{early}import os; from tenp_dist.pool.ray_environment import use_token; use_token()"
    command = [sys.executable, "-c", f"{script}; print(os.environ.get('RAY_AUTH_MODE')){late}"]
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert said == [mode, *(["1"] if early else [])]  # 1: as Ray counts its modes, token


def test_a_node_that_is_not_ready_yet_is_waited_for(tenp, job_file, job_server):
    taken = (200, json.dumps({"job_id": None, "submission_id": "raysubmit_1"}))
    found = tenp("submit", job_file(), "--address", job_server(BUSY, BUSY, taken), "--no-wait")
    assert found.exit_code == 0, found.stderr
    said = found.stderr.splitlines()
    assert said[:2] == ["Waiting: no node is ready to start the job yet; again in 0.05 s"] * 2
    assert said[2].split() == ["Job:", "raysubmit_1"]


def test_nodes_that_are_never_ready_and_jobs_that_are_refused(tenp, job_file, job_server):
    found = tenp("submit", job_file(), "--address", job_server(BUSY), "--no-wait")
    assert found.exit_code == ClusterError.exit_code and 1 <= found.stderr.count("Waiting: ") <= 20
    assert "No node is ready to start the job" in found.stderr and "No available agent" in found.stderr
    assert "wanted: a node with a running agent in 1 seconds" in found.stderr
    found = tenp("submit", job_file(), "--address", job_server((400, "no such thing")), "--no-wait")
    assert found.exit_code == ClusterError.exit_code and "Waiting" not in found.stderr
    assert "The job server refuses the job" in found.stderr and "no such thing" in found.stderr


# status


def test_status_of_a_finished_run(tenp, job_file, tmp_path):
    assert tenp("run", job_file()).exit_code == 0
    shown = tenp("status", tmp_path / "run")
    assert shown.exit_code == 0 and "finished" in shown.stdout and "report/index.html" in shown.stdout
    status = json.loads(tenp("status", tmp_path / "run", "--json").stdout)
    assert status["state"] == "finished" and status["stage"] is None and status["retries"] == 0
    assert {name for name, state in status["stages"].items() if state == "done"} == set(ORDER)


def test_status_of_an_empty_and_of_a_missing_run(tenp, tmp_path):
    (tmp_path / "run").mkdir()
    assert read_status(tmp_path / "run", ORDER).state == "empty"
    missing = tenp("status", tmp_path / "nowhere")
    assert missing.exit_code == JobError.exit_code and "Run directory not found" in missing.stderr


def test_status_tells_of_losses_and_of_silence(tenp, job_file, tmp_path):
    run = tmp_path / "run"
    for stage in ("inspect", "calibrate"):
        assert tenp(stage, job_file()).exit_code == 0
    began = json.loads((run / "stages" / "progress.jsonl").read_text().splitlines()[-1])["time"]
    with open(run / "stages" / "progress.jsonl", "a") as stream:
        stream.write(json.dumps({"time": began + 1, "event": "started", "stage": "score"}) + "\n")
    with open(run / "stages" / "score.ledger.jsonl", "w") as stream:
        line = {"event": "lost", "time": began + 3, "worker": "Shard 0", "unit": "layers 0-1, wave 2", "error": "Gone"}
        stream.write(json.dumps(line) + '\n{"event": "unit", "ti')  # being written
    status = read_status(run, ORDER, now=began + 13)
    assert status.state == "running" and status.stage == "score" and status.news == pytest.approx(10)
    assert status.retries == 1 and "Gone" in status.last_error
    assert read_status(run, ORDER, now=began + 1000).state == "silent"
    shown = tenp("status", run).stdout
    assert "lost and started again: 1" in shown


def test_status_from_a_journal(tenp, job_file, tmp_path):
    run = tmp_path / "run"
    assert tenp("inspect", job_file()).exit_code == 0
    journal = [
        {"time": 10.0, "event": "finished", "stage": "inspect", "seconds": 1},
        {"time": 11.0, "event": "started", "stage": "score"},
        {"time": 12.0, "event": "progress", "stage": "score", "note": "layer 7, waves 0-3", "done": 30, "total": 120,
         "tokens_per_second": 500.0, "bytes_per_second": 2e9, "eta_seconds": 33.0, "retries": 2, "memory": [5, 9]},
    ]  # fmt: skip
    (run / "stages/progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    status = read_status(run, ORDER, now=13.0)
    assert (status.state, status.stage, status.layer, status.done) == ("running", "score", 7, 0.25)
    assert (status.eta_seconds, status.retries, status.memory) == (33.0, 2, (5, 9))
    journal[-1]["note"] = "2 shards at work"  # which layers, says the ledger
    (run / "stages/progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    unit = {"time": 11.5, "event": "unit", "shard": 1, "unit": "layers 8-9, wave 3"}
    (run / "stages" / "score.ledger.jsonl").write_text(json.dumps(unit) + "\n")
    status = read_status(run, ORDER, now=13.0)
    assert status.layer == 9 and status.note == "layers 8-9, wave 3, 2 shards at work"
    failed = {"time": 14.0, "event": "failed", "stage": "score", "error": "DiskFullError", "message": "No space left"}
    with open(run / "stages/progress.jsonl", "a") as stream:
        stream.write(json.dumps(failed) + "\n")
    status = read_status(run, ORDER, now=9999.0)
    assert status.state == "failed" and status.last_error == "No space left" and status.stages["score"] == "failed"


# job files and the rest of the folder


YARN = {
    "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
    "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
"""As Kimi-K2-Instruct's config.json has it."""


def test_kimi_is_deepseek_v3(tenp, job_file, tiny_model, tmp_path):
    """Kimi-K2's config names its own model_type and remote code; everything else is DeepSeek-V3's, yarn included."""
    import shutil

    from safetensors.numpy import load_file

    plain, model = (shutil.copytree(tiny_model("deepseek_v3"), tmp_path / name) for name in ("deepseek", "kimi"))
    values = json.loads((model / "config.json").read_text())
    values.pop("rope_parameters")  # published configs are older than this key
    values |= {"rope_scaling": YARN, "rope_theta": 50000.0}
    (plain / "config.json").write_text(json.dumps(values))
    values |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (model / "config.json").write_text(json.dumps(values))
    stock = tenp("run", job_file("stock.yaml", model=plain, run_dir="stock", output={"layouts": ["ragged", "padded"]}))
    assert stock.exit_code == 0, stock.stderr
    found = tenp("run", job_file(model=model, output={"layouts": ["ragged", "padded"]}))
    assert found.exit_code == 0, found.stderr
    plans = [load_file(tmp_path / run / "plan.safetensors") for run in ("run", "stock")]
    assert plans[0].keys() == plans[1].keys() and all((plans[0][name] == plans[1][name]).all() for name in plans[0])
    for layout, model_type in (("ragged", "tenp_deepseek_v3"), ("padded", "deepseek_v3")):
        written = json.loads((tmp_path / "run" / "checkpoint" / layout / "config.json").read_text())
        assert written["model_type"] == model_type and "configuration_deepseek" not in str(written)


def test_box_script_is_valid_bash():
    subprocess.run(["bash", "-n", ROOT / "scripts" / "slurm-in-a-box"], check=True)
    subprocess.run(["bash", "-n", SHIPPED], check=True)
