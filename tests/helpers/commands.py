"""Real `tenp-dist` processes: what they are started with, what is waited for, and the bytes that they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

COMMAND = Path(sys.executable).with_name("tenp-dist")
RAY = Path(sys.executable).with_name("ray")
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1"}  # idle threads do not spin: the cores are shared
PARTS = ("scores", "plan.json", "plan.safetensors", "checkpoint")


def bytes_of(run: Path, *parts: str) -> dict[str, bytes]:
    """Relative path -> content of every file in these parts of a run directory."""
    files = [path for part in parts for path in (run / part, *(run / part).rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def finish(process: subprocess.Popen, code: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert "(raylet)" not in f"{stdout}{stderr}", "Ray's own messages among ours"
    return stderr


def wait_for(process: subprocess.Popen, ready) -> None:
    limit = time.monotonic() + 90
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "does not get so far"
        time.sleep(0.002)


def ledger(run: Path, event: str, stage: str = "score") -> list[dict]:
    path = run / "stages" / f"{stage}.ledger.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def scoring(run: Path, units: int = 4):
    return lambda: len(ledger(run, "unit")) >= units


@contextlib.contextmanager
def stopped(process: subprocess.Popen):
    """The driver stands still meanwhile: whatever is killed is killed in the middle of the run."""
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


def kill(*processes: psutil.Process) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def same_bytes(run: Path, reference: Path, parts: Sequence[str] = PARTS) -> None:
    for part in parts:
        assert bytes_of(run, part) == bytes_of(reference, part) != {}, part


def call(*words, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """A command in an environment without a cluster in it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "TENP_RUNS")}
    words = [str(word) for word in words]
    return subprocess.run(
        words, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=500, check=False
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
