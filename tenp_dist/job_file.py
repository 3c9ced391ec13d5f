"""Reading a job file: YAML, overrides and paths -> a `Job`, or a message that names the key.

Relative paths are relative to the job file, and `${NAME}` or `${NAME:-default}` in a path stands for an
environment variable.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tenp_dist.config import Evaluation, Job, Text
from tenp_dist.errors import JobError
from tenp_dist.job_parts import Benchmark
from tenp_dist.job_values import names_elsewhere

T = TypeVar("T", bound=Text)


def load_job(path: Path, overrides: Sequence[str] = (), run_dir: Path | None = None, plans: Sequence[Path] = ()) -> Job:
    """Read a job file, apply `key.sub=value` overrides, resolve paths.

    plans: measured instead of what the job's `evaluation` names and of the written checkpoint.

    Raises:
        JobError: unreadable file, unknown key (with a suggestion), value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise JobError("Job file not found", where=path, next_step="give the path of a YAML job file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError("Job file cannot be read", where=path, found=error.strerror, next_step="check it") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(
            "Job file is not valid YAML",
            where=path,
            found=" ".join(str(error).split()),
            wanted="a YAML mapping in UTF-8",
            next_step="correct the line that is named",
        ) from error
    if not isinstance(values, dict):
        raise JobError(
            "Job file holds no mapping",
            where=path,
            found=type(values).__name__,
            wanted="keys such as model, run_dir, calibration",
            next_step="start from an example in jobs/",
        )
    for override in overrides:
        _apply_override(values, override)
    if plans:
        _measure_only(values, plans, path)
    if run_dir is not None:
        values["run_dir"] = str(Path(run_dir).resolve())
    return build_job(values, base=path.resolve().parent, where=path)


def no_evaluation(where: object) -> JobError:
    return JobError("The job has no `evaluation`", where=where, next_step="add an `evaluation:` part to the job file")


def _measure_only(values: dict, plans: Sequence[Path], where: Path) -> None:
    if not isinstance(values.get("evaluation"), dict):
        raise no_evaluation(where)
    values["evaluation"] |= {"plans": [str(Path(plan).resolve()) for plan in plans], "grid": {}, "checkpoint": False}


def build_job(values: Mapping[str, Any], *, base: Path, where: object = "job") -> Job:
    """Check a mapping and make its paths absolute relative to `base`."""
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from error
    return job.model_copy(
        update={
            "model": resolve_model(base, job.model),
            "model_cache": job.model_cache and _resolve(base, job.model_cache),
            "run_dir": _resolve(base, job.run_dir),
            "calibration": _resolve_sources(base, job.calibration),
            "search": job.search.model_copy(update={"items": job.search.items and _resolve(base, job.search.items)}),
            "benchmark": job.benchmark and _resolve_benchmark(base, job.benchmark),
            "evaluation": job.evaluation and _resolve_plans(base, _resolve_sources(base, job.evaluation)),
        }
    )


def resolve_model(base: Path, model: Path | str) -> Path | str:
    """The folder that is meant, or the name as it is where there is no such folder and it can be one of the Hub."""
    text = _expand(str(model))
    folder = _resolve(base, Path(text))
    return text if isinstance(model, str) and names_elsewhere(text) and not folder.exists() else folder


def _resolve(base: Path, path: Path) -> Path:
    return (base / Path(_expand(str(path))).expanduser()).resolve()


def _expand(text: str) -> str:
    """The text with `${NAME}` and `${NAME:-default}` replaced; an empty variable counts as unset."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise JobError(
                "A path of the job stands for an environment variable that is not set",
                where=text,
                wanted=match[1],
                next_step=f"export {match[1]}=FOLDER, or write the path itself into the job file",
            )
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text)


def _resolve_sources(base: Path, text: T) -> T:
    sources = tuple(
        source.model_copy(update={"path": _resolve(base, source.path)}) if source.path else source
        for source in text.sources
    )
    return text.model_copy(update={"sources": sources})


def _resolve_plans(base: Path, evaluation: Evaluation) -> Evaluation:
    return evaluation.model_copy(update={"plans": tuple(_resolve(base, path) for path in evaluation.plans)})


def _resolve_benchmark(base: Path, benchmark: Benchmark) -> Benchmark:
    """A python stays the link that it is: resolved, it would be that of another environment."""
    python = benchmark.python and base / Path(_expand(str(benchmark.python))).expanduser()
    folder = benchmark.tasks_folder and _resolve(base, benchmark.tasks_folder)
    return benchmark.model_copy(update={"python": python, "tasks_folder": folder})


def _apply_override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise JobError(
            "--set wants key=value", found=override, wanted="--set budget.retention=0.5", next_step="correct the option"
        )
    *parents, last = key.strip().split(".")
    target: Any = values
    for parent in parents:
        target = target[_index(parent, target)] if isinstance(target, list) else target.setdefault(parent, {})
        if not isinstance(target, dict | list):
            raise JobError(
                "--set goes through a value that has no keys",
                where=key,
                found=target,
                wanted=f"a mapping or a list at `{parent}`",
                next_step="correct the key",
            )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(
            "--set holds a value that is not valid YAML", where=key, found=text, next_step="quote the value"
        ) from error
    if isinstance(target, list):
        target[_index(last, target)] = value
    else:
        target[last] = value


def _index(text: str, items: list) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise JobError(
            "--set names a list item that is not there",
            found=text,
            wanted=f"0 to {len(items) - 1}",
            next_step="correct the number",
        )
    return int(text)


def _explain(error: ValidationError, where: object) -> JobError:
    first = error.errors()[0]
    location = [part for part in first["loc"] if not str(part).startswith("function-")]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        return JobError(
            "Unknown key in the job file",
            where=f"{where}: {key}",
            found=location[-1],
            wanted=f"one of {', '.join(known)}",
            next_step=f"did you mean `{close[0]}`?" if close else "remove the key",
        )
    message = first["msg"].removeprefix("Value error, ")
    found = None if first["type"] == "missing" else first.get("input")
    return JobError(
        f"Job file: {message[0].lower()}{message[1:]}",
        where=f"{where}: {key}" if key else where,
        found=found if not isinstance(found, dict) else None,
        wanted=_description(location),
        next_step="correct the value, or override it with --set",
    )


def _description(location: Sequence[object]) -> str | None:
    """What a field is for and may hold."""
    named = [i for i, part in enumerate(location) if isinstance(part, str)]
    if not named:
        return None
    last = named[-1]
    field = _part_at(location[:last]).model_fields.get(str(location[last]))
    return field and field.description


def _known_keys(location: Sequence[object]) -> list[str]:
    return list(_part_at(location).model_fields)


def _part_at(location: Sequence[object]) -> Any:
    """The part of the job that a location lies in."""
    model: Any = Job
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[str(part)].annotation
        model = next((item for item in (annotation, *_arguments(annotation)) if _is_part(item)), model)
    return model


def _arguments(annotation: Any) -> tuple:
    return getattr(annotation, "__args__", ())


def _is_part(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BaseModel)
