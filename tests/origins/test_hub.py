"""Models of the Hub, against a stand-in of its interface that counts what it serves."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import yaml

from helpers.checkpoints import change_config
from helpers.jobs import files_of
from helpers.paths import ROOT
from helpers.refusals import refused
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import ClusterError, DiskFullError, SourceError
from tenp_dist.job_file import build_job, load_job
from tenp_dist.origins import origin as origins
from tenp_dist.origins.hub import open_hub
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.preflight import node_checks
from tenp_dist.stages.run import open_run

NAME = "org/tiny"
MODEL = ROOT / "jobs" / "quickstart" / "moe-4m"


def header_bytes(folder: Path) -> int:
    """Length prefixes and headers of all files of weights."""
    files = folder.glob("*.safetensors")
    return sum(8 + struct.unpack("<Q", path.read_bytes()[:8])[0] for path in files)


def other_weights(folder: Path, target: Path) -> Path:
    """A copy whose weights differ in their last byte: same config, headers and sizes."""
    shutil.copytree(folder, target)
    path = sorted(target.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return target


@pytest.fixture
def tiny(hub) -> Path:
    """The quickstart's model, 8 MB in three files, on the Hub."""
    hub.publish(NAME, MODEL)
    return MODEL


@pytest.mark.parametrize("first", [8, 1000, 100_000])
def test_headers_alone_are_read_to_open_a_model(hub, tiny, monkeypatch, first):
    """As many bytes as length and header have, or as are read at once where that is more; the same source is seen."""
    monkeypatch.setattr(origins, "_FIRST_BYTES", first)
    found = open_hub(NAME).open()
    here = open_source(tiny)
    assert found.fingerprint == here.fingerprint and found.index.tensors == here.index.tensors
    assert found.facts.plain() | {"model": ""} == here.facts.plain() | {"model": ""} and found.facts.model == NAME
    sizes = [path.stat().st_size for path in tiny.glob("*.safetensors")]
    if first == 8:
        assert hub.weights_served() == header_bytes(tiny) < sum(sizes) / 5
    else:
        assert hub.weights_served() <= sum(min(first, size) for size in sizes) + header_bytes(tiny)
    assert not found.complete and not list(found.folder.glob("*.safetensors"))


def test_inspect_and_estimate_bring_no_weights(hub, tiny, tenp, job_file, tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "_FIRST_BYTES", 8)
    job = job_file(model=NAME)
    machines = tmp_path / "machines.yaml"
    given = {"cores": 4, "host_memory": "10GB", "read": "1MB", "write": "1MB", "flops": 1e9, "start": 0}
    machines.write_text(yaml.safe_dump(given))
    for words in (("inspect", job), ("estimate", job, "--cluster", machines)):
        hub.forget()
        done = tenp(*words)
        assert done.exit_code == 0, done.stderr
        assert hub.weights_served() == header_bytes(tiny)
    assert json.loads((tmp_path / "run" / "source.json").read_text()) == {
        "model": NAME, "version": hub.repositories[NAME].branches["main"],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.beside
def test_a_run_is_that_of_the_same_folder(hub, tiny, tenp, job_file, tmp_path):
    """Files beside the weights that nobody reads stay where they are."""
    more = shutil.copytree(tiny, tmp_path / "more")
    for unread in ("pytorch_model.bin", "consolidated.safetensors", "tiny.gguf", "README.md"):
        (more / unread).write_bytes(b"unread")
    (more / "LICENSE").write_text("licence")
    hub.publish(NAME, more)
    for model, where in ((NAME, "hub-run"), (more, "folder-run")):
        done = tenp("run", job_file(model=str(model)), "--run-dir", tmp_path / where)
        assert done.exit_code == 0, done.stderr
    own, theirs = (files_of(tmp_path / run / "checkpoint") for run in ("hub-run", "folder-run"))
    assert own.keys() == theirs.keys() and {name for name in own if own[name] != theirs[name]} == set()
    assert "ragged/LICENSE" in own
    assert not {"pytorch_model.bin", "consolidated.safetensors", "tiny.gguf"} & set(hub.served)
    commit = hub.repositories[NAME].branches["main"]
    report = json.loads((tmp_path / "hub-run" / "report" / "report.json").read_text())
    assert report["provenance"]["stages"]["fetch"]["summary"]["version"] == commit
    card = (tmp_path / "hub-run" / "checkpoint" / "ragged" / "README.md").read_text()
    assert f"base_model: {NAME}" in card and f"| source version | `{commit}` |" in card


def test_a_download_that_broke_goes_on_with_what_is_missing(hub, tiny, tenp, job_file):
    job, last = job_file(model=NAME), sorted(path.name for path in tiny.glob("*.safetensors"))[-1]
    assert tenp("inspect", job).exit_code == 0
    hub.broken.add(last)
    refused(tenp("fetch", job), "SourceError", "does not answer as it should", "status 400", "goes on")
    hub.broken.clear()
    hub.forget()
    done = tenp("fetch", job, "--json")
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in tiny.glob("*.safetensors") if hub.served[path.name] >= path.stat().st_size} == {last}
    assert json.loads(done.stdout)["stages"]["fetch"]["downloaded"] == (tiny / last).stat().st_size


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, tiny, tenp, job_file, monkeypatch):
    """The same file in the same process: the rest of it is asked for by a range."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    job, last = job_file(model=NAME), sorted(path.name for path in tiny.glob("*.safetensors"))[-1]
    assert tenp("inspect", job).exit_code == 0
    hub.forget()
    hub.cut_after[last] = 200_000
    assert tenp("fetch", job).exit_code == 0
    assert hub.served[last] == origins._FIRST_BYTES + (tiny / last).stat().st_size
    assert sum(line.startswith("GET") and line.endswith(last) for line in hub.asked) == 3, "header, two parts"


def test_a_run_stays_with_the_commit_that_it_began_with(hub, tiny, tenp, job_file, tmp_path):
    job = job_file(model=NAME)
    first = hub.repositories[NAME].branches["main"]
    assert tenp("inspect", job).exit_code == 0
    moved = hub.publish(NAME, other_weights(tiny, tmp_path / "moved"))
    assert tenp("fetch", job).exit_code == 0
    run = open_run(load_job(job))
    assert run.model.name == first and run.source.complete
    assert all((run.model / path.name).read_bytes() == path.read_bytes() for path in tiny.glob("*.safetensors"))
    assert open_run(load_job(job, run_dir=tmp_path / "other")).model.name == moved
    refused(tenp("inspect", job, "--set", f"model={NAME}@{moved}"), "OutputError", "other settings", "version")
    done = tenp("inspect", job, "--set", f"model={NAME}@{moved}", "--overwrite")
    assert done.exit_code == 0, done.stderr


def test_weights_that_were_removed_from_the_cache_come_again(hub, tiny, tenp, job_file):
    job = job_file(model=NAME)
    for stage in ("inspect", "fetch", "calibrate"):
        assert tenp(stage, job).exit_code == 0
    for path in open_run(load_job(job)).model.glob("*.safetensors"):
        path.resolve().unlink()
        path.unlink()
    refused(tenp("score", job), "StaleError", "`fetch` brought is not there", "run `tenp-dist fetch`")
    hub.forget()
    assert tenp("fetch", job).exit_code == 0 and open_run(load_job(job)).source.complete
    sizes = [path.stat().st_size for path in tiny.glob("*.safetensors")]
    assert hub.weights_served() == sum(sizes) + origins._FIRST_BYTES * len(sizes), "headers, then all of it"


def test_what_is_in_the_cache_needs_no_network(hub, tiny, tenp, job_file, monkeypatch):
    job = job_file(model=NAME)
    assert tenp("inspect", job).exit_code == tenp("fetch", job).exit_code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.forget()
    assert open_run(load_job(job)).source.complete and open_hub(NAME).open().complete
    assert tenp("inspect", job).exit_code == tenp("fetch", job).exit_code == 0 and not hub.asked


def test_a_model_cache_of_the_job(hub, tiny, tenp, job_file, tmp_path):
    job = job_file(model=f"{NAME}@main", model_cache="own")
    assert tenp("inspect", job).exit_code == tenp("fetch", job).exit_code == 0
    assert open_run(load_job(job)).model.is_relative_to(tmp_path / "own") and not (tmp_path / "hub").exists()


def private(hub):
    hub.repositories[NAME].token = "hf_right"


def gated(hub):
    hub.repositories[NAME].token, hub.repositories[NAME].gated = "hf_right", True


CASES = {
    "not there": (
        lambda hub: hub.repositories.clear(),
        None,
        NAME,
        ("neither a folder", "no token is set", "HF_TOKEN"),
    ),
    "private": (private, None, NAME, ("neither a folder", "no token is set", "hf auth login")),
    "another's token": (private, "hf_wrong", NAME, ("neither a folder", "a token is set")),
    "gated": (gated, None, NAME, ("gated", "no token", "accept its terms")),
    "gated for this token": (gated, "hf_wrong", NAME, ("gated", "a token without access")),
    "no such revision": (lambda hub: None, None, f"{NAME}@v9", ("no such revision", "v9", "/org/tiny/commits")),
    "broken": (lambda hub: hub.broken.add("config.json"), None, NAME, ("does not answer", "status 400")),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_seen(case, hub, tiny, tenp, job_file, monkeypatch, tmp_path):
    spoil, token, name, said = CASES[case]
    spoil(hub)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    refused(tenp("inspect", job_file(model=name)), "SourceError", *said)
    assert not (tmp_path / "run").exists()


def test_the_right_token(hub, tiny, monkeypatch):
    private(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert open_hub(NAME).open().facts.num_experts == open_source(tiny).facts.num_experts


def test_no_network(hub, tiny, tenp, job_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(tenp("inspect", job_file(model=NAME)), "SourceError", "cannot be reached", "127.0.0.1:9", "HF_ENDPOINT")


def test_offline(hub, tiny, tenp, job_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = ("no folder of that name", "HF_HUB_OFFLINE is set", "hf download org/tiny --revision main")
    refused(tenp("inspect", job_file(model=f"{NAME}@main")), "SourceError", *said)
    assert not hub.asked


def test_no_room(hub, tiny, tenp, job_file, monkeypatch):
    job = job_file(model=NAME)
    assert tenp("inspect", job).exit_code == 0
    monkeypatch.setattr(origins, "free_bytes", lambda folder: 1000)
    refused(tenp("fetch", job), "DiskFullError", "Not enough space for the model", "8.5 MB", "model_cache")


def test_no_room_in_the_end(hub, tiny, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DiskFullError, match="No space left for the model"):
        open_hub(NAME)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "tiny.gguf"])
def test_no_safetensors(hub, tiny, tmp_path, weights):
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    (folder / weights).write_bytes(b"weights")
    hub.publish("org/other", folder)
    with pytest.raises(SourceError, match="No safetensors among") as error:
        open_hub("org/other").open()
    assert weights in error.value.found


def test_a_shard_that_the_repository_lacks(hub, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "cut")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    hub.publish("org/cut", folder)
    with pytest.raises(SourceError, match="shard is missing") as error:
        open_hub("org/cut").open()
    assert error.value.wanted == last.name


def test_headers_show_a_fault_before_anything_is_downloaded(hub, tiny, tenp, job_file, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "wrong")
    change_config(folder, n_routed_experts=1000)
    hub.publish("org/wrong", folder)
    done = tenp("run", job_file(model="org/wrong"))
    assert done.exit_code in (3, 4), done.stderr
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_nodes_are_asked_before_the_download(hub, tiny, job_file):
    """They see the small files: the same folder, which the weights come to."""

    class Elsewhere(InProcessPool):
        def each_node(self, function, model, *rest):
            return {"far": function(Path("/nowhere") / model.name, *rest)}

    job = load_job(job_file(model=NAME))
    job.run_dir.mkdir()
    run = open_run(job)
    node_checks.check_nodes(InProcessPool(cores=1), run.job, run.source)
    with pytest.raises(ClusterError, match="does not see the model") as error:
        node_checks.check_nodes(Elsewhere(cores=1), run.job, run.source)
    assert "HF_HOME" in error.value.next_step


@pytest.mark.slow
@pytest.mark.beside
def test_compare_takes_names(hub, tiny, tenp, tmp_path):
    (tmp_path / "prompts.txt").write_text("the expert routes\n")
    done = tenp("compare", NAME, tiny, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", "4", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["same"] == 1


@pytest.mark.parametrize(
    ("model", "is_name"),
    [
        ("org/name", True), ("org/name@v1.0", True), ("org/na.me-2@refs/pr/3", True), ("s3://bucket/a/b", True),
        ("name", False), ("./org/name", False), ("../org", False), ("org/..", False), ("a/b/c", False),
        ("/org/name", False), ("~/name", False), ("org/a--b", False), ("org/name@", False), ("here/folder", False),
    ],
)  # fmt: skip
def test_names_and_folders(model, is_name, tmp_path):
    """A folder that is there is meant before a repository of its name."""
    (tmp_path / "here" / "folder").mkdir(parents=True)
    sources = {"sources": [{"path": "x.jsonl", "domain": "x"}]}
    job = build_job({"model": model, "run_dir": "run", "calibration": sources}, base=tmp_path)
    assert (job.model == model) == is_name and (is_name or job.model.is_absolute())
