"""vLLM in an environment of its own, and what its engines answer (`engine_worker.py` runs there)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from helpers.served_families import VOCABULARY

HELPERS = Path(__file__).parent
TOLERANCE = 1e-5
PROMPTS = torch.randint(2, VOCABULARY, (3, 48), generator=torch.Generator().manual_seed(3)).tolist()
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that asks
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Python of vLLM's environment, made first if need be. A failure to make it fails the tests."""
    done = subprocess.run(
        [ROOT / "scripts/setup-vllm"], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"scripts/setup-vllm failed:\n{done.stderr}"
    return Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin/python"


@pytest.fixture(scope="session")
def engine_environment(tmp_path_factory) -> dict[str, str]:
    """Variables of every engine; all share a folder for what vLLM caches."""
    return QUIET | {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache"))}


@pytest.fixture(scope="session")
def ask(vllm_python, engine_environment, tmp_path_factory):
    """ask(runs, prompts) -> per run what `engine_worker.py` found; one process, `variables` go into its environment."""

    def start(runs: list[dict], prompts: list[list[int]], **variables: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("engine")
        job, out = folder / "job.json", folder / "out.json"
        job.write_text(json.dumps({"prompts": prompts, "runs": runs}))
        environment = os.environ | engine_environment | {"PYTHONPATH": str(HELPERS)} | variables
        command = [vllm_python, HELPERS / "engine_worker.py", job, out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(out.read_text())

    return start


@pytest.fixture(scope="session")
def answers(ask):
    """answers({name: (folder, settings)}) -> name -> what was found, engine after engine in one process."""

    def start(runs: dict[str, tuple], **variables: str) -> dict[str, dict]:
        given = [{"folder": str(folder), "settings": settings} for folder, settings in runs.values()]
        return dict(zip(runs, ask(given, PROMPTS, **variables), strict=True))

    return start


def agrees(found: dict, wanted: dict) -> None:
    """Log-probabilities of two engines within `TOLERANCE`, and their tokens."""
    assert "error" not in found, found["error"]
    assert "error" not in wanted, wanted["error"]
    off = (torch.tensor(found["logprobs"]) - torch.tensor(wanted["logprobs"])).abs().max().item()
    assert off < TOLERANCE and found["tokens"] == wanted["tokens"], off
