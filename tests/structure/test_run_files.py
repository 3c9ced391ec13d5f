"""Files of a run directory are named in `run_files.py` and nowhere else; facts are read by their names."""

from __future__ import annotations

import ast
import re

import pytest

from helpers.source_files import PACKAGE, SOURCES, name_of

NAMES = re.compile(
    r"(facts|plan|selection|compensation|verify|evaluation|report|progress|threads)\.jsonl?|plan\.safetensors"
    r"|(calibration|selection|evaluation)\.arrow|index\.html|\.ledger\.jsonl|layer_\*|wave_|\.rank_|\.writing\.json|\.lock"
    r"|(scores|stages|checkpoint|evaluation|selection|compensation|report|logs|verify|calibration)/\S*"
)
SHOWN = {"pipeline/names.py"}  # help texts
READERS = {"launch/doctor.py", "launch/submit.py", "launch/slurm.py"}  # of other folders
OWNS = {"owns", "scratch"}  # what a stage declares as its own


def literals(path):
    """String constants that are no docstring, no part of an error, and no declaration of what a stage owns."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.keyword) and node.arg in OWNS | {"next_step", "wanted", "found"}:
            skipped |= set(ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "run_files.py"], ids=name_of)
def test_no_path_of_a_run_directory_is_spelt_elsewhere(path):
    if name_of(path) in SHOWN | READERS:
        return
    found = [text for text in literals(path) if NAMES.fullmatch(text.strip("/"))]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_facts_are_typed(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id != "facts", f"line {node.lineno}: facts are fields"


def test_the_names_that_runs_have_today():
    """Runs of earlier versions stay readable: these names do not change."""
    from tenp_dist.run_files import RunFiles, layer_file, owner_file, wave_file, worker_logs

    files = RunFiles(PACKAGE)
    names = {
        files.facts: "facts.json",
        files.calibration: "calibration/calibration.arrow",
        files.selection_text: "calibration/selection.arrow",
        files.scores.layer(3): "scores/layer_00003.safetensors",
        files.scores.part(3, 1, 2): "scores/parts/layer_00003.rank_001-of-002.safetensors",
        files.plan: "plan.json",
        files.plan_tensors: "plan.safetensors",
        files.compensation: "compensation.json",
        layer_file(files.compensation_folder, 3, 1, 2): "compensation/layer_00003.rank_001-of-002.safetensors",
        files.checkpoint("ragged"): "checkpoint/ragged",
        files.evaluation: "evaluation.json",
        files.held_out: "evaluation/evaluation.arrow",
        files.random_control: "evaluation/random",
        files.report_page: "report/index.html",
        files.record("plan"): "stages/plan.json",
        files.ledger("score"): "stages/score.ledger.jsonl",
        files.journal: "stages/progress.jsonl",
        wave_file(files.scores.hidden, 2, 4): "scores/hidden/wave_002.layer_00004.safetensors",
        owner_file(files.scores.hidden, 4, 1): "scores/hidden/owners/layer_00004.rank_001",
        worker_logs(files.scores.folder): "logs/scores",
    }
    assert {files.relative(path) for path in names} == set(names.values())
    for path, name in names.items():
        assert files.relative(path) == name
