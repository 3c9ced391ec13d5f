"""Ragged checkpoints in real vLLM engines, against the padded ones of the same plans in vLLM's own experts.

float32 throughout, so that equal means equal. Engines are dear: those that can follow one another in one process do,
and every configuration is tried where it proves most. `scripts/bench/serving_matrix.py` has all combinations.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch

from helpers.commands import free_port
from helpers.engines import PROMPTS, TOLERANCE, agrees
from helpers.served import STORED, by_transformers, damage, make_fp8, make_served, make_stored
from tenp_dist_vllm.families import FAMILIES, architecture

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.timeout(1800)]
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}}
CHUNKED = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "block_size": 32}  # chunks by default
MATRIX = "model.layers.1.mlp.experts.0.down_proj.weight"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """family -> its checkpoints; DeepSeek-V3 with latent attention and a layer for multi-token prediction."""
    families = ("qwen3_moe", "deepseek_v3", "mixtral")
    return {family: make_served(family, tmp_path_factory.mktemp(family)) for family in families}


@pytest.fixture(scope="module")
def refused(served, tmp_path_factory):
    """What vLLM refuses to start -> the folder, settings, and what the error says."""
    ragged, folder = served["qwen3_moe"]["ragged"], tmp_path_factory.mktemp("damaged")
    tenp = json.loads((ragged / "config.json").read_text())["tenp"]
    changes = {MATRIX: torch.zeros(128, 255)}
    return {
        "missing": (
            damage(ragged, folder / "missing", lambda t: t.pop(MATRIX)),
            {},
            "1 matrices of experts are not in",
        ),
        "wider": (damage(ragged, folder / "wider", lambda t: t.update(changes)), {}, "config.json wants [128, 256]"),
        "version": (damage(ragged, folder / "version", tenp=tenp | {"format_version": 2}), {}, "format_version 2"),
        "experts": (
            damage(ragged, folder / "experts", num_local_experts=11),
            {},
            "12 experts in `tenp` and 11 experts",
        ),
        "lora": (ragged, {"enable_lora": True}, "LoRA adapters (--enable-lora)"),
        "format": (ragged, {"load_format": "sharded_state"}, "--load-format sharded_state: use one of"),
        "backend": (ragged, {"model_impl": "transformers"}, "not a registered model in the Transformers library"),
        "override": (
            ragged,
            {"hf_overrides": {"architectures": ["Qwen3MoeForCausalLM"]}},
            "Qwen3MoeForCausalLM would load them into experts of one width",
        ),
    }


@pytest.fixture(scope="module")
def fp8(served, tmp_path_factory):
    return make_fp8(served["qwen3_moe"]["source"], tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="module")
def one_rank(served, answers) -> dict[str, dict]:
    qwen, deepseek, mixtral = served.values()
    return answers(
        {
            "qwen padded": (qwen["padded"], {}),
            "qwen chunked": (qwen["ragged"], CHUNKED),
            "mixtral padded": (mixtral["padded"], {}),
            "mixtral": (mixtral["ragged"], {}),
            "deepseek padded": (deepseek["padded"], {}),
            "deepseek drafts": (deepseek["ragged"], MTP),
            "qwen compiled": (qwen["ragged"], {"enforce_eager": False}),
        }
    )


@pytest.fixture(scope="module")
def two_ranks(served, answers) -> dict[str, dict]:
    return answers(
        {
            "qwen tensor": (served["qwen3_moe"]["ragged"], {"tensor_parallel_size": 2}),
            "deepseek expert": (
                served["deepseek_v3"]["ragged"],
                {"tensor_parallel_size": 2, "enable_expert_parallel": True},
            ),
        }
    )


@pytest.fixture(scope="module")
def quantised(fp8, answers) -> dict[str, dict]:
    """The emulated kernel changes the process: last."""
    emulated = {"worker_extension_cls": "fp8_emulation.Emulated"}
    return answers(
        {
            "values": (fp8["values"], {}),
            "fp8": (fp8["fp8"], emulated),
            "fp8, two ranks": (fp8["fp8"], emulated | {"tensor_parallel_size": 2}),
        }
    )


@pytest.fixture(scope="module")
def stored(served, tmp_path_factory):
    """Form of compressed-tensors -> a ragged checkpoint whose experts are stored so."""
    source = served["qwen3_moe"]["source"]
    return {
        name: make_stored(source, tmp_path_factory.mktemp(name), STORED[name], ["ragged"])["ragged"]
        for name in ("int4", "fp8-channel")
    }


@pytest.fixture(scope="module")
def compressed(stored, answers) -> dict[str, dict]:
    emulated = {"worker_extension_cls": "compressed_emulation.Emulated"}
    return answers(
        {
            "int4": (stored["int4"], emulated | {"tensor_parallel_size": 2}),
            "fp8-channel": (stored["fp8-channel"], emulated),
        }
    )


@pytest.fixture(scope="module")
def not_started(refused, served, answers) -> dict[str, dict]:
    """What is refused, and an engine of random weights, which is not."""
    dummy = {"dummy": (served["qwen3_moe"]["ragged"], {"load_format": "dummy"})}
    return answers({name: (folder, settings) for name, (folder, settings, _) in refused.items()} | dummy)


def test_chunked_prefill_and_prefix_caching(one_rank):
    found = one_rank["qwen chunked"]
    agrees(found, one_rank["qwen padded"])
    assert found["metrics"]["vllm:prefix_cache_hits"] > 0


def test_matrices_that_are_called_w1_and_w3(one_rank):
    """Mixtral; `test_vllm_families.py` has the other families."""
    agrees(one_rank["mixtral"], one_rank["mixtral padded"])


def test_this_vllm_has_every_family(vllm_python, engine_environment):
    code = "from tenp_dist_vllm import models\n" + "".join(f"models.{architecture(family)}\n" for family in FAMILIES)
    done = subprocess.run(
        [vllm_python, "-c", code], env=os.environ | engine_environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_prompts_tell_a_wrong_expert(one_rank, quantised):
    """The figures compared differ by far more than the tolerance where weights are others."""
    off = torch.tensor(quantised["values"]["logprobs"]) - torch.tensor(one_rank["qwen padded"]["logprobs"])
    assert off.abs().max() > 100 * TOLERANCE


def test_speculative_decoding_with_the_layer_that_predicts_two_tokens(one_rank):
    """Its experts are whole; drafts change no token."""
    found = one_rank["deepseek drafts"]
    agrees(found, one_rank["deepseek padded"])
    assert found["metrics"]["vllm:spec_decode_num_drafts"] > 0


def test_compiled(one_rank):
    """Not DeepSeek-V3: compiled on CPUs, stock vLLM 0.32 answers otherwise in every process that starts it."""
    agrees(one_rank["qwen compiled"], one_rank["qwen padded"])


def test_two_tensor_parallel_ranks(one_rank, two_ranks):
    """Widths of 33 and 50 neurons are not divisible by two."""
    agrees(two_ranks["qwen tensor"], one_rank["qwen padded"])


def test_expert_parallel(one_rank, two_ranks):
    agrees(two_ranks["deepseek expert"], one_rank["deepseek padded"])


def test_memory_is_that_of_the_kept_neurons(one_rank):
    """float32, hidden size 128; widths rounded to 32 as by vLLM on CPUs; one layer whole, one without neurons."""
    rounded = [256, 64, 64, 64, 0, 64, 256, 96, 160, 64, 0, 32]
    kept = 256 * 12 + sum(rounded) + 64 * 12
    assert one_rank["qwen chunked"]["bytes"] == kept * 3 * 128 * 4
    assert one_rank["qwen padded"]["bytes"] == 4 * 12 * 256 * 3 * 128 * 4


@pytest.mark.parametrize("name", ["fp8", "fp8, two ranks"])
def test_fp8_experts_compute_what_they_stand_for(quantised, name):
    """Buckets of 64 and 192 neurons, and shares of 32: their scales are refined."""
    agrees(quantised[name], quantised["values"])


@pytest.mark.parametrize("name", ["int4", "fp8-channel"])
def test_compressed_experts_compute_what_they_stand_for(compressed, stored, name):
    """As transformers reads them; int4 in groups of 32 with two ranks, whose shares end within no group."""
    assert "error" not in compressed[name], compressed[name]["error"]
    wanted = by_transformers(stored[name], torch.tensor(PROMPTS))
    assert (torch.tensor(compressed[name]["logprobs"]) - wanted).abs().max() < TOLERANCE


def test_packed_experts_take_their_bytes(compressed):
    """Of one rank of two. Half a byte a number, a float32 scale for 32 of them, and two numbers for a matrix's size."""
    neurons = 256 * 12 + (256 * 3 + 128 * 7) + 128 * 12  # one layer whole, two in buckets of 128 and 256
    of_neuron, sizes = 3 * 128 // 2 + 3 * 128 // 32 * 4, (12 + 10 + 12) * 2 * 2 * 4
    assert compressed["int4"]["bytes"] == neurons // 2 * of_neuron + sizes


def test_random_weights_need_no_checkpoint(not_started):
    assert "error" not in not_started["dummy"] and not_started["dummy"]["tokens"]


@pytest.mark.parametrize("name", ["missing", "wider", "version", "experts", "lora", "format", "backend", "override"])
def test_refused(not_started, refused, name):
    assert refused[name][2] in not_started[name]["error"]


def test_the_server(served, one_rank, vllm_python, engine_environment, tmp_path):
    """As `vllm serve RUN_DIR/checkpoint/ragged` starts it: compiled, with chunks and a prefix cache."""
    port, folder = free_port(), str(served["qwen3_moe"]["ragged"])
    options = ["--dtype", "float32", "--max-model-len", "128", "--skip-tokenizer-init", "--port", str(port)]
    environment = os.environ | engine_environment | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            found = [completion(port, folder, prompt, server) for prompt in PROMPTS]
        finally:
            server.terminate()
    logprobs = [p[str(t)]["logprob"] for one, prompt in zip(found, PROMPTS, strict=True)
                for t, p in zip(prompt[1:], one["prompt_logprobs"][1:], strict=True)]  # fmt: skip
    wanted = one_rank["qwen padded"]
    assert (torch.tensor(logprobs) - torch.tensor(wanted["logprobs"])).abs().max() < TOLERANCE
    assert [one["token_ids"] for one in found] == [tokens for tokens, _ in wanted["tokens"]]


def completion(port: int, model: str, prompt: list[int], server: subprocess.Popen) -> dict:
    """The first choice; waits until the server answers."""
    asked = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    asked |= {"prompt_logprobs": 0, "return_token_ids": True, "detokenize": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    limit = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=240) as answer:
                return json.load(answer)["choices"][0]
        except urllib.error.URLError:
            assert server.poll() is None and time.monotonic() < limit, "the server does not start"
            time.sleep(0.5)


def test_without_the_plugin_it_is_refused(served, answers):
    folder, stock = served["qwen3_moe"]["ragged"], {"architectures": ["Qwen3MoeForCausalLM"]}
    named = {"hf_overrides": stock | {"model_type": "qwen3_moe"}}
    runs = {"stock": (folder, {}), "architecture": (folder, {"hf_overrides": stock}), "named": (folder, named)}
    found = answers(runs, VLLM_PLUGINS="")
    assert all("error" in one for one in found.values()), found
    assert "trust_remote_code" in found["stock"]["error"] and "trust_remote_code" in found["architecture"]["error"]
