"""Is this machine ready? One finding per line, each with a fix where something is wrong. Changes nothing.

`examine` runs on any node: the command line calls it here, or on every node of a cluster.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenp_dist.artifacts import free_bytes
from tenp_dist.errors import first_line
from tenp_dist.pool.machine import own_address
from tenp_dist.pool.ray_environment import ray_folder, unfit

Verdict = Literal["ok", "warning", "failed"]

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
_BLOCK = 64 * 2**20  # bytes written to measure a disk


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    what: that was looked at.
    verdict: whether a run would bear it.
    found: what was there.
    fix: what to do where the verdict is not ok.
    """

    what: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(run_dir: Path) -> list[Finding]:
    """All findings about the machine that this runs on. run_dir: where a run would write; need not exist."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _accelerators,
        _collectives,
        _compiler,
        _shared_memory,
        lambda: _disk(run_dir),
        _temporary,
        _open_files,
        _ports,
        lambda: environment_traps(os.environ),
    )
    return [finding for check in checks for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        name = getattr(check, "__name__", "check").strip("_")
        return [Finding(name, "failed", f"{type(error).__name__}: {first_line(error)}", "repair the installation")]


def _python() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        "Python", "ok" if good else "failed", f"{platform.python_version()}, {sys.executable}", "use 3.11 to 3.13"
    )


def _packages() -> Iterator[Finding]:
    """Every requirement of this package against what is installed."""
    from packaging.requirements import Requirement

    wrong, shown = [], []
    for line in importlib.metadata.requires("tenp-dist") or []:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version}, wanted {wanted.specifier or 'any'}")
        elif wanted.name in ("torch", "transformers", "ray", "deepspeed"):
            shown.append(f"{wanted.name} {version}")
    fix = "pip install the versions named, on every node; ./scripts/setup does it in .venv"
    yield Finding("Packages", "failed" if wrong else "ok", "; ".join(wrong or shown), fix)


def _accelerators() -> Iterator[Finding]:
    import torch

    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = [torch.cuda.get_device_properties(i) for i in range(count)]
        memory = min(device.total_memory for device in names) / 1e9
        yield Finding("Accelerators", "ok", f"{count} x {names[0].name}, {memory:.0f} GB")
    elif devices:
        build = torch.version.cuda or "none, a CPU build"
        found = f"{len(devices)} GPU in /dev that torch {torch.__version__} does not see (CUDA of the build: {build})"
        fix = "install a CUDA build of torch that the driver supports; check CUDA_VISIBLE_DEVICES and nvidia-smi"
        yield Finding("Accelerators", "failed", found, fix)
    else:
        yield Finding("Accelerators", "ok", f"none; CPU with {os.cpu_count()} cores")


def _collectives() -> Iterator[Finding]:
    """A sum in a group of one: over NCCL where there are accelerators, else over gloo."""
    import torch
    from torch import distributed

    if torch.cuda.is_available() and not distributed.is_nccl_available():
        yield Finding("NCCL", "failed", "not in this build of torch", "install a CUDA build of torch")
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = distributed.HashStore()
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        value = torch.ones(2, device="cuda" if backend == "nccl" else "cpu")
        distributed.all_reduce(value)
    finally:
        distributed.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else "works"
    yield Finding("NCCL" if backend == "nccl" else backend, "ok", version)


def _compiler() -> Iterator[Finding]:
    beside = Path(sys.executable).parent  # pip puts ninja there
    absent = [name for name in ("gcc", "g++", "ninja") if not (shutil.which(name) or (beside / name).exists())]
    fix = "install them (Debian: apt install build-essential ninja-build): DeepSpeed compiles with them at first use"
    verdict: Verdict = "warning" if absent else "ok"
    yield Finding("Compiler", verdict, f"no {', '.join(absent)}" if absent else "gcc, ninja", fix)


def _shared_memory() -> Iterator[Finding]:
    total = shutil.disk_usage("/dev/shm").total
    verdict: Verdict = "ok" if total >= 2**30 else "warning" if total > 128 * 2**20 else "failed"
    fix = "give the container more: docker run --shm-size=8g, or a memory-backed emptyDir at /dev/shm in Kubernetes"
    yield Finding("Shared memory", verdict, f"{total / 1e9:.1f} GB in /dev/shm", fix)


def _disk(run_dir: Path) -> Iterator[Finding]:
    """Space, and the rate of one synced write, where a run would write."""
    free = free_bytes(run_dir)
    verdict: Verdict = "ok" if free >= 20e9 else "warning" if free >= 1e9 else "failed"
    fix = "free space, or point run_dir at a larger file system; `tenp-dist run` knows what a job needs"
    yield Finding("Disk space", verdict, f"{free / 1e9:,.1f} GB free at {run_dir}", fix)
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    probe = folder / f".doctor-{os.getpid()}"
    block, started = os.urandom(2**20), time.monotonic()
    try:
        with open(probe, "wb") as stream:
            for _ in range(min(_BLOCK, free // 2) // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            rate = stream.tell() / (time.monotonic() - started) / 1e6
    except OSError as error:
        fix = "check its permissions, or choose another run_dir"
        yield Finding("Disk writes", "failed", f"{error.strerror}: {folder}", fix)
        return
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    slow = "use a faster file system for run_dir: a checkpoint takes its bytes over this rate"
    yield Finding("Disk writes", "ok" if rate >= 50 else "warning", f"{rate:,.0f} MB/s, one writer, synced", slow)


def _temporary() -> Iterator[Finding]:
    folder = ray_folder()
    why = unfit(folder)
    if why:
        fix = "set RAY_TMPDIR to a shorter, plain path on the node's own disk"
        stands = "RAY_TMPDIR" in os.environ  # a local run of ours takes /tmp in place of such a TMPDIR
        yield Finding("Ray's folder", "failed" if stands else "warning", f"{folder} {why}", fix)
        if stands:
            return
        folder = Path("/tmp")
    free = free_bytes(folder)
    fix = "free space there, or set RAY_TMPDIR; Ray stops working on a disk that is 95 % full"
    used = 1 - free / max(1, shutil.disk_usage(folder if folder.is_dir() else "/").total)
    verdict: Verdict = "failed" if used > 0.95 else "warning" if free < 5e9 else "ok"
    yield Finding("Ray's folder", verdict, f"{folder}, {free / 1e9:,.1f} GB free", fix)


def _open_files() -> Iterator[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict: Verdict = "ok" if soft >= 4096 else "warning"
    yield Finding("Open files", verdict, f"{soft} (hard limit {hard})", "ulimit -n 65536 before `ray start`")


def _ports() -> Iterator[Finding]:
    """Whether this machine can talk to itself by the address that other nodes would use."""
    own = own_address()
    try:
        with socket.create_server((own, 0)) as server:
            socket.create_connection(server.getsockname(), 3).close()
    except OSError as error:
        fix = "open the firewall between the nodes, for all ports above 1024 (Ray picks them freely)"
        yield Finding("Ports", "failed", f"{own} does not answer itself: {first_line(error)}", fix)
        return
    used = [port for port in (6379, 8265) if _listens(port)]
    fix = "another Ray runs here: stop it, or start yours with --port and --dashboard-port"
    found = f"{own} answers" + (f"; somebody listens on {' and '.join(map(str, used))}" if used else "")
    yield Finding("Ports", "warning" if used else "ok", found, fix)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment_traps(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that make a run fail or crawl for no visible reason; one line each, or one for none."""
    traps = list(_traps(environment))
    yield from traps or [Finding("Environment", "ok", "no known traps")]


def _traps(environment: Mapping[str, str]) -> Iterator[Finding]:
    left = [name for name in _LAUNCHER if name in environment]
    if left:
        fix = f"unset {' '.join(left)}: ranks get their own; DeepSpeed crashes where LOCAL_SIZE and the others disagree"
        yield Finding("Environment", "failed", f"{', '.join(left)}: left by another launcher", fix)
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("Environment", "warning", "CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    if any(environment.get(name) for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy")) and not any(
        environment.get(name) for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy")
    ):
        fix = "set no_proxy to the nodes' addresses: Ray's own traffic would go through the proxy"
        yield Finding("Environment", "failed", "a proxy without no_proxy", fix)
    if environment.get("OMP_NUM_THREADS") == "1" and (os.cpu_count() or 1) > 1:
        fix = "unset OMP_NUM_THREADS: a rank sets its own threads, the driver stays slow"
        yield Finding("Environment", "warning", "OMP_NUM_THREADS=1", fix)
