"""Writing a pruned checkpoint against `cp` and `sync -f` of as many bytes.

The source is the random model of synthetic.py (or --model) and the plan keeps random neurons. Both sides
read a source that is in the page cache and end with their bytes on the disk: ours syncs every shard, then the
folder; `cp` copies files of the same sizes (cut from the source) and then syncs the file system. Starting Ray does
not count. Every round measures all ways in turn; output is deleted after each.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine

MEGABYTE = 10**6


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="default: the synthetic 2.6 GB model")
@click.option("--retention", default=0.6, show_default=True, help="share of an expert's neurons that stay")
@click.option("--shard-mb", default=256, show_default=True)
@click.option("--writers", default=2, show_default=True, help="on Ray")
@click.option("--repeat", default=3, show_default=True, help="rounds")
@click.option("--folder", type=click.Path(path_type=Path), help="where the temporary folder goes")
def main(model, retention, shard_mb, writers, repeat, folder):
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.layouts.base import Pruned
    from tenp_dist.layouts.table import LAYOUTS
    from tenp_dist.pool.in_process import InProcessPool
    from tenp_dist.pool.ray_pool import RayPool

    print_machine("torch", "ray")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        source = open_source(model or make_model(temporary / "source"))
        pruned, nbytes = Pruned(source, random_plan(source.facts, retention), str(retention)), source.index.nbytes
        click.echo(f"source    {nbytes / MEGABYTE:,.0f} MB, shards of {shard_mb} MB, {retention:.0%} of neurons kept")
        pools = {"in process, 1 writer": (InProcessPool(), 1), f"Ray, {writers} writers": (RayPool(), writers)}
        try:
            click.echo("layout  way                     MB   cp s   cp MB/s   write s   write MB/s   ratio of rates")
            for name in ("ragged", "padded"):
                measure_layout(LAYOUTS[name], pruned, shard_mb * MEGABYTE, pools, temporary, repeat)
        finally:
            for pool, _ in pools.values():
                pool.close()


def make_model(folder: Path) -> Path:
    from synthetic import Shape, write_synthetic

    write_synthetic(folder, Shape())
    return folder


def random_plan(facts, retention: float):
    """The same number of neurons in every expert, drawn at random."""
    import numpy as np

    from tenp_dist.checkpoint.kept import KeptNeurons

    generator, experts, neurons = np.random.default_rng(0), facts.num_experts, facts.intermediate_size
    plan = {}
    for layer in facts.moe_layers:
        ranks_EF = generator.random((experts, neurons)).argsort(axis=1)
        plan[layer] = KeptNeurons.from_mask(ranks_EF < round(retention * neurons))
    return plan


def measure_layout(layout, pruned, shard_size: int, pools: dict, temporary: Path, repeat: int) -> None:
    from tenp_dist.checkpoint.writer import assign_shards, shard_bytes

    sizes = [shard_bytes(shard) for shard in assign_shards(layout.tensors(pruned), shard_size)]
    originals, target = temporary / "originals", temporary / "target"
    make_originals(originals, pruned.source.folder, sizes)
    times: dict[str, list[float]] = {"cp": [], **{name: [] for name in pools}}
    for _ in range(repeat):
        times["cp"].append(timed(lambda: copy(originals, target), target))
        for name, (pool, writers) in pools.items():
            write = writing(pool, writers, layout, pruned, shard_size, target)
            times[name].append(timed(write, target))
    shutil.rmtree(originals)
    megabytes = sum(sizes) / MEGABYTE
    for name in pools:
        ratios = [theirs / ours for theirs, ours in zip(times["cp"], times[name], strict=True)]
        theirs, ours = statistics.median(times["cp"]), statistics.median(times[name])
        click.echo(
            f"{layout.name:<6}  {name:<20} {megabytes:>6,.0f}  {theirs:>5.2f}  {megabytes / theirs:>8,.0f}"
            f"  {ours:>8.2f}  {megabytes / ours:>11,.0f}"
            f"   {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def make_originals(folder: Path, source: Path, sizes: list[int]) -> None:
    """Files of the given sizes for `cp`, from the source's bytes, and on the disk before anything is timed."""
    folder.mkdir()
    block = b"".join(path.read_bytes() for path in sorted(source.glob("*.safetensors"))[:1])
    for number, size in enumerate(sizes):
        with open(folder / f"{number:05d}", "wb") as stream:
            while stream.tell() < size:
                stream.write(block[: size - stream.tell()])
    warm(folder, source)
    subprocess.run(["sync", "-f", folder], check=True)


def warm(*folders: Path) -> None:
    for folder in folders:
        for path in folder.iterdir():
            with open(path, "rb", buffering=0) as stream:
                while stream.read(16 << 20):
                    pass


def copy(originals: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", originals, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)


def writing(pool, writers: int, layout, pruned, shard_size: int, target: Path) -> Callable[[], None]:
    from tenp_dist.stages.write import Attempt, write_layout

    attempt = Attempt(
        folder=target, key="bench", shard_size=shard_size, writers=writers, progress=lambda progress: None
    )
    return lambda: write_layout(pool, layout, pruned, attempt)


def timed(function: Callable[[], None], target: Path) -> float:
    """Seconds, from a quiet disk; then the output is gone."""
    subprocess.run(["sync", "-f", target.parent], check=True)
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    main()
