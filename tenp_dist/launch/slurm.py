"""A Slurm script for a job, from the one template that cluster/slurm/prune.sbatch is made from too."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import atomic_write
from tenp_dist.errors import ClusterError, OutputError, first_line
from tenp_dist.preflight.cluster_split import Split

_TEMPLATE = Path(__file__).with_name("prune.sbatch.in")
_SHORT = {"-J": "--job-name", "-N": "--nodes", "-A": "--account", "-p": "--partition", "-t": "--time", "-o": "--output"}
_NOTICE_SECONDS = 180  # before the time limit: to commit what is done and to requeue


@dataclass(frozen=True, kw_only=True)
class SlurmScript:
    """What the script asks for.

    job: the job file of `tenp-dist run`.
    nodes: how many.
    gpus: accelerators of each node.
    time: limit, as Slurm writes it.
    cpus: cores of each node that Ray may use, None for all.
    account, partition: to charge, and to run in.
    directives: further `#SBATCH` lines.
    options: further words for `tenp-dist run`.
    models, runs, text: defaults of TENP_MODELS, TENP_RUNS and TENP_TEXT.
    venv: virtual environment that all nodes see.
    container: command prefix that enters one.
    srun_options: further options of srun.
    scratch: a folder on each node's own disk.
    """

    job: str
    nodes: int
    gpus: int
    time: str = "04:00:00"
    cpus: int | None = None
    account: str | None = None
    partition: str | None = None
    directives: Sequence[str] = ()
    options: Sequence[str] = ()
    models: str = ""
    runs: str = ""
    text: str = ""
    venv: str = ""
    container: str = ""
    srun_options: str = ""
    scratch: str = "${SLURM_TMPDIR:-/tmp}"

    def render(self) -> str:
        """The script's text."""
        text = {name: shlex.quote(getattr(self, name)) for name in ("job", "venv", "container", "srun_options")}
        text |= {"options": shlex.join(self.options), "scratch": f'"{self.scratch}"'}
        text |= {"models": self.models, "runs": self.runs, "text": self.text}
        text |= {"cpus": str(self.cpus or ""), "gpus": str(self.gpus)}
        text["directives"] = "\n".join(f"#SBATCH {line}" for line in self._directives())
        return re.sub(r"@\{(\w+)\}", lambda match: text[match[1]], _TEMPLATE.read_text(encoding="utf-8"))

    def _directives(self) -> list[str]:
        lines = ["--job-name=tenp-dist", f"--nodes={self.nodes}", "--ntasks-per-node=1", "--exclusive", "--mem=0"]
        lines += [f"--gpus-per-node={self.gpus}"] * bool(self.gpus)
        lines += [f"--{name}={value}" for name in ("account", "partition") if (value := getattr(self, name))]
        lines += [f"--time={self.time}", f"--signal=B:USR1@{_NOTICE_SECONDS}", "--requeue", "--open-mode=append"]
        own = [line for line in (*lines, "--output=%x-%j.log") if _option(line) not in map(_option, self.directives)]
        return [*own, *self.directives]


def _option(directive: str) -> str:
    """The option that a directive gives, by its long name."""
    word = re.split(r"[=\s]", directive.strip(), maxsplit=1)[0]
    return word if word.startswith("--") else _SHORT.get(word[:2], word)


def cluster_options(cluster: Mapping[str, Any], split: Split) -> list[str]:
    """`--set` options that say what the job's `cluster` part, as written in its file, does not say of the split."""
    values = {"shards": split.shards, "tensor_parallel": split.ranks}
    return [word for key, value in values.items() if key not in cluster for word in ("--set", f"cluster.{key}={value}")]


def write_script(path: Path, script: SlurmScript, *, overwrite: bool) -> None:
    """Raises OutputError where another script is there already and `overwrite` is off."""
    text = script.render()
    if path.exists() and not overwrite and path.read_text(encoding="utf-8") != text:
        raise OutputError(
            "Another script is there already",
            where=path,
            next_step="add --overwrite to replace it, or --out to write somewhere else",
        )
    with atomic_write(path) as stream:
        stream.write(text.encode())


def submit_script(path: Path) -> str:
    """Hand a script to sbatch; returns the job id.

    Raises:
        ClusterError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ClusterError("No Slurm here", found="no sbatch on PATH", next_step=f"on a login node: sbatch {path}")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(
            "sbatch refuses the script",
            where=path,
            found=first_line(RuntimeError(done.stderr)),
            next_step="correct the lines that begin with #SBATCH (account, partition, time), then run sbatch again",
        )
    return done.stdout.strip().split(";")[0]


def here() -> dict[str, str]:
    """What this process says about its surroundings: virtual environment, models, runs, text."""
    venv = sys.prefix if sys.prefix != sys.base_prefix else ""
    return {"venv": venv} | {name: os.environ.get(f"TENP_{name.upper()}", "") for name in ("models", "runs", "text")}
