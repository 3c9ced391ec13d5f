"""The `transformers` runtime of ragged checkpoints, against the stock model with pruned neurons zeroed.

Every family gets a small random model, a copy whose pruned columns of `down_proj` are zero (the
masked model: same function, stock code) and a ragged folder cut by hand from the saved tensors.
"""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tenp_dist
from tenp_dist.artifacts import write_json
from tenp_dist.runtime.auto_classes import modeling_source
from tenp_dist.runtime.ragged_config import FAMILIES, ragged_config, widths_by_layer

EXPERTS, NEURONS, VOCABULARY = 8, 24, 64
# per MoE layer: three widths of which one is not a multiple of 8 and one is full; one width; not pruned
WIDTHS = [[24, 8, 13, 8, 8, 24, 8, 13], [16] * EXPERTS, None]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": NEURONS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
SETTINGS = {
    "deepseek_v2": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 4,
        "topk_method": "group_limited_greedy",
        **LATENT,
        **GROUPS,
    },
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 3,
        "norm_topk_prob": True,
        **LATENT,
        **GROUPS,
    },
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 40, "num_hidden_layers": 3},
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "num_hidden_layers": 3, "head_dim": 8},
}
TOKENS = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """One family: its ragged folder, the widths in it, and the masked stock model."""

    family: str
    source: Path
    folder: Path
    widths: dict[int, list[int]]
    masked: torch.nn.Module


def auto_load(folder, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def stock_model(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **SETTINGS[family])).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def kept_neurons(model):
    """Decoder layer -> sorted neurons kept per expert, at random."""
    layers = [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    return {
        layer: [torch.randperm(NEURONS)[:width].sort().values for width in widths]
        for layer, widths in zip(layers, WIDTHS, strict=True)
        if widths is not None
    }


def mask(model, kept):
    for layer, neurons in kept.items():
        down_EDF = model.model.layers[layer].mlp.experts.down_proj.data
        for expert, indices in enumerate(neurons):
            pruned = torch.ones(NEURONS, dtype=torch.bool)
            pruned[indices] = False
            down_EDF[expert][:, pruned] = 0


def cut_folder(source, folder, family, kept):
    """A ragged folder: the contract of the writer, in its simplest form."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for layer, neurons in kept.items():
        for expert, indices in enumerate(neurons):
            for matrix, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                tensors[name] = tensors[name].index_select(axis, indices).contiguous()
    widths = {layer: [len(indices) for indices in neurons] for layer, neurons in kept.items()}
    config = json.loads((source / "config.json").read_text())
    config = ragged_config(config, widths_by_layer=widths, retention="0.6", fingerprint="f" * 64)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"modeling_tenp_{family}.py").write_text(modeling_source(family))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return widths


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than these matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return {family: make_case(family, tmp_path_factory.mktemp(family)) for family in SETTINGS}


def make_case(family, root):
    model = stock_model(family)
    model.save_pretrained(root / "source")
    kept = kept_neurons(model)
    widths = cut_folder(root / "source", root / "ragged", family, kept)
    mask(model, kept)
    return Case(family, root / "source", root / "ragged", widths, model)


@pytest.fixture(params=sorted(SETTINGS))
def case(request, cases):
    return cases[request.param]


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def same_tensors(one, other):
    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# loading and parity


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_logits_equal_the_masked_model(case, device_map):
    model, info = auto_load(case.folder, device_map=device_map, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == f"Tenp{FAMILIES[case.family]}ForCausalLM"
    difference = (logits(model) - logits(case.masked)).abs().max()
    assert difference < 1e-5
    # the check can fail: pruning itself moves the logits by far more
    assert (logits(auto_load(case.source)) - logits(case.masked)).abs().max() > 0.1


def test_bfloat16_within_rounding(case):
    model = auto_load(case.folder, dtype=torch.bfloat16)
    expected = logits(auto_load_masked(case, torch.bfloat16))
    assert model.model.layers[-1].mlp.experts.buckets[0].down_proj.dtype == torch.bfloat16
    # one unit in the last place of bfloat16 at the largest logit is at most 2**-7 of it
    assert (logits(model) - expected).abs().max() <= 2**-7 * expected.abs().max()


def auto_load_masked(case, dtype):
    model = auto_load(case.source, dtype=dtype)
    model.load_state_dict(case.masked.state_dict())
    return model.eval()


def test_buckets_ascend_in_width_and_hold_only_what_is_kept(case):
    model = auto_load(case.folder)
    first, second, third = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    # 13 is padded to 16; 24 is the full width
    assert [(bucket.ids, bucket.width) for bucket in first.buckets] == [([1, 3, 4, 6], 8), ([2, 7], 16), ([0, 5], 24)]
    assert [tuple(bucket.gate_up_proj.shape) for bucket in first.buckets] == [(4, 16, 32), (2, 32, 32), (2, 48, 32)]
    assert [tuple(bucket.down_proj.shape) for bucket in first.buckets] == [(4, 32, 8), (2, 32, 16), (2, 32, 24)]
    assert [bucket.width for bucket in second.buckets] == [16] and [bucket.width for bucket in third.buckets] == [24]


def test_generation_equals_the_masked_model(case):
    arguments = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "eos_token_id": None}
    prompt = TOKENS[:1, :6]
    expected = case.masked.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    found = auto_load(case.folder).generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    assert expected.shape == (1, 18) and found.tolist() == expected.tolist()


def test_gradients_equal_the_masked_model(case):
    model = auto_load(case.folder)
    model(TOKENS, labels=TOKENS).loss.backward()
    case.masked.zero_grad()
    case.masked(TOKENS, labels=TOKENS).loss.backward()
    for layer in case.widths:
        stock = case.masked.model.layers[layer].mlp.experts.down_proj.grad
        for bucket in model.model.layers[layer].mlp.experts.buckets:
            assert bucket.gate_up_proj.grad.abs().sum() > 0
            for position, (expert, width) in enumerate(zip(bucket.ids, bucket.widths, strict=True)):
                found = bucket.down_proj.grad[position]
                assert not found[:, width:].any() and not bucket.gate_up_proj.grad[position][width : bucket.width].any()
                kept = case.masked.model.layers[layer].mlp.experts.down_proj[expert].any(dim=0)
                torch.testing.assert_close(found[:, :width], stock[expert][:, kept], atol=1e-6, rtol=1e-4)


# the experts module alone


def experts_pair(widths):
    """Stock experts with pruned neurons zeroed and the bucketed experts with the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from tenp_dist.runtime.buckets import BucketedExperts

    config = Qwen3MoeConfig(**COMMON, num_experts=len(widths), num_hidden_layers=1)
    config._experts_implementation = "grouped_mm"
    stock = Qwen3MoeExperts(config)
    tensors = {matrix: [] for matrix in ("gate_proj", "up_proj", "down_proj")}
    with torch.no_grad():
        stock.gate_up_proj.normal_(), stock.down_proj.normal_()
        for expert, width in enumerate(widths):
            stock.down_proj[expert, :, width:] = 0
            gate, up = stock.gate_up_proj[expert].chunk(2)
            tensors["gate_proj"].append(gate[:width]), tensors["up_proj"].append(up[:width])
            tensors["down_proj"].append(stock.down_proj[expert, :, :width])
        bucketed = BucketedExperts(stock, widths, "experts", 0.02)
        values = {**bucketed.to_buckets("gate_up_proj", tensors), **bucketed.to_buckets("down_proj", tensors)}
    bucketed.load_state_dict(values)
    return stock, bucketed


@pytest.mark.parametrize("widths", [[24] * 4, [8, 8, 24, 24], [5, 24, 0, 9], [0, 0, 0, 0], [1, 2, 3, 24]])
@pytest.mark.parametrize("chosen", [[[0, 1]] * 3, [[2, 3]], [[3, 1], [0, 2], [2, 1]], []])
@pytest.mark.parametrize("grad", [False, True])
def test_experts_for_every_routing(widths, chosen, grad):
    """Empty buckets, buckets without tokens, no tokens at all, widths 0 and off the alignment."""
    stock, bucketed = experts_pair(widths)
    x_TD = torch.randn(len(chosen), 32)
    index_TK = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    weights_TK = torch.rand(len(chosen), 2)
    with torch.set_grad_enabled(grad):
        found = bucketed(x_TD, index_TK, weights_TK)
    torch.testing.assert_close(found, stock(x_TD, index_TK, weights_TK), atol=2e-5, rtol=1e-5)
    if grad:
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in bucketed.parameters())


def test_a_model_width_off_the_alignment_takes_the_fallback():
    from tenp_dist.runtime.buckets import grouped_linear

    x_RI, weight_NOI = torch.randn(5, 20), torch.randn(2, 8, 20, dtype=torch.float64).float()[:, :, :20]
    x_RI, weight_NOI = x_RI[:, :19].contiguous().requires_grad_(), weight_NOI[:, :, :19].contiguous()
    found = grouped_linear(x_RI, weight_NOI, torch.tensor([2, 5], dtype=torch.int32))
    expected = torch.cat([x_RI[:2] @ weight_NOI[0].T, x_RI[2:] @ weight_NOI[1].T])
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert x_RI.grad.abs().sum() > 0


# saving


def test_save_is_a_round_trip(case, tmp_path):
    model = auto_load(case.folder)
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(case.folder, tmp_path / "again")
    written, saved = [json.loads((f / "config.json").read_text()) for f in (case.folder, tmp_path / "again")]
    for key in ("model_type", "architectures", "auto_map", "tenp", "moe_intermediate_size"):
        assert saved[key] == written[key]
    name = f"modeling_tenp_{case.family}.py"
    assert (tmp_path / "again" / name).read_text() == (case.folder / name).read_text()
    again = auto_load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    differing = {"_name_or_path", "transformers_version"}
    left, right = again.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in left.items() if k not in differing} == {
        k: v for k, v in right.items() if k not in differing
    }


def test_tokenizer_and_sharded_save(cases, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    case = cases["deepseek_v3"]
    model = auto_load(case.folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("b").input_ids == [1]
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(auto_load(tmp_path)), logits(model))


def test_a_fresh_model_has_no_random_padding(cases):
    from transformers import AutoConfig, AutoModelForCausalLM

    case = cases["qwen3_moe"]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(case.folder))
    bucket = model.model.layers[0].mlp.experts.buckets[1]
    assert bucket.widths == [13, 13] and not bucket.down_proj[:, :, 13:].any()
    assert 0.15 < bucket.down_proj[:, :, :13].std() < 0.25


# tensors that contradict the config


def break_folder(case, target, change):
    target.mkdir()
    for file in case.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(case.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def narrow_one(tensors):
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(4, 32)


def drop_expert(tensors):
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        del tensors[f"model.layers.1.mlp.experts.7.{matrix}.weight"]


def drop_matrix(tensors):
    for expert in range(EXPERTS):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]


def drop_layer(tensors):
    for name in [name for name in tensors if ".layers.1.mlp.experts." in name]:
        del tensors[name]


def extra_expert(tensors):
    tensors["model.layers.1.mlp.experts.8.down_proj.weight"] = torch.zeros(32, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrow_one, r"layers\.1\.mlp\.experts: expert 3 up_proj: shape \[4, 32\], config.json wants \[16, 32\]"),
        (drop_expert, r"layers\.1\.mlp\.experts: 7 down_proj tensors, config.json wants 8"),
        (drop_matrix, r"layers\.1\.mlp\.experts: 0 up_proj tensors, config.json wants 8"),
        (drop_layer, r"no expert tensors for model\.layers\.1\.mlp\.experts\.buckets\.0\.down_proj"),
        (extra_expert, r"layers\.1\.mlp\.experts: 9 down_proj tensors, config.json wants 8"),
    ],
)
def test_contradicting_tensors_are_refused(cases, tmp_path, change, message):
    folder = break_folder(cases["qwen2_moe"], tmp_path / "broken", change)
    with pytest.raises(ValueError, match=message):
        auto_load(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tenp: tenp["layers"].update({"0": "0000"}), "4 expert widths up to 8 for a layer of 8 experts"),
        (lambda tenp: tenp["layers"].update({"7": "00000000"}), r"layers \[7\], which are no MoE layers"),
        (lambda tenp: tenp.update(widths=[8, 13, 16, 25]), "up to 25 for a layer of 8 experts of width 24"),
        (lambda tenp: tenp.update(format_version=2), "format_version 2, this runtime reads 1"),
        (lambda tenp: tenp["layers"].update({"0": "9" * 8}), "layer 0 .* outside its table of 4"),
    ],
)
def test_contradicting_config_is_refused(cases, tmp_path, change, message):
    folder = break_folder(cases["qwen3_moe"], tmp_path / "broken", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    change(config["tenp"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        auto_load(folder)


def test_stock_class_by_name_reports_every_expert_missing(cases):
    """Only the Auto classes look at model_type: a stock class named by hand loads, and says what it lacks."""
    from transformers import Qwen3MoeForCausalLM

    _, info = Qwen3MoeForCausalLM.from_pretrained(cases["qwen3_moe"].folder, output_loading_info=True)
    assert info["missing_keys"] == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")
    }


# other interpreters

WITHOUT_PACKAGE = """
import json, sys
sys.modules["tenp_dist"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
job = json.load(sys.stdin)
torch.set_num_threads(1)
for family, folder, target in job["cases"]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "custom code" in str(error), error
    else:
        raise AssertionError(f"{family}: stock loaded a ragged checkpoint")
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    model.save_pretrained(target)
    torch.save(model(torch.tensor(job["tokens"])).logits.detach(), target + "/logits.pt")
try:
    AutoModelForCausalLM.from_pretrained(job["without_auto_map"])
except ValueError as error:
    assert "does not recognize this architecture" in str(error), error
else:
    raise AssertionError("stock loaded a ragged checkpoint without auto_map")
try:
    AutoModelForCausalLM.from_pretrained(job["broken"], trust_remote_code=True)
except ValueError as error:
    assert "config.json wants 8" in str(error), error
else:
    raise AssertionError("a broken checkpoint was loaded")
"""

OTHER_ORDERS = """
import json, sys
job = json.load(sys.stdin)
sys.path.insert(0, job["root"])
exec(job["imports"])
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(job["folder"], trust_remote_code=True)
assert type(model).__module__ == "tenp_dist.runtime.auto_classes", type(model)
assert type(AutoConfig.from_pretrained(job["folder"])) is type(model.config)
"""

ALONE = """
import json, sys
sys.path.insert(0, json.load(sys.stdin)["root"])
import tenp_dist
assert tenp_dist.__version__
assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
"""


def run_isolated(script, job, tmp_path):
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(
        command, input=json.dumps(job), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_remote_code_without_the_package(cases, tmp_path):
    bare = break_folder(cases["qwen3_moe"], tmp_path / "bare", lambda tensors: None)
    config = json.loads((bare / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    broken = break_folder(cases["deepseek_v3"], tmp_path / "broken", drop_expert)
    jobs = [(case.family, str(case.folder), str(tmp_path / f"saved_{case.family}")) for case in cases.values()]
    job = {"cases": jobs, "tokens": TOKENS.tolist(), "without_auto_map": str(bare), "broken": str(broken)}
    run_isolated(WITHOUT_PACKAGE, job, tmp_path)
    for family, folder, target in jobs:
        assert same_tensors(Path(folder), Path(target))
        torch.testing.assert_close(torch.load(f"{target}/logits.pt"), logits(auto_load(folder)), atol=1e-6, rtol=0)
        written, saved = [json.loads((Path(f) / "config.json").read_text()) for f in (folder, target)]
        assert saved["auto_map"] == written["auto_map"] and saved["tenp"] == written["tenp"]
        assert (Path(target) / f"modeling_tenp_{family}.py").read_text() == modeling_source(family)


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoConfig, AutoModelForCausalLM; import tenp_dist",
        # the Auto modules are then imported from the middle of a config module that ours derives from
        "import tenp_dist; from transformers import DeepseekV2Config",
    ],
)
def test_import_in_other_orders(cases, tmp_path, imports):
    root = str(Path(tenp_dist.__file__).parent.parent)
    run_isolated(OTHER_ORDERS, {"root": root, "imports": imports, "folder": str(cases["deepseek_v2"].folder)}, tmp_path)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_modeling_file_is_self_contained(family):
    nodes = list(ast.walk(ast.parse(modeling_source(family))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    roots = {module.partition(".")[0] for module in modules}
    assert {"torch", "transformers"} <= roots <= {"torch", "transformers", *sys.stdlib_module_names}


def test_import_is_cheap(tmp_path):
    run_isolated(ALONE, {"root": str(Path(tenp_dist.__file__).parent.parent)}, tmp_path)


# config.json

LAYERS = st.dictionaries(
    st.integers(0, 200), st.lists(st.integers(0, 64), min_size=1, max_size=20), min_size=0, max_size=6
)


@given(widths=LAYERS, family=st.sampled_from(sorted(FAMILIES)))
def test_config_round_trip(widths, family):
    source = {
        "model_type": family,
        "architectures": ["X"],
        "moe_intermediate_size": 64,
        "auto_map": {"AutoConfig": "y.Z"},
    }
    before = json.dumps(source)
    config = ragged_config(source, widths_by_layer=widths, retention="0.6", fingerprint="abc")
    assert json.dumps(source) == before
    assert widths_by_layer(json.loads(json.dumps(config))) == widths
    assert config["tenp"]["source"] == {"model_type": family, "architectures": ["X"], "fingerprint": "abc"}
    assert config["auto_map"]["AutoConfig"] == f"modeling_tenp_{family}.Tenp{FAMILIES[family]}Config"


def test_config_by_hand():
    # widths 48 and 128: '0' stands for 48, '1' for 128
    source = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    config = ragged_config(source, widths_by_layer={10: [48, 48], 2: [48, 128]}, retention="0.6", fingerprint="abc")
    assert config["model_type"] == "tenp_deepseek_v3" and config["architectures"] == ["TenpDeepseekV3ForCausalLM"]
    assert config["tenp"]["widths"] == [48, 128]
    assert list(config["tenp"]["layers"].items()) == [("2", "01"), ("10", "00")]


def test_config_of_more_widths_than_there_are_printable_characters(tmp_path):
    # multiples of 16 up to 2048 in one model: past '~' the characters are control ones, which the file has to bear
    widths = {0: list(range(0, 1040, 16)), 1: list(range(2048, 1008, -16))}
    config = ragged_config({"model_type": "qwen2_moe"}, widths_by_layer=widths, retention="0.6", fingerprint="abc")
    assert len(config["tenp"]["widths"]) == 129 and len(config["tenp"]["layers"]["1"]) == 65
    write_json(tmp_path / "config.json", config)
    assert widths_by_layer(json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == widths


@pytest.mark.parametrize(
    ("source", "widths", "retention", "message"),
    [
        ({"model_type": "llama"}, {}, "0.6", "no ragged runtime for model_type 'llama'; supported: deepseek_v2"),
        ({"model_type": "tenp_qwen2_moe", "tenp": {}}, {}, "0.6", "already a ragged checkpoint"),
        ({"model_type": "qwen2_moe"}, {}, 0.6, "wanted the decimal string"),
        ({"model_type": "qwen2_moe", "moe_intermediate_size": 8}, {0: [9]}, "0.6", r"wanted 0\.\.8"),
    ],
)
def test_config_refuses(source, widths, retention, message):
    with pytest.raises(ValueError, match=message):
        ragged_config(source, widths_by_layer=widths, retention=retention, fingerprint="abc")


def test_config_without_entry():
    with pytest.raises(ValueError, match="not a ragged checkpoint"):
        widths_by_layer({"model_type": "qwen2_moe"})
