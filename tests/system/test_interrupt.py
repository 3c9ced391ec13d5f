"""A real run on Ray, stopped in the middle of scoring and of writing, ends with the bytes of an undisturbed one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from helpers.commands import COMMAND, QUIET, bytes_of
from tenp_dist.errors import Interrupted


def start(job, run, *options):
    return subprocess.Popen(
        [COMMAND, "run", job, "--run-dir", run, *options],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def stop(process, path, send):
    """Signal the run once `path` is there; exit code and standard error."""
    limit = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, f"{path} does not appear"
        time.sleep(0.002)
    send(process)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def identity(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def interrupted(code, stderr):
    assert code == Interrupted.exit_code == 130, stderr
    assert "Error: Interrupted" in stderr and "run the same command again" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_interrupt_terminate_and_kill_then_the_same_bytes(job_file, text_files, tmp_path):
    sources = [{"path": str(path), "domain": name, "samples": 10} for name, path in text_files.items()]
    job = job_file(
        calibration={"sources": sources, "sequence_length": 256},
        output={"shard_size": "8KB"},
        cluster={"writers": 1},
        score={"batch_tokens": 256},
    )
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    process = start(job, undisturbed, "--debug")  # in one process, without Ray
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr

    first = run / "scores" / "layer_00001.safetensors"
    code, stderr = stop(start(job, run), first, lambda process: os.killpg(process.pid, signal.SIGINT))
    interrupted(code, stderr)
    assert (run / "stages" / "calibrate.json").exists() and not (run / "stages" / "score.json").exists()
    scored = identity(first)

    folder = run / "checkpoint" / "ragged"
    shards = sorted(path.name for path in (undisturbed / "checkpoint" / "ragged").glob("*.safetensors"))
    code, stderr = stop(start(job, run), folder / shards[0], lambda process: os.kill(process.pid, signal.SIGTERM))
    interrupted(code, stderr)
    assert stderr.count("already done") == 2 and identity(first) == scored
    assert (run / "stages" / "plan.json").exists() and not (run / "stages" / "write.json").exists()
    written = identity(folder / shards[0])

    last = next(name for name in shards if not (folder / name).exists())
    code, _ = stop(start(job, run), folder / last, lambda process: os.kill(process.pid, signal.SIGKILL))
    assert code == -signal.SIGKILL and not (run / "stages" / "write.json").exists()
    assert not (folder / "config.json").exists(), "a checkpoint exists once it has its config"

    process = start(job, run)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert identity(first) == scored and identity(folder / shards[0]) == written, "complete files are not made again"
    parts = ("calibration", "scores", "plan.json", "plan.safetensors", "checkpoint")
    for part in parts:
        assert bytes_of(run, part) == bytes_of(undisturbed, part) != {}, part
    shutil.rmtree(run)


def test_a_signal_where_python_lets_no_exception_out_is_not_lost(tmp_path):
    """In the callback of a weak reference, which prints what is raised there and goes on."""
    script = """
import os, signal, time, weakref
from tenp_dist.cli.outcome import exit_on_error

class Thing:
    pass

with exit_on_error():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.01)])
    del thing
    for _ in range(100):
        time.sleep(0.05)
    print("went on")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (Interrupted.exit_code, "")
    assert ended.stderr.startswith("Error: Interrupted") and "Traceback" not in ended.stderr
