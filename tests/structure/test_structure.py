"""The house itself: documented commands and keys, loadable jobs, no pickle."""

from __future__ import annotations

import click
import pytest

from helpers.paths import ROOT
from helpers.source_files import SOURCES, imports_of
from tenp_dist.cli import launch
from tenp_dist.cli.main import cli
from tenp_dist.config import Job
from tenp_dist.job_file import load_job
from tenp_dist.pipeline.names import STAGE_NAMES


def test_every_command_has_help_an_example_and_a_readme_mention():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(cli.commands) == {"run", "estimate", "rank-experts", *STAGE_NAMES, *launch.EXAMPLES}
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
