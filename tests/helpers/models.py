"""Small random models of every family, with a tokenizer and words to train it on, made once per test session."""

from pathlib import Path

import pytest

EXPERTS, NEURONS, HIDDEN, VOCABULARY = 8, 24, 32, 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": NEURONS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
DEPTH = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5} | DEPTH
SETTINGS = {
    "deepseek_v2": {"n_routed_experts": EXPERTS, "n_shared_experts": 2, "topk_method": "group_limited_greedy"}
    | (LATENT | GROUPS),
    "deepseek_v3": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True} | LATENT | GROUPS,
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 40, "num_hidden_layers": 3},
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True, "num_hidden_layers": 3, "head_dim": 8},
}
TEXT = "the expert routes a token to neurons and prunes what layer norm leaves while sum of seven times nine is"


def documents(domain: int, count: int = 40) -> list[str]:
    """Texts of one domain, each about sixty words long; the domains differ in the order of their words."""
    words, step = TEXT.split(), (3, 7)[domain % 2]
    return [" ".join(words[(i * step + j * (i + step)) % len(words)] for j in range(60)) + "." for i in range(count)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(family, dtype) -> folder of a random model: shards, index, config, tokenizer. Copy it to change it."""
    made = {}

    def make(family: str = "deepseek_v3", dtype: str = "float32") -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = save_model(tmp_path_factory.mktemp("models") / f"{family}-{dtype}", family, dtype)
        return made[family, dtype]

    return make


def save_model(folder: Path, family: str, dtype: str) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **SETTINGS[family]))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB")
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(0) + documents(1), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
