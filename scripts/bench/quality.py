"""Quality at a size: every method at several retentions, plain and compensated, on text that no plan saw.

Three tables, all in NLL added over the full model, nats per token, mean over domains:
  methods  every registered method (those that draw by chance with three seeds) at every retention
  samples  how much calibration text it takes, 1 to 128 sequences a domain
  domains  calibrated on one domain or on all, measured on each
Plans of a table are measured in one pass over the model. `tenp auto` is TENP with `important` and `slope` chosen on a
quarter of the calibration text, which its scores then lack.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import print_machine
from scoring import ROOT

TABLES = ("methods", "samples", "domains")
BEST = ("obs", "global", "tenp", "enp")  # lines of the tables of samples and domains, where they are registered
GRADIENTS = ("fisher", "taylor", "gradient", "heapr")
FORMS = {
    False: "",
    True: " + compensated",
    "joint": " + compensated jointly",
    "sequential": " + compensated layer after layer",
}
PATHS = click.Path(path_type=Path, exists=True)


@click.command(help=__doc__)
@click.option("--model", type=PATHS, default=ROOT / "jobs/quickstart/moe-4m", show_default=True)
@click.option("--calibration", type=PATHS, multiple=True, required=True, help="jsonl with `text`, one a domain")
@click.option("--selection", type=PATHS, multiple=True, required=True, help="the same domains, to measure on")
@click.option("--samples", default=32, show_default=True, help="calibration sequences a domain")
@click.option("--measured", default=32, show_default=True, help="sequences a domain to measure on")
@click.option("--length", default=256, show_default=True, help="tokens per sequence")
@click.option("--retentions", default="0.6,0.45,0.3,0.15", show_default=True)
@click.option("--seeds", default=3, show_default=True, help="of methods that draw by chance")
@click.option("--counts", default="1,2,4,8,16,32,64,128", show_default=True, help="of the table of samples")
@click.option("--tables", default=",".join(TABLES), show_default=True)
@click.option("--only", default="", help="methods, separated by commas; default: all")
@click.option("--lines", default="", help="of methods with several lines those that say this, like `3 widths`")
@click.option("--neuron-domains", type=click.Choice(["scaled", "mean"]), default="scaled", show_default=True)
@click.option("--compensate/--plain", default=True, show_default=True)
@click.option("--auto/--no-auto", default=True, show_default=True, help="TENP with `important` and `slope` chosen too")
@click.option("--threads", default=None, type=int, help="default: all cores")
@click.option("--out", type=click.Path(path_type=Path), default=Path("quality"), show_default=True)
def main(model, calibration, selection, samples, measured, length, retentions, seeds, counts, tables, only, lines,
         neuron_domains, compensate, auto, threads, out):  # fmt: skip
    from study import CalibrationSet, Study

    from tenp_dist.cli.view import quieten
    from tenp_dist.pool.machine import available_cores
    from tenp_dist.scoring.methods import registry

    quieten()
    print_machine("torch", "transformers")
    study = Study(model, out / "work", length, threads or available_cores())
    domains = {path.name.split(".")[0]: path for path in calibration}
    held_out, _ = study.corpora(CalibrationSet("held out", _sources(selection, measured)))
    click.echo(f"model     {model.name}, calibrated on {samples} x {length} tokens a domain ({', '.join(domains)})")
    options = {
        "methods": only.split(",") if only else registry.names(),
        "retentions": retentions.split(","),
        "seeds": range(seeds),
        "compensate": compensate,
        "auto": auto,
        "lines": lines,
        "neuron_domains": neuron_domains,
        "samples": samples,
        "counts": [int(count) for count in counts.split(",")],
    }
    rows = []
    for table in tables.split(","):
        sets, cases = {"methods": by_method, "samples": by_count, "domains": by_domain}[table](
            study, domains, **options
        )
        rows += study.rows(cases, sets, held_out)
        write(out, rows)
    for table in tables.split(","):
        show(table, [row for row in rows if row["table"] == table], list(domains))
    if "methods" in tables:
        draw(out / "quality.png", [row for row in rows if row["table"] == "methods"])


def _sources(paths: Sequence[Path], count: int) -> tuple:
    return tuple((path, path.name.split(".")[0], count) for path in paths)


def by_method(
    study, domains: Mapping[str, Path], *,
    methods, lines, retentions, seeds, compensate, auto, samples, neuron_domains, **_,
):  # fmt: skip
    """Every method; compensated too where experts keep a part of their neurons."""
    from study import CalibrationSet, Case

    from tenp_dist.config import Budget

    text = _sources(domains.values(), samples)
    sets = {"all": CalibrationSet("all", text), "split": CalibrationSet("split", text, Fraction(1, 4))}
    cases, choices = [], []
    for name in methods:
        for retention in retentions:
            for seed in seeds if name.startswith("random") else [0]:
                for line, changes in settings(name, lines):
                    settled = {"retention": retention, "seed": seed, "neuron_domains": neuron_domains}
                    budget = Budget(method=name, **settled, **changes)
                    cases.append(Case("methods", line, budget, "all"))
    if auto and "tenp" in methods:
        asked = {"important": "auto", "slope": "auto", "neuron_domains": neuron_domains}
        open_budgets = [Budget(retention=retention, **asked) for retention in retentions]
        for solved in (False, True) if compensate else (False,):  # each chosen as it is measured
            chosen = study.choose(open_budgets, sets["split"], compensated=solved)
            choices += [Case("methods", "tenp auto", budget, "split", solved) for budget in chosen]
    return sets, cases + _compensated(cases, compensate) + choices


def settings(method: str, lines: str = "") -> list[tuple[str, dict]]:
    """Lines of the table, those that say `lines`, and the budget keys of each: what a method has besides its name."""
    if method in ("reap", "hope"):
        found = [(method, {}), (f"{method}, pooled", {"expert_domains": "pooled"})]
        found += [(f"{line}, global counts", {**keys, "expert_counts": "global"}) for line, keys in found]
        return [one for one in found if lines in one[0]]
    if method in ("global", "obs"):
        found = [
            (f"{method}, align 16, 2 widths", {"align": 16, "max_widths": 2}),
            (f"{method}, align 16, 3 widths", {"align": 16, "max_widths": 3}),
            *([("obs, align 16, a width a layer", {"align": 16, "max_widths": 1})] if method == "obs" else []),
            (f"{method}, free widths", {"align": 1, "max_widths": 10**6}),
        ]
        return [one for one in found if lines in one[0]]
    if method in GRADIENTS:
        return [(f"{method}, free widths", {"align": 1, "max_widths": 10**6})]
    if method == "saap":
        return [
            (f"saap, {way}, free widths", {"unstable": way, "max_widths": 10**6}) for way in ("keep", "even", "prune")
        ]
    return [(method, {})]


def _compensated(cases, compensate: bool) -> list:
    from dataclasses import replace

    from study import SEQUENTIAL

    from tenp_dist.budget.kinds.table import kind_of
    from tenp_dist.config import JOINT

    narrowing = [case for case in cases if kind_of(case.budget).leaves_narrow]
    apart = [replace(case, compensated=True) for case in narrowing] if compensate else []
    together = [case for case in cases if compensate and case.table == "methods"]
    return apart + [replace(case, compensated=form) for form in (JOINT, SEQUENTIAL) for case in together]


def by_count(study, domains: Mapping[str, Path], *, methods, counts, compensate, **_):
    """Calibrated on so many sequences a domain, as far as the text goes."""
    from study import CalibrationSet, Case

    from tenp_dist.config import Budget
    from tenp_dist.errors import CalibrationError

    sets, cases = {}, []
    for count in counts:
        text = CalibrationSet(str(count), _sources(domains.values(), count))
        try:
            study.corpora(text)
        except CalibrationError as error:
            click.echo(f"left out  {count} sequences: {error.what} ({error.where})")
            continue
        sets[text.name] = text
        for line, changes in [settings(name)[-1] for name in BEST if name in methods]:
            for retention in ("0.6", "0.3"):
                budget = Budget(method=line.split(",")[0], retention=retention, **changes)
                cases.append(Case("samples", line, budget, text.name))
    return sets, cases + _compensated(cases, compensate)


def by_domain(study, domains: Mapping[str, Path], *, methods, compensate, samples, **_):
    """As many sequences of one domain as of all domains together."""
    from study import CalibrationSet, Case

    from tenp_dist.config import Budget

    share = max(1, samples // len(domains))
    sets = {"all": CalibrationSet("all", _sources(domains.values(), share))}
    sets |= {name: CalibrationSet(name, ((path, name, samples),)) for name, path in domains.items()}
    cases = [
        Case("domains", line, Budget(method=line.split(",")[0], retention="0.6", **changes), name)
        for name in sets
        for line, changes in [settings(one)[-1] for one in BEST if one in methods]
    ]
    return sets, cases + _compensated(cases, compensate)


def write(out: Path, rows: Sequence[Mapping]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
    with open(out / "quality.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(table: str, rows: Sequence[Mapping], domains: Sequence[str]) -> None:
    """One line per method and form; columns: retentions, numbers of sequences, or domains."""
    click.echo(f"\n{table}: NLL added")
    key = {"methods": "retention", "samples": "calibration", "domains": None}[table]
    fixed = {"methods": (), "samples": ("retention",), "domains": ("calibration",)}[table]
    columns = list(dict.fromkeys(row[key] for row in rows)) if key else [*domains, "mean"]
    click.echo(f"{'':<46}" + "".join(f"{column:>10}" for column in columns))
    lines = dict.fromkeys((row["line"], *(row[name] for name in fixed), row["compensated"]) for row in rows)
    for line in lines:
        own = [row for row in rows if (row["line"], *(row[name] for name in fixed), row["compensated"]) == line]
        cells = [_cell(own, key, column) for column in columns]
        label = ", ".join(map(str, line[:-1])) + FORMS[line[-1]]
        click.echo(f"{label:<46}" + "".join(f"{cell:>10}" for cell in cells))


def _cell(rows: Sequence[Mapping], key: str | None, column: str) -> str:
    """The mean over seeds."""
    name = "nll_added" if key or column == "mean" else f"nll_added {column}"
    values = [row[name] for row in rows if key is None or row[key] == column]
    return f"{statistics.mean(values):.4f}" if values else "-"


def draw(path: Path, rows: Sequence[Mapping]) -> None:
    """NLL added against the share of routed parameters kept: a line per method, dashed where compensated."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    least = {row["line"]: row["nll_added"] for row in sorted(rows, key=lambda row: -row["nll_added"])}
    lines, colors = sorted(least, key=least.get, reverse=True), colormaps["tab20"]
    for place, line in enumerate(lines):
        for compensated, style in ((False, "-"), (True, "--"), ("joint", ":"), ("sequential", "-.")):
            points = {}
            for row in rows:
                if (row["line"], row["compensated"]) == (line, compensated):
                    points.setdefault(row["retention"], []).append((row["realised"], row["nll_added"]))
            xy = sorted(tuple(statistics.mean(axis) for axis in zip(*seeds, strict=True)) for seeds in points.values())
            label = line if not compensated else None
            if xy:
                look = {"marker": "o", "markersize": 3, "color": colors(place % 20)}
                axes.plot(*zip(*xy, strict=True), style, label=label, **look)
    axes.set_yscale("log")
    axes.set_xlabel("share of routed-expert parameters kept")
    axes.set_ylabel("NLL added, nats per token")
    figure.legend(loc="outside right upper", fontsize="small", title="dashed: compensated, dotted: jointly")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
