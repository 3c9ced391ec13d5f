"""The house itself: import directions, short files, documented options, loadable jobs, instant help."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tenp_dist.cli import launch
from tenp_dist.cli.main import cli
from tenp_dist.config import Job
from tenp_dist.job_file import load_job
from tenp_dist.pipeline.names import EXAMPLES, STAGES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tenp_dist"
ROOMS = [
    "errors", "artifacts", "config", "job_file", "checkpoint", "model", "calibration", "scoring", "budget", "engine",
    "runtime", "evaluation", "report", "launch", "cli",
]  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "ray", "deepspeed", "datasets", "matplotlib")


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tenp_dist" and len(parts) > 1 else None


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_upwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    below = {
        module
        for module in imports_of(path)
        if (room := room_of(module)) in ROOMS and ROOMS.index(room) > ROOMS.index(own)
    }
    assert not below, f"{own} may import only from the rooms above it"


def test_ray_is_imported_only_where_work_runs():
    """And its job client, which runs where no cluster is, by the one that submits jobs."""
    importers = {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if any(module.split(".")[0] == "ray" for module in imports_of(path))
    }
    pool = {f"pool/ray_{name}.py" for name in ("client", "metrics", "nodes", "placement", "results")}
    assert importers == pool | {"launch/submit.py"}


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom tenp_dist.cli.main import cli\n"
        "assert CliRunner().invoke(cli, ['run', '--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_every_command_has_help_an_example_and_a_readme_mention():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"run", *STAGES} == set(EXAMPLES) and set(cli.commands) == {*EXAMPLES, *launch.EXAMPLES}
    for name, command in cli.commands.items():
        assert f"tenp-dist {name}" in readme, f"README does not show `tenp-dist {name}`"
        assert f"  tenp-dist {name}" in command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name} has no help"
                assert max(parameter.opts, key=len) in readme, f"README does not explain {parameter.opts}"


def fields_of(model, prefix=""):
    """Every key of the job file, lists of parts included, as `part.key`."""
    for name, field in model.model_fields.items():
        part = next(
            (
                item
                for item in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if hasattr(item, "model_fields")
            ),
            None,
        )
        yield prefix + name, field, part
        if part is not None:
            yield from fields_of(part, f"{prefix}{name}.")


def test_every_job_key_is_described_and_in_the_reference():
    reference = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    for key, field, part in fields_of(Job):
        assert part is not None or field.description, f"{key} has no description"
        assert f"`{key.split('.')[-1]}`" in reference, f"jobs/README.md does not explain {key}"


JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_job_files_load(path):
    job = load_job(path)
    assert job.run_dir.is_absolute() and job.model.is_absolute()


def test_there_are_job_files():
    assert ROOT / "jobs" / "quickstart.yaml" in JOBS


def test_no_traces_of_pickle():
    """Only safetensors is read: no torch.load, no pickle in the package."""
    for path in SOURCES:
        modules = imports_of(path)
        assert not modules & {"pickle", "joblib", "torch.load"}, path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path
