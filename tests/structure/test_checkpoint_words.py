"""Families and formats are data: their words stand in their own files, and a new one is found by its table."""

from __future__ import annotations

import ast
import dataclasses
import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.source_files import SOURCES, name_of
from tenp_dist.checkpoint import families, formats
from tenp_dist.checkpoint.entries import StoredTensors, TensorEntry
from tenp_dist.checkpoint.facts import Facts
from tenp_dist.checkpoint.families.base import DOWN, GATE, UP, Family
from tenp_dist.checkpoint.families.refused import REASONS
from tenp_dist.checkpoint.families.table import FAMILIES, family_of
from tenp_dist.checkpoint.formats import table as formats_table
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import SourceError, UnsupportedModelError

NAMES = re.compile(r"mlp\.experts|mlp\.gate|gate_proj|(?<!gate_)up_proj|model\.layers|layernorm|lm_head|embed_tokens")


def keys_of(row: Family) -> set[str]:
    """Every config key that a row names."""
    stated = [getattr(row, field.name) for field in dataclasses.fields(row) if field.name.endswith(("_key", "_keys"))]
    return {key for keys in stated if keys for key in ((keys,) if isinstance(keys, str) else keys)}


KEYS = {"model_type"}.union(*map(keys_of, FAMILIES.values())) - {"intermediate_size"}  # plan.json has one of that name
FACTS = {field.name for field in dataclasses.fields(Facts)}  # facts have names of their own, some of them the same
OTHERS = [path for path in SOURCES if not name_of(path).startswith(("checkpoint/families/", "runtime/"))]


def literals(path) -> Iterator[ast.Constant]:
    """String constants that are no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node


def looked_up(path) -> Iterator[ast.expr]:
    """What stands in `x[...]` and first in `x.get(...)`, but for a stage's own `summary`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript):
            if not (isinstance(node.value, ast.Name) and node.value.id == "summary"):
                yield node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            yield from node.args[:1]


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_names_of_tensors_and_modules_stand_in_rows(path):
    assert not [f"line {node.lineno}: {node.value}" for node in literals(path) if NAMES.search(node.value)]


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_keys_of_configs_stand_in_rows(path):
    written = [node for node in literals(path) if node.value in KEYS - FACTS]
    read = [node for node in looked_up(path) if isinstance(node, ast.Constant) and node.value in KEYS]
    assert not [f"line {node.lineno}: {node.value}" for node in (*written, *read)]


def test_every_file_of_families_is_in_the_table():
    names = {module.name for module in pkgutil.iter_modules(families.__path__)} - {"base", "table", "refused"}
    rows = [row for name in names for row in import_module(f"{families.__name__}.{name}").ROWS]
    assert {row.model_type: row for row in rows} == FAMILIES and len(rows) == len(FAMILIES)


def test_a_family_is_supported_or_refused():
    assert not FAMILIES.keys() & REASONS.keys()
    for model_type, reason in REASONS.items():
        with pytest.raises(UnsupportedModelError, match=re.escape(f"{model_type} cannot be pruned yet: {reason}")):
            family_of({"model_type": model_type, "text_config": {"num_experts": 4}})


def test_every_file_of_formats_is_in_the_table():
    names = {module.name for module in pkgutil.iter_modules(formats.__path__)} - {"base", "table", "plain"}
    assert {type(form).__module__.rpartition(".")[2] for form in formats_table.FORMATS} == names


@dataclasses.dataclass(frozen=True)
class Halved:
    """Whole numbers that stand for their halves."""

    numbers: TensorEntry
    format = "halves"

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        return (self.numbers,)

    def decode(self, source: StoredTensors, target: torch.Tensor) -> None:
        for part, piece in zip(target.split(2), source.pieces(self.numbers, 2), strict=True):
            part.copy_(piece.float() / 2)


class Halves:
    """A format of whole numbers `X.doubled` for every tensor X."""

    described = "halves"

    def recognises(self, config):
        return config.get("stored_as") == "halves"

    def fold(self, folder, config, tensors):
        return {
            (name := entry.name.removesuffix(".doubled")): replace(
                entry, name=name, dtype="F32", nbytes=4 * entry.nbytes, stored=Halved(entry)
            )
            for entry in tensors.values()
        }

    def plain_config(self, config):
        return {key: value for key, value in config.items() if key != "stored_as"}


@pytest.mark.parametrize("shape", [(5, 3), (4, 2), (1, 1), (7,), (3, 2, 2)])
def test_a_new_format_is_an_entry_of_the_table(monkeypatch, tmp_path, shape):
    monkeypatch.setattr(formats_table, "FORMATS", (*formats_table.FORMATS, Halves()))
    doubled = torch.randint(-128, 127, shape, dtype=torch.int8)
    save_file({"x.doubled": doubled}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"stored_as": "halves", "other": 1}))
    index = open_index(tmp_path)
    assert index.config == {"other": 1} and list(index.tensors) == ["x"]
    assert (index.nbytes, index.tensors["x"].stored_bytes) == (4 * doubled.numel(), doubled.numel())
    with TensorReader(index) as reader:
        assert torch.equal(reader.tensor("x"), doubled / 2)
        half = torch.zeros(*shape, 2, dtype=torch.bfloat16)
        reader.into("x", half[..., 1])
        assert torch.equal(half[..., 1], (doubled / 2).bfloat16()) and not half[..., 0].any()


OTHER = Family(
    model_type="other_moe",
    section="language",
    layers_keys=("depth",),
    hidden_key="channels",
    vocab_key="words",
    experts_keys=("specialists",),
    top_k_key="asked",
    width_key="neurons",
    layer="language.blocks.{layer}.",
    expert_tensor="moe.{expert}.{matrix}",
    matrices={GATE: "w1", UP: "w3", DOWN: "w2"},
)
LANGUAGE = {"depth": 3, "channels": 8, "words": 50, "specialists": 4, "asked": 2, "neurons": 6}


@pytest.fixture
def other(monkeypatch, tmp_path):
    """A checkpoint of a family with a nested config and names of its own; layer 0 is dense, layer 3 for prediction."""
    monkeypatch.setitem(FAMILIES, OTHER.model_type, OTHER)
    tensors = {"language.words": torch.randn(50, 8), "sight.patch": torch.randn(4, 4)}
    tensors["language.blocks.3.join"] = torch.randn(8, 16)
    for layer in range(4):
        tensors[f"language.blocks.{layer}.norm"] = torch.randn(8)
        for expert in range(4 if layer else 0):
            shapes = {"w1": (6, 8), "w3": (6, 8), "w2": (8, 6)}
            tensors |= {f"language.blocks.{layer}.moe.{expert}.{m}": torch.randn(*s) for m, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, LANGUAGE)
    return tmp_path


def write_config(folder, language: dict) -> None:
    config = {"model_type": "other_moe", "dtype": "float32", "language": language}
    (folder / "config.json").write_text(json.dumps(config))


def test_integers_that_are_no_packed_numbers_are_not_called_quantised(other):
    """Ids of a table of tokens; what a family's model lacks is refused elsewhere, by its name."""
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"language.table": torch.arange(4)}, other / "model.safetensors")
    assert open_source(other).facts.num_experts == 4
    save_file(tensors | {"language.packed": torch.arange(4).int()}, other / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="quantised"):
        open_source(other)


def test_a_new_family_is_a_row(other):
    source = open_source(other)
    facts = source.facts
    assert (source.family, facts.family) == (OTHER, "other_moe")
    assert (facts.num_layers, facts.moe_layers, facts.mtp_layers) == (3, (1, 2), (3,))
    assert (facts.num_experts, facts.top_k, facts.intermediate_size) == (4, 2, 6)
    assert (facts.hidden_size, facts.vocab_size) == (8, 50)
    assert facts.parameters.routed == 2 * 4 * 3 * 6 * 8 and facts.bytes.routed == 4 * facts.parameters.routed


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"depth": None}, "language.depth"),
        ({"asked": 5}, "language.asked"),
        ({"specialists": -1}, "language.specialists"),
        ({"words": "many"}, "language.words"),
    ],
)
def test_what_is_wrong_is_called_by_the_rows_keys(other, changes, where):
    write_config(other, LANGUAGE | changes)
    with pytest.raises(SourceError) as raised:
        open_source(other)
    assert raised.value.where.endswith(f"config.json: {where}")
