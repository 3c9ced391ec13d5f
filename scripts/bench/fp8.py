"""What FP8 costs: NLL that results in FP8 add over their source, against the same results in bfloat16.

The model is turned into FP8 first (`scripts/to_fp8.py`), in one of two kinds of scale, and everything is measured
against that: the bfloat16 result is the numbers that the source stands for, the FP8 one is written and read again.
Blocks are smaller than an expert (32 x 32), as they are in large models: neurons of several come together in one.

A second table is about the rounding of compensated W_down alone, gate and up exact: each number to the nearest, or with
error feedback as GPTQ rounds (arXiv 2210.17323): column by column, what a column was rounded by is spread over those
that follow, by the Gram matrix of their activations. Scales are those of plain rounding in both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import print_machine
from study import CalibrationSet, Study
from to_fp8 import Tensors, convert

from tenp_dist.artifacts import digest_of, read_json, write_json
from tenp_dist.checkpoint import float8
from tenp_dist.checkpoint.compensated import CompensatedExpert, open_compensated
from tenp_dist.checkpoint.kept import read_kept
from tenp_dist.checkpoint.output_form import output_form
from tenp_dist.checkpoint.source import open_source
from tenp_dist.compensation.compensate_pass import CompensateSum, CompensateTask, Target, compensate_model
from tenp_dist.compensation.moments import Moments
from tenp_dist.config import Budget
from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, drop_hidden, evaluate_model
from tenp_dist.evaluation.metrics import SOURCE
from tenp_dist.evaluation.plans import NamedPlan
from tenp_dist.evaluation.variants import Variant
from tenp_dist.layouts.base import Pruned
from tenp_dist.layouts.table import LAYOUTS
from tenp_dist.passes.layer_step import OpenShard
from tenp_dist.pool.in_process import InProcessPool
from tenp_dist.stages.write import Attempt, write_layout

PATHS = click.Path(path_type=Path, exists=True)
LINES = {"tenp": {}, "global, align 16, 3 widths": {"align": 16, "max_widths": 3}}
ROUNDINGS = ("nearest", "feedback")


@click.command(help=__doc__)
@click.option("--model", type=PATHS, required=True)
@click.option("--calibration", type=PATHS, multiple=True, required=True, help="jsonl with `text`, one a domain")
@click.option("--selection", type=PATHS, multiple=True, required=True, help="the same domains, to measure on")
@click.option("--samples", default=32, show_default=True, help="calibration sequences a domain")
@click.option("--measured", default=32, show_default=True, help="sequences a domain to measure on")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--retentions", default="0.6,0.3", show_default=True)
@click.option("--scales", type=click.Choice(["floats", "powers"]), multiple=True, default=["floats", "powers"])
@click.option("--only", default="", help="methods, separated by commas; default: all of the table")
@click.option("--block", type=int, default=32, show_default=True, help="rows and columns of a block")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("fp8"), show_default=True)
def main(model, calibration, selection, samples, measured, length, retentions, scales, only, block, threads, out):
    from tenp_dist.cli.view import quieten

    quieten()
    print_machine("torch", "transformers")
    for kind in scales:
        folder = out / f"{kind}-{block}"
        if not (folder / "config.json").exists():
            convert(model, folder, Tensors((block, block), powers=kind == "powers", plain=False), 5 * 10**9)
        study = Study(folder, out / "work", length, threads)
        text = CalibrationSet("all", tuple((path, path.name.split(".")[0], samples) for path in calibration))
        held = CalibrationSet("held out", tuple((path, path.name.split(".")[0], measured) for path in selection))
        corpus, held_out = study.corpora(text)[0], study.corpora(held)[0]
        cases = {
            (line, retention): study.plan(Budget(method=line.split(",")[0], retention=retention, **keys), corpus)
            for line, keys in LINES.items()
            if not only or line.split(",")[0] in only.split(",")
            for retention in retentions.split(",")
        }
        show(kind, block, cases, measure(study, cases, corpus, held_out, out / "written" / folder.name, block))


def measure(
    study: Study, cases: Mapping[tuple, NamedPlan], corpus: Path, held_out: Path, home: Path, block: int
) -> dict:
    """Name -> NLL. Names: `line retention form`, form one of bfloat16, fp8, and of compensated ones the roundings."""
    variants, written = {}, []
    solved = study.compensated(cases.values(), corpus)
    rounded = {how: _rounded(study, cases.values(), corpus, how, block) for how in ROUNDINGS}
    for case, plan in cases.items():
        name, folder = " ".join(case), solved[plan.name]
        variants |= {
            f"{name} bfloat16": Variant(plan.tensors),
            f"{name} compensated bfloat16": Variant(plan.tensors, folder),
        }
        for how in ROUNDINGS:
            variants[f"{name} compensated {how}"] = Variant(plan.tensors, rounded[how][plan.name])
        for form, given in (("", None), (" compensated", folder)):
            target = home / plan.name / ("compensated" if given else "plain")
            _write(study.model, plan, given, target, case[1])
            written.append(VariantsPass(target / "ragged", {f"{name}{form} fp8": Variant()}))
    key = digest_of([{name: one.digest for name, one in variants.items()}, held_out.stem, block])
    stored = study.folder / "figures" / f"{key[:16]}.json"
    if not stored.exists():
        passes = [VariantsPass(study.model, {SOURCE: Variant(), **variants}), *written]
        task = EvaluateTask(passes, held_out, study.folder / "measure", key, study.compute, waves=8)
        found = evaluate_model(study.context, task).summary()
        write_json(stored, {name: figures["mean"]["nll"] for name, figures in found.items()})
        drop_hidden(task)
    return read_json(stored)


def _write(model: Path, plan: NamedPlan, compensated: Path | None, folder: Path, retention: str) -> None:
    source = open_source(model)
    columns = open_compensated(compensated) if compensated else None
    pruned = Pruned(source, read_kept(plan.tensors), retention, columns, output_form(source, "source"))
    attempt = Attempt(
        folder=folder / "ragged", key="bench", shard_size=5 * 10**9, progress=lambda step: None, overwrite=True
    )
    write_layout(InProcessPool(1), LAYOUTS["ragged"], pruned, attempt)


def _rounded(study: Study, plans: Sequence[NamedPlan], corpus: Path, how: str, block: int) -> dict[str, Path]:
    """Name of each plan -> folder of its compensated W_down, rounded to FP8 in this way."""
    found = {plan.name: Target(plan.tensors, plan.text.parent / f"{how}-{block}") for plan in plans}
    key = f"{corpus.stem}-{how}-{block}"
    task = RoundedTask(
        study.model, corpus, study.folder / "rounded" / key, key, study.compute, moe=tuple(study.moe_layers),
        targets=tuple(found.values()), how=how, block=block, powers=study.model.name.startswith("powers"),
    )  # fmt: skip
    if not all(task.stored(one, layer, 0) for one in found.values() for layer in task.moe):
        click.echo(f"compensating and rounding, {how}")
        compensate_model(study.context, task)
    return {name: target.folder for name, target in found.items()}


@dataclass(frozen=True)
class RoundedTask(CompensateTask):
    """As `CompensateTask`, and what is solved is rounded.

    how: one of `ROUNDINGS`.
    block: rows and columns.
    powers: whether scales are powers of two.
    """

    how: str = ""
    block: int = 32
    powers: bool = False

    def layer_sum(self, shard: OpenShard) -> CompensateSum:
        return RoundedSum(self, shard)


class RoundedSum(CompensateSum):
    """Rounds every solved W_down in the scales that its stored form would get."""

    def solved(
        self, layer: int, narrow: Mapping[int, np.ndarray], sums: Moments, down_EDF: torch.Tensor
    ) -> Iterator[CompensatedExpert]:
        for one in super().solved(layer, narrow, sums, down_EDF):
            expert = int(one.row[0])
            ids = torch.from_numpy(narrow[expert - self._held.start].astype(np.int64))
            gram_WW = sums._summed(expert - self._held.start, ids)[ids].double()
            yield replace(one, down_DW=self.rounded(self.down_name(layer, expert), one.down_DW, gram_WW))

    def down_name(self, layer: int, expert: int) -> str:
        return self.shard.skeleton.slices.of(layer, expert, "down").tensor

    def rounded(self, name: str, down_DW: torch.Tensor, gram_WW: torch.Tensor) -> torch.Tensor:
        """What the FP8 numbers stand for, float64."""
        block = self.task.block
        kind = float8.Kind(name, powers=self.task.powers)
        _, factors = float8.encode(down_DW.bfloat16(), (block, block), kind)
        rows, columns = down_DW.shape
        scale_DW = factors.double().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        if self.task.how == "nearest":
            return to_grid(down_DW.bfloat16().double(), scale_DW)
        return with_feedback(down_DW.double(), gram_WW, scale_DW, self.task.ridge)


def to_grid(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest number that a float8 and this scale stand for."""
    return (values / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale


def with_feedback(down_DW: torch.Tensor, gram_WW: torch.Tensor, scale_DW: torch.Tensor, ridge: float) -> torch.Tensor:
    """Columns rounded one after another; the error of each is taken back by the best change of those that follow."""
    mean = gram_WW.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped_WW = gram_WW + ridge * mean * torch.eye(len(gram_WW), dtype=gram_WW.dtype)
    upper_WW = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_WW)), upper=True)
    left_DW, rounded_DW = down_DW.clone(), torch.empty_like(down_DW)
    for column in range(down_DW.shape[1]):
        rounded_DW[:, column] = to_grid(left_DW[:, column], scale_DW[:, column])
        error_D = (left_DW[:, column] - rounded_DW[:, column]) / upper_WW[column, column]
        left_DW[:, column + 1 :] -= error_D[:, None] * upper_WW[column, column + 1 :]
    return rounded_DW


def show(kind: str, block: int, cases: Mapping[tuple, NamedPlan], nll: Mapping[str, float]) -> None:
    click.echo(f"\n{kind}, blocks of {block}: NLL added over the source's {nll[SOURCE]:.4f}")
    click.echo(f"{'':<46}{'bfloat16':>10}{'FP8':>10}{'of it':>9}")
    for form in ("", " compensated"):
        for line, retention in cases:
            name = f"{line} {retention}{form}"
            plain, fp8 = (nll[f"{name} {one}"] - nll[SOURCE] for one in ("bfloat16", "fp8"))
            click.echo(f"{name:<46}{plain:>10.5f}{fp8:>10.5f}{fp8 / plain - 1:>+9.2%}")
    click.echo(f"\n{'W_down rounded, the rest exact':<46}{'not':>10}{'nearest':>10}{'feedback':>10}")
    for line, retention in cases:
        name = f"{line} {retention} compensated"
        cells = [nll[f"{name} {one}"] - nll[SOURCE] for one in ("bfloat16", *ROUNDINGS)]
        click.echo(f"{name:<46}" + "".join(f"{cell:>10.5f}" for cell in cells))


if __name__ == "__main__":
    main()
