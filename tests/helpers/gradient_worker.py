"""One rank of a layer shard: takes models up and back, through the layers that all its ranks hold together.

`together` runs `python -m helpers.gradient_worker JOB.json RANK` once per rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.commands import free_port
from helpers.paths import ROOT
from helpers.scoring import COMPUTE
from tenp_dist.checkpoint.index import read_config
from tenp_dist.passes.layer_worker import LayerWorker
from tenp_dist.passes.schedule import next_unit
from tenp_dist.scoring.gradient_pass import NeuronGradientTask


def task_of(folder: Path, model: Path, ranks: int) -> NeuronGradientTask:
    """folder: with the corpus; the model's files go into one of its name."""
    layers = read_config(model)["num_hidden_layers"]
    return NeuronGradientTask(
        model, folder / "corpus.arrow", folder / model.name, "key", COMPUTE,
        waves=3, ranks=ranks, layers=layers, commit_seconds=0,
    )  # fmt: skip


def together(folder: Path, models: list[Path], ranks: int) -> None:
    """Run all models on the ranks of one shard, which must say nothing."""
    job = {"folder": str(folder), "models": [str(model) for model in models], "ranks": ranks, "port": free_port()}
    (folder / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.gradient_worker", str(folder / "job.json"), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for worker in workers:
        said = worker.communicate(timeout=600)
        assert worker.returncode == 0, said


def main() -> None:
    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    first = True
    for model in map(Path, job["models"]):
        task = task_of(Path(job["folder"]), model, job["ranks"])
        for one in (task.up(), task):
            worker = LayerWorker(one, range(task.layers), rank)
            if first and rank == 0:
                from tenp_dist.passes.ranks import listen

                worker._listening = listen("127.0.0.1", job["port"])
            first = False
            worker.join("127.0.0.1", job["port"])
            worker.open()
            positions = [0] * len(worker.waves)
            while unit := next_unit(worker.layers, positions, "streaming"):
                worker.run(unit)
                for wave in unit.waves:
                    positions[wave] = unit.stop
            worker.wait_for_results()
    import torch

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
