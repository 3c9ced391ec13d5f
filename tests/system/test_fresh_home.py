"""cluster/README.md word by word, in its order, by somebody whose HOME is empty and whose folders are odd."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from helpers.commands import COMMAND, QUIET, free_port
from helpers.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAMS = ("tenp-dist", "ray", "python", "export")
NOT_HERE = ("ray up cluster/ray/cluster.yaml", "ray job submit")  # needs several machines; a name in a sentence
SMALL = ("--num-cpus", "1", "--object-store-memory", str(80 * 2**20))
ODD = "ein 'Ordner' mit Ünïcode & Lücken"
LONG = ODD + " " + "lang" * 20


def section(title: str) -> list[str]:
    """The commands of a section of the page as they stand there, indented or in the text, in their order."""
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    (inside,) = re.findall(rf"^## {title}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^ {4}(\S.*)$|`([^`]+)`", inside, re.MULTILINE)
    lines = (indented or " ".join(inline.split()) for indented, inline in found)
    commands = [line for line in lines if (line.split()[0] in PROGRAMS and len(line.split()) > 2) or "export " in line]
    return [line for line in commands if line not in NOT_HERE]


class User:
    """Somebody at a machine.

    home: an empty folder, but for what the commands put there.
    variables: what was exported so far.
    """

    def __init__(self, home: Path, **variables: str):
        home.mkdir(parents=True)
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TENP_", "HF_"))}
        path = f"{COMMAND.parent}:{os.environ['PATH']}"
        shell = {"HOME": str(home), "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
        self.variables = {**kept, **QUIET, **shell, **variables}

    def give(self, command: str, cwd: Path) -> str:
        """Its output; exports stay."""
        words = shlex.split(command)
        if words[0] == "export":
            self.variables |= dict(word.split("=", 1) for word in words[1:])
            return ""
        for _ in range(3):
            done = subprocess.run(
                ["bash", "-c", command], cwd=cwd, env=self.variables, capture_output=True, text=True, check=False
            )
            if "timed out during startup" not in done.stderr:  # Ray waits 30 s, however busy the machine is
                break
        machine = (
            "tenp-dist doctor" in command and done.returncode == 1
        )  # what this machine lacks is not the page's fault
        assert done.returncode == 0 or machine, f"{command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def end(self) -> None:
        """End what was left running: the processes that have this home, and no others."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    process.kill()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The repository in a folder with a long and odd name; jobs of a few sequences."""
    folder = tmp_path / LONG
    for name in ("jobs", "scripts", "tenp_dist", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / "jobs").glob("*.yaml"):
        path.write_text(path.read_text().replace("samples: 64", "samples: 2"))
    return folder


@pytest.fixture
def short():
    """A folder with a short path, as `tenp-dist doctor` asks for."""
    with tempfile.TemporaryDirectory(prefix="r y", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_on_a_laptop(tmp_path, checkout):
    """TMPDIR is too long for Ray's sockets, as on many clusters, and not in ASCII, which Ray does not take."""
    temporary = tmp_path / "tmp" / LONG
    temporary.mkdir(parents=True)
    user = User(tmp_path / "home" / ODD, TMPDIR=str(temporary))
    commands = section("Laptop")
    assert len(commands) == 4
    try:
        said = [user.give(command, checkout) for command in commands]
    finally:
        user.end()
    assert "beyond ASCII" in said[1] and "RAY_TMPDIR" in said[1]
    assert (checkout / "runs" / "quickstart" / "report" / "index.html").is_file()


def test_on_a_ray_cluster(tmp_path, checkout, short):
    """Two nodes of one machine, a home each; ports that are free take the place of the page's."""
    gcs, server, shared = free_port(), free_port(), tmp_path / "shared"
    (shared / "runs").mkdir(parents=True)
    here = {"RAY_TMPDIR": str(short)}
    head, other = User(tmp_path / "home" / ODD, **here), User(tmp_path / "home of another", **here)
    user, job = head, ""
    try:
        for line in section("Ray cluster"):
            command = line.replace("/shared", shlex.quote(str(shared))).replace("HEAD:6379", f"127.0.0.1:{gcs}")
            command = command.replace("HEAD:8265", f"127.0.0.1:{server}").replace("NUMBER", job)
            if "ray start" in command:
                command = command.replace("--port 6379", f"--port {gcs} --dashboard-port {server}")
                command += f" --dashboard-agent-listen-port {free_port()} {' '.join(SMALL)}"
            if line == "ray start --address HEAD:6379":  # the page's second export was for this one
                shutil.copytree(head.home / ".ray", other.home / ".ray")  # "Copy ~/.ray/auth_token to the others"
                other.variables |= {name: value for name, value in head.variables.items() if name.startswith("TENP_")}
                other.variables["RAY_AUTH_MODE"] = "token"
                user = other
            said = user.give(command, checkout)
            job = job or next(iter(re.findall(r"raysubmit_\w+", said)), "")
            user = head
    finally:
        head.end()
        other.end()
    assert job and (shared / "runs" / "quickstart" / "report" / "index.html").is_file()
