"""Record the digests of what a set of runs writes, or compare with recorded ones: for changes that must change no byte.

    python scripts/same_bytes.py record before.json     # on the commit before
    python scripts/same_bytes.py compare before.json    # on the commit after; exits with 1 where a file differs

The runs: the quickstart; the same model with every kind of plan and layout, an `auto` budget and compensation; two
shards of two ranks; and with --model and --text a larger model. Everything that a run goes on from is digested:
scores, selection, plan, compensated weights, checkpoints, verification and evaluation. `compare --keep FOLDER` runs in
a folder that `record --keep FOLDER` left, and says which stages would be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import yaml

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "jobs" / "quickstart.yaml"
PARTS = ("facts.json", "calibration", "scores", "selection.json", "plan.json", "plan.safetensors", "compensation",
         "compensation.json", "checkpoint", "verify.json", "evaluation.json")  # fmt: skip
FEW = [f"calibration.sources.{i}.samples=16" for i in range(3)]
SHORT = [*FEW, "evaluation=null"]
CASES = {
    "quickstart": [],
    "compensated": [
        *FEW, "budget.method=global", "budget.align=8", "budget.max_widths=3", "output.compensate=true",
        *(f"evaluation.sources.{i}.samples=8" for i in range(3)), "evaluation.grid={compensate: [false, true]}",
    ],
    "auto": [*SHORT, "budget.important=auto", "budget.slope=auto"],
    "one-width": [*SHORT, "budget.method=enp", "budget.align=8", "output.layouts=[uniform]", "output.compensate=true"],
    "removed": [*SHORT, "budget.method=reap", "budget.retention=0.5", "output.layouts=[uniform]"],
    "two-by-two": [*SHORT, "cluster.shards=2", "cluster.tensor_parallel=2", "output.compensate=true"],
}  # fmt: skip
LARGER = [
    "budget.method=global", "budget.align=16", "budget.max_widths=3", "output.compensate=true",
    "output.layouts=[ragged, padded]",
]  # fmt: skip


@click.group(help=__doc__)
def main() -> None:
    pass


def _options(command):
    command = click.option("--keep", type=click.Path(path_type=Path), help="Run here and leave it.")(command)
    command = click.option("--case", "cases", multiple=True, help="Only these; default all.")(command)
    command = click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path))(command)
    command = click.option("--model", type=click.Path(path_type=Path), help="A larger model.")(command)
    return click.argument("file", type=click.Path(path_type=Path))(command)


@main.command()
@_options
def record(file: Path, **options) -> None:
    file.write_text(json.dumps(digests(**options), indent=1) + "\n")


@main.command()
@_options
def compare(file: Path, **options) -> None:
    found, wanted = digests(**options), json.loads(file.read_text())
    differing = [
        f"{case}: {name}"
        for case, files in found.items()
        for name in sorted({*files, *wanted[case]})
        if files.get(name) != wanted[case].get(name)
    ]
    for line in differing:
        click.echo(f"differs   {line}")
    click.echo(f"{sum(map(len, found.values()))} files of {len(found)} runs, {len(differing)} differ")
    sys.exit(bool(differing))


def digests(
    model: Path | None, texts: Sequence[Path], cases: Sequence[str], keep: Path | None
) -> dict[str, dict[str, str]]:
    """Case -> relative path -> sha256."""
    with tempfile.TemporaryDirectory(prefix="tenp-bytes-") as temporary:
        folder = (keep or Path(temporary)).resolve()
        return {case: dict(files_of(run)) for case, run in runs(folder, model, texts, cases)}


def runs(folder: Path, model: Path | None, texts: Sequence[Path], cases: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The cases named, or all; each is run when it is asked for."""
    os.environ |= {"TENP_RUNS": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for split in ("calibration", "evaluation"):
        if not list((folder / "quickstart-text").glob(f"*.{split}.jsonl")):
            script = [sys.executable, ROOT / "scripts/stdlib_text.py", "--split", split]
            subprocess.run([*script, "--out", folder / "quickstart-text"], check=True, stdout=subprocess.DEVNULL)
    for case in cases or CASES:
        yield case, run(QUICKSTART, folder / case, CASES[case])
    if model is not None:
        sources = [{"path": str(text.resolve()), "domain": text.name.split(".")[0], "samples": 16} for text in texts]
        job = {"model": str(model.resolve()), "run_dir": "larger"}
        job |= {"calibration": {"sources": sources, "sequence_length": 256}}
        path = folder / "larger.yaml"
        path.write_text(yaml.safe_dump(job))
        yield "larger", run(path, folder / "larger", LARGER)


def run(job: Path, run_dir: Path, settings: Sequence[str]) -> Path:
    """Run a job in a process of its own and say what its stages did."""
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "tenp_dist.cli.main", "run", job, "--run-dir", run_dir, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{run_dir.name}: exit {done.returncode}\n{done.stderr}")
    made = sum(" done " in line and "already" not in line for line in done.stderr.splitlines())
    click.echo(f"ran       {run_dir.name}: {made} stages made", err=True)
    return run_dir


def files_of(run_dir: Path) -> Iterator[tuple[str, str]]:
    for part in PARTS:
        for path in sorted([run_dir / part, *(run_dir / part).rglob("*")]):
            if path.is_file() and path.name != "README.md":  # a card, which the report writes
                yield str(path.relative_to(run_dir)), hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
