"""Who may know whom: rooms import from those before them, files make no circles, a few rooms know nothing of others."""

from __future__ import annotations

import pytest

from helpers.source_files import PACKAGE, SOURCES, import_graph, imports_of, module_of, name_of

ROOMS = [
    "errors", "artifacts", "job_values", "job_parts",
    "config", "job_file", "run_files", "progress", "runtime", "checkpoint", "origins", "calibration",
    "model", "pool", "pipeline", "passes", "scoring", "compensation", "elimination", "budget", "layouts", "evaluation",
    "depth", "training", "search", "benchmark", "report", "comparison", "preflight", "estimate", "stages", "launch",
    "cli",
]  # fmt: skip
FILES = [path for path in SOURCES if path != PACKAGE / "__init__.py"]
SOLVERS = {"compensation", "elimination"}
STRANGERS = {  # room -> rooms before it that it knows nothing of
    "runtime": {
        "artifacts",
        "job_values",
        "job_parts",
        "config",
        "job_file",
        "run_files",
        "progress",
    },  # its text is copied into checkpoints
    "pool": {"config", "job_file", "runtime", "checkpoint", "origins", "calibration", "model"},
    "pipeline": {"config", "job_file", "runtime", "checkpoint", "origins", "calibration", "model"},
    "launch": {
        "checkpoint",
        "origins",
        "model",
        "passes",
        "scoring",
        "budget",
        "layouts",
        "evaluation",
        "search",
        *SOLVERS,
    },
    "cli": {"checkpoint", "model", "passes", "scoring", "budget", "evaluation", "search", *SOLVERS},
}
RAY = {f"pool/ray_{name}.py" for name in ("client", "environment", "metrics", "nodes", "placement", "results")} | {
    "launch/submit.py"
}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tenp_dist" and len(parts) > 1 else None


def test_every_room_is_named():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert found == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_upwards(path):
    own = room_of(module_of(path))
    later = {
        module
        for module in imports_of(path)
        if (room := room_of(module)) in ROOMS and ROOMS.index(room) > ROOMS.index(own)
    }
    assert not later, f"{own} may import only from the rooms before it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_know_nothing_of_strangers(path):
    strangers = STRANGERS.get(room_of(module_of(path)), set())
    assert not {module for module in imports_of(path) if room_of(module) in strangers}


def test_no_circle_of_imports_among_files():
    graph, done = import_graph(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_nobody_imports_what_is_private_to_a_module():
    private = [
        f"{name_of(path)}: {module}"
        for path in SOURCES
        for module in imports_of(path)
        if module.startswith("tenp_dist.") and module.rpartition(".")[2].startswith("_") and not module.endswith("__")
    ]
    assert not private


def test_ray_is_imported_by_few():
    """And its job client, which runs where no cluster is, by the one that submits jobs."""
    found = {name_of(path) for path in SOURCES if any(module.split(".")[0] == "ray" for module in imports_of(path))}
    assert found == RAY
