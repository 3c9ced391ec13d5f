"""The proof of every row in the table of families, on a small random model of it.

Whatever the table lists is asked for: a row without a model in `helpers.families` fails.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.brute_force import brute_force_statistics
from helpers.checkpoints import all_tensors, verify, write
from helpers.evaluation import auto_class, evaluate, expected_figures, load, logits_of, masked
from helpers.families import RESIDUAL, save_family
from helpers.marks import BESIDE
from helpers.published import published
from helpers.routing import logits_by_layers
from helpers.scoring import batches_of, random_corpus, score
from tenp_dist.checkpoint.expert_layers import expert_layers
from tenp_dist.checkpoint.expert_slices import ExpertSlices
from tenp_dist.checkpoint.families.base import ANY
from tenp_dist.checkpoint.families.table import FAMILIES
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.kept import KeptNeurons
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.checkpoint.source import open_source
from tenp_dist.errors import UnsupportedModelError
from tenp_dist.evaluation.measure import VariantsPass
from tenp_dist.evaluation.variants import Variant
from tenp_dist.model.stock import build_model
from tenp_dist.model.tensor_names import check_tensors
from tenp_dist.passes.ranks import check_parallel
from tenp_dist.runtime.ragged_config import width_key
from tenp_dist.scoring.statistics import MERGE_RULES

TOKENS = torch.randint(2, 250, (2, 19), generator=torch.Generator().manual_seed(7))

AMPLIFIED = {"qwen3_next": 1e-4}  # its delta rule solves triangular systems: other kernels round them otherwise


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread):
    """One in all tests here."""


SOON = {"deepseek_v3", "qwen2_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "mixtral", "nemotron_h"}  # a form each
ROWS = [name if name in SOON else pytest.param(name, marks=BESIDE) for name in sorted(FAMILIES)]


@pytest.fixture(scope="module", params=ROWS)
def case(request, tmp_path_factory):
    """A family's row, a model of it as saved, and in the form of the published files."""
    root, name = tmp_path_factory.mktemp(request.param), request.param
    saved = save_family(root / "saved", name)
    return SimpleNamespace(
        name=name, row=FAMILIES[name], saved=saved, published=published(saved, root / "published", name)
    )


def narrow(folder, widths) -> dict[int, KeptNeurons]:
    """Random neurons of every expert of every MoE layer. widths: of experts 0, 1, ... in turn."""
    facts, draw = open_source(folder).facts, np.random.default_rng(3)
    kept = {}
    for layer in facts.moe_layers:
        mask = np.zeros((facts.num_experts, facts.intermediate_size), dtype=bool)
        for expert in range(facts.num_experts):
            mask[expert, draw.permutation(facts.intermediate_size)[: widths[expert % len(widths)]]] = True
        kept[layer] = KeptNeurons.from_mask(mask)
    return kept


def fewer(folder) -> dict[int, KeptNeurons]:
    """Other experts in every MoE layer, equally many in each group."""
    source, draw = open_source(folder), np.random.default_rng(5)
    facts, groups = source.facts, source.family.groups(source.index.config)
    size = facts.num_experts // groups
    return {
        layer: KeptNeurons.without_others(
            sorted(g * size + i for g in range(groups) for i in draw.permutation(size)[: max(size - 1, 1)]),
            facts.num_experts,
            facts.intermediate_size,
        )
        for layer in facts.moe_layers
    }


def shapes_of(row, config, **changes) -> dict[str, torch.Size]:
    model = build_model(row.with_numbers(config, changes), torch.float32, "eager")
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# names


def test_every_tensor_is_known_in_both_forms(case):
    for folder in (case.saved, case.published):
        check_tensors(open_source(folder).index)


@pytest.mark.parametrize("what", ["experts", "width"])
def test_the_row_names_all_that_depends_on_experts(case, what):
    """Of the model with other numbers, other tensors have another shape than those that the row tells of."""
    row, source = case.row, open_source(case.saved)
    config, layers = source.index.config, source.facts.moe_layers
    keys = row.experts_keys if what == "experts" else (row.width_key,)
    changes = dict.fromkeys(keys, 16)
    before, after = shapes_of(row, config), shapes_of(row, config, **changes)
    changed = {name for name in before if before[name] != after[name]}
    inside = tuple(f".{i}.{row.experts}." for i in layers)
    told = {name for name in before if any(part in name for part in inside) and "correction" not in name}
    fixed = {name for name in told if what == "width" and name.endswith("down_proj_bias")}
    assert told and told - fixed <= changed
    names = {k: v for k, v in stored_names(case.saved).items() if k in changed - told}
    for parameter in changed - told:
        inside = names[parameter].partition(".layers.")[2].partition(".")[2]
        if what == "experts":
            assert inside.startswith(row.router_tensors), parameter
        else:
            shared = row.shared_prefix if row.shared_widths(config) else "no module"
            assert inside.startswith((shared, *row.width_of_others)), parameter


def stored_names(folder) -> dict[str, str]:
    from tenp_dist.model.tensor_names import names_of_parameters

    source = open_source(folder)
    found = names_of_parameters(build_model(source.index.config, torch.float32, "eager"), source.index.tensors)
    return {parameter: stored.tensors[0] for parameter, stored in found.items()}


def test_the_runtime_seals_the_width_that_the_row_names(case):
    """The runtime has a table of its own: its text is copied into checkpoints."""
    assert width_key(case.name) == case.row.width_key


# one layer after another, and scores


@pytest.mark.parametrize("form", ["saved", "published"])
def test_layer_by_layer_equals_the_stock_forward(case, form, tmp_path):
    folder, corpus = getattr(case, form), random_corpus(256, padded=form == "saved")
    found = evaluate([VariantsPass(folder, {"source": Variant()})], corpus, tmp_path)
    logits = logits_of(load(folder), corpus)
    for i, domain in enumerate(corpus.domains):
        expected = expected_figures(logits, logits, corpus, i)
        assert found["source"]["domains"][domain]["nll"] == pytest.approx(expected["nll"], abs=2e-5)


def test_scores_equal_brute_force(case, tmp_path):
    corpus = random_corpus(256, sequences=4)
    scored = score(case.saved, corpus, tmp_path)
    expected = brute_force_statistics(
        case.saved, batches_of(corpus), domains=2, residual=RESIDUAL.get(case.name, "post_attention_layernorm")
    )
    assert scored.keys() == expected.keys() == set(open_source(case.saved).facts.moe_layers)
    for layer, statistics in scored.items():
        for name in MERGE_RULES:
            wanted = expected[layer][name]
            scale = wanted.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            assert ((statistics[name] - wanted).abs() / scale).max() < 1e-4, (layer, name)


# layouts


def test_ragged_padded_and_masked_are_one_model(case, tmp_path):
    kept = narrow(case.saved, (24, 7, 16))
    expected = masked(load(case.saved), kept)
    for layout in ("ragged", "padded"):
        write(case.saved, kept, tmp_path / layout, layout)
        verify(case.saved, kept, tmp_path / layout, layout, tmp_path)
        with torch.no_grad():
            found, wanted = load(tmp_path / layout)(TOKENS).logits, expected(TOKENS).logits
        bound = AMPLIFIED.get(case.name, 3e-5)
        assert (found - wanted).abs().max() <= bound * wanted.abs().max().clamp_min(1)
    with torch.no_grad():
        assert (load(case.saved)(TOKENS).logits - wanted).abs().max() > 1e-3, "pruning must show"
    model, options = load(tmp_path / "ragged"), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = TOKENS[:, :6]
    generated = [m.generate(prompt, attention_mask=torch.ones_like(prompt), **options) for m in (model, expected)]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(Exception, match="would fill them with random numbers"):
        type(expected).from_pretrained(tmp_path / "ragged")
    assert_same_tensors(all_tensors(tmp_path / "ragged"), {"again": tmp_path / "again"})


def assert_same_tensors(wanted, folders) -> None:
    from safetensors.torch import load_file

    for folder in folders.values():
        files = sorted(folder.glob("*.safetensors"))
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_all_kept_gives_the_bytes_of_the_source(case, tmp_path):
    full = narrow(case.published, (24,))
    for layout in ("ragged", "padded", "uniform"):
        write(case.published, full, tmp_path / layout, layout)
        read = apart if layout == "ragged" else all_tensors
        found, wanted = read(tmp_path / layout), read(case.published)
        assert found.keys() <= wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        left = wanted.keys() - found.keys()
        assert not left or (layout == "uniform" and all("mtp" in n or n.startswith(last_layer(case)) for n in left))


def apart(folder) -> dict[str, torch.Tensor]:
    """With every part of an expert by itself, wherever it lies."""
    with TensorReader(open_index(folder)) as reader:
        return {name: reader.tensor(name) for name in reader.index.tensors}


def last_layer(case) -> str:
    return case.row.layer.format(layer=open_source(case.saved).facts.num_layers)


@torch.no_grad()
def test_stock_loads_fewer_experts(case, tmp_path):
    """As REAP removes them, from the published form; and the pass over the source that leaves them out agrees."""
    kept = fewer(case.published)
    write(case.published, kept, tmp_path / "uniform", "uniform")
    verify(case.published, kept, tmp_path / "uniform", "uniform", tmp_path)
    found = load_whole(tmp_path / "uniform", case)(TOKENS).logits
    stay = {layer: neurons.experts.tolist() for layer, neurons in kept.items()}
    streamed = logits_by_layers(case.published, stay, TOKENS, {})
    torch.testing.assert_close(found, streamed, rtol=1e-4, atol=3e-5)
    assert (load(case.published)(TOKENS).logits - streamed).abs().max() > 1e-3


@torch.no_grad()
def test_stock_loads_one_width(case, tmp_path):
    if case.row.width_of_others:  # `check_width` refuses it, from the job alone
        return
    kept = narrow(case.published, (8,))
    write(case.published, kept, tmp_path / "uniform", "uniform")
    verify(case.published, kept, tmp_path / "uniform", "uniform", tmp_path)
    found, wanted = load_whole(tmp_path / "uniform", case)(TOKENS).logits, masked(load(case.saved), kept)(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


def load_whole(folder, case):
    """By stock transformers, which knows no prediction layers: no other tensor is left over, and none is missing."""
    model, info = auto_class(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = [name for name in info["unexpected_keys"] if not name.startswith((last_layer(case), *case.row.mtp_tensors))]
    assert not left and not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()


# ranks


def test_ranks_are_verified_or_refused_by_name(case):
    config = open_source(case.saved).index.config
    if case.row.tensor_parallel:  # `tests/passes/test_parallel.py` runs them
        check_parallel(case.row, config, 2)
    else:
        with pytest.raises(UnsupportedModelError, match="not verified") as caught:
            check_parallel(case.row, config, 2)
        assert case.name in str(caught.value.found)


def test_experts_lie_where_the_row_says(case):
    tensors = open_source(case.saved).index.tensors
    for layer in open_source(case.saved).facts.moe_layers:
        for _, _, place in ExpertSlices(case.row).of_layer(layer, range(8)):
            assert place.tensor in tensors


def refused_form(case, key) -> None:
    index = open_index(case.saved)
    text = {**case.row.text(index.config), key: 16}
    config = text if case.row.section is None else {**index.config, case.row.section: text}
    with pytest.raises(UnsupportedModelError, match=f"{case.name} in a form that is not scored yet") as caught:
        expert_layers(replace(index, config=config), case.row)
    assert key in str(caught.value.where) and caught.value.found == 16


def test_layers_that_need_more_than_hidden_states_are_refused_by_name(case):
    """GLM-5 may have layers that take what the layer before has chosen; nothing hands that on."""
    for key, form in case.row.refused.items():
        if form == ANY:
            refused_form(case, key)
            continue
        config = dict(open_source(case.saved).index.config)
        layers = ["full", *[form] * (len(config[key]) - 1)]
        with pytest.raises(UnsupportedModelError, match=f"{case.name} in a form that is not scored yet") as caught:
            build_model(config | {key: layers}, torch.float32, "eager")
        assert key in str(caught.value.where)
