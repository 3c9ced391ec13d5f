"""`tenp-dist compare`: two checkpoints on the same prompts, for the eye."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenp_dist.cli.outcome import exit_on_error, with_examples

EXAMPLES = ["SOURCE PRUNED --prompts FILE", "SOURCE PRUNED --prompts FILE --max-new-tokens 200 --html page.html"]
_folder = click.Path(path_type=Path)


@click.command("compare", help=with_examples("compare", "Let two checkpoints answer the same prompts.", EXAMPLES))
@click.argument("source")
@click.argument("pruned")
@click.option("--prompts", type=_folder, required=True, help="A prompt a line, or .jsonl with `prompt` or `text`.")
@click.option("--max-new-tokens", "length", type=click.IntRange(1), default=64, show_default=True, help="Of an answer.")
@click.option("--chat", is_flag=True, help="Prompts are users' messages: put them through the chat template.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where the models run.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="auto: float32 on CPU, the checkpoint's own on accelerators.",
)
@click.option("--html", type=_folder, help="Write a self-contained page too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def compare(as_json: bool, debug: bool, **options: Any) -> None:
    with exit_on_error(as_json=as_json, debug=debug):
        found = _compare(**options)
        if as_json:
            click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            draw(found)


def _compare(source: str, pruned: str, prompts: Path, html: Path | None, **options: Any) -> dict[str, Any]:
    from tenp_dist.cli.view import quieten
    from tenp_dist.comparison.compare import compare as compare_models
    from tenp_dist.comparison.page import write_page
    from tenp_dist.comparison.prompts import read_prompts
    from tenp_dist.job_file import resolve_model
    from tenp_dist.origins.table import fetched

    quieten()
    texts = read_prompts(prompts)
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        first, second = (fetched(resolve_model(Path.cwd(), model), status.update) for model in (source, pruned))
        found = compare_models(first, second, texts, announce=status.update, **options)
    if html is not None:
        write_page(html, found)
        console.print(f"Page: {html}", soft_wrap=True)
    return found


def draw(comparison: Mapping[str, Any]) -> None:
    """Both answers side by side, a row a prompt; what comes after the first difference stands out."""
    console = Console(highlight=False)
    table = Table(show_lines=True)
    for heading in ("prompt", "source", "pruned"):
        table.add_column(heading, overflow="fold", ratio=1 if heading == "prompt" else 2)
    for answer in comparison["answers"]:
        columns = [_answer(answer[model]["tokens"], answer["first_divergence"]) for model in ("source", "pruned")]
        table.add_row(Text(answer["prompt"]).append(f"\n\n{_figures(answer)}", style="dim"), *columns)
    console.print(table)
    console.print(
        f"{comparison['same']} of {len(comparison['answers'])} answers are the same. Along the source's answers: "
        f"KL {comparison['mean_kl']:.4f} nats per token, same top token at {comparison['agreement']:.1%}.",
        soft_wrap=True,
    )


def _answer(tokens: list[str], first: int | None) -> Text:
    place = len(tokens) if first is None else first
    return Text("".join(tokens[:place])).append("".join(tokens[place:]), style="bold yellow")


def _figures(answer: Mapping[str, Any]) -> str:
    first, kl = answer["first_divergence"], answer["kl"]
    parting = "same answer" if first is None else f"parts at token {first + 1} of {len(kl)}"
    return f"{parting}\nKL {sum(kl) / max(len(kl), 1):.4f}, at most {max(kl, default=0.0):.4f}"
