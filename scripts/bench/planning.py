"""Time and memory of planning at the size of a 671B model: read score files, plan, write the plan files.

Only the tensors that planning reads are synthesised, in a temporary folder that is deleted afterwards.
The planning runs in a fresh process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine, process_memory

if TYPE_CHECKING:
    from tenp_dist.config import Budget


@click.command(help=__doc__)
@click.option("--layers", default=58, show_default=True, help="MoE layers")
@click.option("--experts", default=256, show_default=True, help="routed experts per layer")
@click.option("--neurons", default=2048, show_default=True, help="intermediate size of an expert")
@click.option("--domains", default=4, show_default=True, help="calibration domains")
@click.option("--method", default="tenp", show_default=True, help="tenp, enp, random, global, obs or obs-uniform")
@click.option("--align", default=1, show_default=True, help="narrow widths are multiples of this")
@click.option("--max-widths", default=2, show_default=True, help="distinct widths of a layer")
@click.option("--minimum-layer-retention", "layer_minimum", default="0", show_default=True, help="of method global")
@click.option("--activated", default=None, help="of methods global and obs")
@click.option("--repeat", default=3, show_default=True, help="runs; every one is printed")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
@click.option("--measure", type=click.Path(path_type=Path), hidden=True, help="internal: plan this folder of scores")
def main(
    layers, experts, neurons, domains, method, align, max_widths, layer_minimum, activated, repeat, folder, measure
):
    sizes = (layers, experts, neurons)
    if measure:
        from tenp_dist.config import Budget

        floors = {"minimum_layer_retention": layer_minimum, "activated": activated}
        budget = Budget(method=method, align=align, max_widths=max_widths, **floors)
        click.echo(json.dumps(plan_once(measure, sizes, budget)))
        return
    print_machine("torch", "numpy", "safetensors")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        scores = Path(temporary)
        started = time.perf_counter()
        size = synthesise(scores, sizes, domains, method)
        click.echo(f"model       {layers} layers x {experts} experts x {neurons} neurons, {domains} domains")
        least = f", at least {layer_minimum} of each" if float(layer_minimum) else ""
        click.echo(f"budget      align {align}, at most {max_widths} widths in a layer{least}")
        click.echo(
            f"scores      {size / 1e9:.2f} GB, made in {time.perf_counter() - started:.0f} s (not counted below)"
        )
        click.echo(
            "run  method  planning s  CPU s  whole process s  peak RSS GB  anonymous at end GB  plan files MB  load"
        )
        for run in range(1, repeat + 1):
            report(run, method, scores)


def report(run: int, method: str, scores: Path) -> None:
    started = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(scores)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    whole = time.perf_counter() - started
    found = json.loads(child.stdout)
    times = f"{found['seconds']:>10.2f}  {found['cpu']:>5.2f}  {whole:>15.2f}"
    sizes = f"{found['peak'] / 1e9:>11.2f}  {found['anonymous'] / 1e9:>19.2f}  {found['plan_bytes'] / 1e6:>13.1f}"
    click.echo(f"{run:<3}  {method:<6}  {times}  {sizes}  {os.getloadavg()[0]:>4.1f}")


def synthesise(folder: Path, sizes: tuple[int, int, int], domains: int, method: str) -> int:
    """Write score files of random numbers; 1 expert in 200 is reached by no token. Returns their bytes."""
    import torch

    from tenp_dist.run_files import layer_name
    from tenp_dist.scoring.statistics import LayerStatistics, write_statistics

    layers, experts, neurons = sizes
    generator = torch.Generator().manual_seed(0)
    total = 0
    for layer in range(layers):
        counts = torch.randint(1, 10_000, (domains, experts), generator=generator).double()
        counts[:, torch.rand(experts, generator=generator) < 0.005] = 0
        tensors = {"token_count": counts}
        if method.startswith("obs"):
            eliminate(folder / "elimination", layer, counts.sum(dim=0), neurons, generator)
        elif method == "global":  # experts of very different energy, heavy-tailed inside, growing with depth
            scale = torch.exp(1.5 * torch.randn(1, experts, 1, generator=generator).double() + 0.05 * layer)
            draws = torch.rand(domains, experts, neurons, generator=generator, dtype=torch.float64)
            energy = draws.clamp_min(1e-12).log() ** 2
            tensors["neuron_energy_sum"] = energy * scale * counts[:, :, None]
        else:
            tensors["expert_importance_sum"] = torch.rand(domains, experts, generator=generator).double() * counts
            projection = torch.randn(domains, experts, neurons, generator=generator).double()
            tensors["neuron_projection_sum"] = projection * counts[:, :, None]
        norms = torch.rand(experts, neurons, generator=generator).double()
        names = tuple(f"domain{index}" for index in range(domains))
        path = folder / f"{layer_name(layer)}.safetensors"
        write_statistics(path, LayerStatistics(names, tensors, norms), layer=layer, key="bench")
        total += path.stat().st_size
    return total


def eliminate(folder: Path, layer: int, tokens_E, neurons: int, generator) -> None:
    """Random orders; costs like those of `global` from the cheapest on, one step in twenty below the one before."""
    import torch

    from tenp_dist.elimination.files import Elimination, write_elimination
    from tenp_dist.run_files import layer_file

    scale = (
        torch.exp(1.5 * torch.randn(len(tokens_E), 1, generator=generator).double() + 0.05 * layer) * tokens_E[:, None]
    )
    draws = torch.rand(len(tokens_E), neurons, generator=generator, dtype=torch.float64)
    step_EF = (draws.clamp_min(1e-12).log() ** 2).sort(dim=1).values * scale
    step_EF *= 1 - 0.1 * (torch.rand(step_EF.shape, generator=generator) < 0.05)
    order_EF = torch.rand(step_EF.shape, generator=generator).argsort(dim=1).int()
    folder.mkdir(exist_ok=True)
    write_elimination(layer_file(folder, layer), Elimination(order_EF, step_EF.cumsum(dim=1)), layer=layer, key="bench")


def plan_once(folder: Path, sizes: tuple[int, int, int], budget: Budget) -> dict[str, float]:
    """Plan the scores in `folder`; seconds include imports of the planner, reading and writing."""
    started, cpu = time.perf_counter(), time.process_time()
    from tenp_dist.budget.plan import MoeLayer, make_plan, planning_statistics
    from tenp_dist.budget.plan_files import read_plan, write_plan
    from tenp_dist.elimination.files import read_planning
    from tenp_dist.run_files import layer_name

    layers, experts, neurons = sizes
    names = planning_statistics(budget)
    plan = make_plan(
        budget,
        [MoeLayer(layer, experts, neurons) for layer in range(layers)],
        lambda layer: read_planning(folder / f"{layer_name(layer)}.safetensors", folder / "elimination", layer, names),
    )
    paths = write_plan(folder / "plan", plan, source_fingerprint="bench", scores_digest="bench")
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert read_plan(folder / "plan")["experts"]["total"] == layers * experts
    memory = process_memory()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak": memory["VmHWM"],
        "anonymous": memory["RssAnon"],
        "plan_bytes": sum(path.stat().st_size for path in paths),
    }


if __name__ == "__main__":
    main()
