"""TRSP's second stage beside its controls: one table, the same layers removed, on text that no training saw.

Layers that are named leave; what differs is the training: none, without the penalty, with it, and after the layers have
left. NLL added over the full model, nats per token, mean over domains; the first and last loss of the curve, and what
share of what enters them the leaving layers still change. What was done is kept in `--out`: the same command goes on
after an interruption.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine

PATHS = click.Path(path_type=Path, exists=True)


@click.command(help=__doc__)
@click.option("--model", type=PATHS, required=True)
@click.option("--calibration", type=PATHS, multiple=True, required=True, help="jsonl with `text`, one a domain")
@click.option("--selection", type=PATHS, multiple=True, required=True, help="the same domains, to measure on")
@click.option("--leave", type=int, multiple=True, default=(2, 4), show_default=True, help="decoder layers that leave")
@click.option("--penalty", type=float, multiple=True, default=(0.0, 0.3), show_default=True, help="lambda2 before")
@click.option("--after/--no-after", default=True, help="train after the layers have left, too")
@click.option("--steps", default=60, show_default=True)
@click.option("--sequences", default=4, show_default=True, help="of a step")
@click.option("--rank", default=8, show_default=True)
@click.option("--rate", default=0.002, show_default=True)
@click.option("--samples", default=64, show_default=True, help="calibration sequences a domain")
@click.option("--measured", default=32, show_default=True, help="sequences a domain to measure on")
@click.option("--length", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-tokens", default=2048, show_default=True, help="tokens of a microbatch")
@click.option("--out", type=click.Path(path_type=Path), default=Path("trsp"), show_default=True)
def main(model, calibration, selection, leave, penalty, after, samples, measured, length, batch_tokens, out, **asked):
    from tenp_dist.cli.view import quieten
    from tenp_dist.evaluation.variants import Variant
    from tenp_dist.passes.compute import Compute

    quieten()
    print_machine("torch", "transformers")
    out.mkdir(parents=True, exist_ok=True)
    compute = Compute("cpu", "float32", batch_tokens)
    texts = (
        _corpus(out, "calibration", calibration, samples, length, model),
        _corpus(out, "selection", selection, measured, length, model),
    )
    plan = _plan(model, leave, out / "plan.safetensors")
    forms = {f"before, lambda2 {value:g}": {"when": "before", "penalty": value} for value in penalty}
    forms |= {"after": {"when": "after"}} if after else {}
    curves, variants = {}, {"source": Variant(), "none": Variant(plan)}
    for name, form in forms.items():
        folder = out / name.replace(", ", "-").replace(" ", "-")
        curves[name] = _train(model, texts[0], folder, plan, tuple(leave), {**asked, **form}, compute)
        variants[name] = Variant(plan, training=folder)
    nll = _measured(model, texts[1], out / "evaluation", variants, compute)
    click.echo(f"\nlayers {', '.join(map(str, leave))} leave, {asked}")
    click.echo(f"{'training':<24} {'NLL added':>10} {'loss':>16} {'change':>16} {'s a step':>9}")
    for name in ("none", *forms):
        click.echo(f"{name:<24} {nll[name] - nll['source']:>10.4f} {curves.get(name, '')}")


def _train(model: Path, corpus: Path, folder: Path, plan: Path, leaving, asked: dict, compute) -> str:
    from tenp_dist.artifacts import digest_of, file_digest
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.evaluation.variants import Variant
    from tenp_dist.job_parts import Train
    from tenp_dist.run_files import training_state
    from tenp_dist.training.merge import merge_layer
    from tenp_dist.training.steps import Training

    source = open_source(model)
    key = digest_of([asked, leaving, file_digest(corpus), source.fingerprint])
    training = Training(
        model, corpus, folder, key, compute, source.facts.num_layers, leaving, Variant(plan),
        Train.model_validate(asked), {},
    )  # fmt: skip
    started, context = time.monotonic(), _context(source, folder / "ledger.jsonl")
    done = training.run(lambda number: context)
    seconds = (time.monotonic() - started) / max(len(done.curve), 1)
    for layer, small in training.small_set().items():
        merge_layer((source.index, None, training_state(folder), folder, key), layer, small)
    return f"{_ends(done.curve, 'loss')} {_ends(done.curve, 'change')} {seconds:>9.2f}"


def _measured(model: Path, corpus: Path, folder: Path, variants: dict, compute) -> dict[str, float]:
    """Variant -> mean NLL over domains."""
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.evaluation.measure import EvaluateTask, VariantsPass, drop_hidden, evaluate_model

    task = EvaluateTask([VariantsPass(model, variants)], corpus, folder, "bench", compute)
    found = evaluate_model(_context(open_source(model), folder / "ledger.jsonl"), task).summary()
    drop_hidden(task)
    return {name: figures["mean"]["nll"] for name, figures in found.items()}


def _context(source, ledger: Path):
    from tenp_dist.config import Cluster
    from tenp_dist.passes.placement import layer_bytes
    from tenp_dist.passes.run_pass import PassContext
    from tenp_dist.pool.in_process import InProcessPool
    from tenp_dist.progress import Ledger

    ledger.parent.mkdir(parents=True, exist_ok=True)
    return PassContext(InProcessPool(cores=1), Cluster(), layer_bytes(source.facts, 4), Ledger(ledger))


def _plan(model: Path, leaving, path: Path) -> Path:
    """A plan under which these layers leave and all else stays."""
    import numpy as np

    from tenp_dist.checkpoint.kept import KeptNeurons, write_kept
    from tenp_dist.checkpoint.source import open_source

    facts = open_source(model).facts
    experts, width = facts.num_experts, facts.intermediate_size
    whole = KeptNeurons.from_mask(np.ones((experts, width), dtype=bool))
    none = KeptNeurons.without_others((), experts, width)
    write_kept(path, {layer: none if layer in leaving else whole for layer in facts.moe_layers}, {})
    return path


def _corpus(out: Path, name: str, paths, samples: int, length: int, model: Path) -> Path:
    from tenp_dist.calibration.corpus import build_corpus, write_corpus
    from tenp_dist.checkpoint.source import open_source
    from tenp_dist.config import Text

    sources = [{"path": str(p.resolve()), "domain": p.name.split(".")[0], "samples": samples} for p in paths]
    text = Text.model_validate({"sources": sources, "sequence_length": length})
    path = out / f"{name}.arrow"
    write_corpus(path, build_corpus(text, model, open_source(model).facts.vocab_size))
    return path


def _ends(curve, key: str) -> str:
    tenth = max(len(curve) // 10, 1)  # steps see different text: the mean of some
    first, last = (sum(getattr(step, key) for step in part) / tenth for part in (curve[:tenth], curve[-tenth:]))
    return f"{first:.3f} -> {last:.3f}".rjust(16)


if __name__ == "__main__":
    main()
