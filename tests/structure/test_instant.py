"""Commands that a person waits for import nothing heavy: help, and the status of a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.paths import ROOT

HEAVY = (
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "datasets",
    "matplotlib",
    "numpy",
    "pyarrow",
    "huggingface_hub",
    "fsspec",
)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["status", "RUN"], ["status", "RUN", "--json"]])
def test_nothing_heavy_is_imported(words, tmp_path):
    words = [str(tmp_path) if word == "RUN" else word for word in words]
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom tenp_dist.cli.main import cli\n"
        f"assert CliRunner().invoke(cli, {words}).exit_code == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_package_alone_imports_nothing_heavy():
    script = f"import sys, tenp_dist\nprint([name for name in {HEAVY} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
