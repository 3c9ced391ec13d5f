"""Job files, the texts that they name, the command line that runs them in this process, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.models import documents


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> dict[str, Path]:
    """Domain -> jsonl file with a `text` column."""
    folder = tmp_path_factory.mktemp("text")
    files = {}
    for i, domain in enumerate(("prose", "sums")):
        files[domain] = folder / f"{domain}.jsonl"
        files[domain].write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(i)))
    return files


@pytest.fixture
def job_file(tmp_path, tiny_model, text_files):
    """job_file(**parts) -> path of a YAML job in tmp_path; parts replace top-level keys, None leaves one out."""

    def write(name: str = "job.yaml", **parts) -> Path:
        sources = [{"path": str(path), "domain": domain, "samples": 4} for domain, path in text_files.items()]
        job = {
            "model": str(parts.pop("model", None) or tiny_model()),
            "run_dir": "run",
            "calibration": {"sources": sources, "sequence_length": 32},
            "budget": {"retention": 0.6, "important": 0.2},
            "output": {"shard_size": "100KB"},
        } | parts
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in job.items() if value is not None}))
        return path

    return write


@pytest.fixture
def tenp():
    """tenp(*arguments) -> exit_code, stdout, stderr, exception of the real command line; no Ray unless ray=True."""
    import signal

    from click.testing import CliRunner

    from tenp_dist.cli.main import cli
    from tenp_dist.pool.in_process import InProcessPool

    handler = signal.getsignal(signal.SIGTERM)

    def invoke(*arguments, ray: bool = False) -> SimpleNamespace:
        here = None if ray else lambda: InProcessPool(cores=1)  # one core: threads cost more than they do
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments], obj=here)
        return SimpleNamespace(
            exit_code=result.exit_code, stdout=result.stdout, stderr=result.stderr, exception=result.exception
        )

    yield invoke
    signal.signal(signal.SIGTERM, handler)


def evaluation(text_files, samples=3):
    sources = [{"path": str(path), "domain": domain, "samples": samples} for domain, path in text_files.items()]
    return {"sources": sources, "sequence_length": 32, "seed": 1}


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything a run wrote except the run's own records (they hold rates) and the report of them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parts[len(folder.parts)] not in ("stages", "report") and path.name != "README.md"
    }


def measured(result) -> dict:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["stages"]["evaluate"]


AUTO = {"retention": 0.6, "important": "auto", "slope": "auto"}
