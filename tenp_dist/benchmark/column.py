"""One model measured on the tasks of a benchmark: a column of its table, kept in a file of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenp_dist.artifacts import SCHEMA_VERSION, digest_of, file_digest, read_json, write_json
from tenp_dist.benchmark.servers import Served
from tenp_dist.errors import BenchmarkError
from tenp_dist.job_parts import Benchmark

BACKENDS: Mapping[str, str] = {"transformers": "hf", "vllm": "vllm", "server": "local-completions"}
"""Backend of a job -> the name of lm-eval for it."""
_LAST, _SAID = 4000, 500  # characters of the log in which its end is looked for, and of what is said of it
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|NotFound|Interrupt)\b")


@dataclass(frozen=True)
class Column:
    """A model to measure.

    name: source or pruned.
    folder: its checkpoint; of a served one, where its tokenizer is.
    digest: of the checkpoint.
    served: where it is served, None where lm-eval loads it.
    """

    name: str
    folder: Path
    digest: str
    served: Served | None = None


def request(asked: Benchmark, column: Column) -> dict[str, Any]:
    """What the harness is asked to do, without the file that it answers in."""
    return {
        "model": BACKENDS[asked.backend],
        "model_args": _model_args(column) | dict(asked.model_args),
        "tasks": list(asked.tasks),
        "tasks_folder": asked.tasks_folder and str(asked.tasks_folder),
        "limit": asked.limit,
        "num_fewshot": asked.fewshot,
        "batch_size": asked.batch_size,
        "seed": asked.seed,
        "chat_template": asked.chat_template,
        "tokenizer": str(column.folder),
    }


def _model_args(column: Column) -> dict[str, Any]:
    if column.served is None:
        return {"pretrained": str(column.folder), "dtype": "auto"}
    served = column.served
    limit = {} if served.max_length is None else {"max_length": served.max_length}
    tokens = {"tokenizer": str(column.folder), "tokenizer_backend": "huggingface", "tokenized_requests": True}
    return {"model": served.name, "base_url": f"{served.url}/completions", **tokens, **limit}


def tasks_digest(folder: Path | None) -> str | None:
    """Of the files of a folder of tasks."""
    if folder is None:
        return None
    return digest_of({str(path.relative_to(folder)): file_digest(path) for path in _files(folder)})


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def column_key(asked: Benchmark, column: Column) -> str:
    """Digest of all that a column's figures follow from; where a server is does not matter, nor where a folder lies."""
    wanted = request(asked, column)
    wanted["model_args"] = dict(asked.model_args) | {"served": column.served and column.served.name}
    wanted |= {"tasks_folder": tasks_digest(asked.tasks_folder), "tokenizer": None, "python": asked.python}
    return digest_of({"schema": SCHEMA_VERSION, "model": column.digest, "request": wanted})


def kept_column(path: Path, key: str) -> dict[str, Any] | None:
    """The figures of a column that was finished under this key."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)
    except ValueError:
        return None
    return stored if stored.get("key") == key else None


def measure_column(asked: Benchmark, column: Column, python: Path, path: Path, log: Path) -> dict[str, Any]:
    """Measure a model in a process of the environment's Python, and keep the figures in `path`.

    Raises:
        BenchmarkError: lm-eval is missing, knows no such task, or fails; the log says why.
    """
    answer = path.with_suffix(".answer")
    answer.parent.mkdir(parents=True, exist_ok=True)
    answer.unlink(missing_ok=True)
    _run_harness(python, request(asked, column) | {"answer": str(answer)}, log, column.name)
    figures = read_json(answer)
    answer.unlink()
    if "refused" in figures:
        refused = figures["refused"]
        raise BenchmarkError(
            refused["what"],
            where=python if "environment" in refused["what"] else asked.tasks_folder or "benchmark.tasks",
            found=refused["found"],
            wanted=refused["wanted"],
            next_step="correct benchmark.tasks, benchmark.tasks_folder or benchmark.python in the job",
        )
    stored = {"key": column_key(asked, column), **figures}
    write_json(path, stored)
    return stored


def _run_harness(python: Path, wanted: Mapping[str, Any], log: Path, name: str) -> None:
    text = Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENAI_API_KEY": _api_key()}
    with open(log, "w", encoding="utf-8") as stream:
        done = subprocess.run(
            [python, "-c", text],
            input=json.dumps(wanted).encode(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace")[-_LAST:].strip().splitlines()
        raise BenchmarkError(
            f"lm-eval failed on the {name} model",
            where=log,
            found=why_it_ended(lines) if lines else f"exit code {done.returncode}",
            next_step="read the log, correct it and run again: a column that was finished is kept",
        )


def why_it_ended(lines: Sequence[str]) -> str:
    """The exception that a log ends with, all of its lines in one; the last line where there is none."""
    begins = [number for number, line in enumerate(lines) if _EXCEPTION.match(line)]
    return " ".join(" ".join(lines[begins[-1] if begins else -1 :]).split())[:_SAID]


def _api_key() -> str:
    """lm-eval asks for one, servers of one's own mostly do not."""
    return os.environ.get("OPENAI_API_KEY") or "none"
