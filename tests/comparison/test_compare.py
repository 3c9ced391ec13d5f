"""`tenp-dist compare` on small checkpoints, against figures that the test computes itself."""

import json
import math

import pytest
import torch

from helpers.ragged import make_case
from helpers.refusals import refused
from tenp_dist.comparison.compare import divergence, first_divergence
from tenp_dist.comparison.generate import Loaded

PROMPTS = ["the expert routes", "sum of seven times"]


@pytest.fixture(scope="module", autouse=True)
def threads(one_thread):
    """One in all tests here."""


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model):
    """A source and a ragged checkpoint cut from it, with one tokenizer."""
    case = make_case("qwen3_moe", tmp_path_factory.mktemp("compared"))
    for folder in (case.source, case.folder):
        for path in tiny_model("qwen3_moe").glob("token*"):
            content = json.loads(path.read_text())
            (folder / path.name).write_text(json.dumps(_few_tokens(content)))
    return case


def _few_tokens(content):
    """The tokenizer of bytes alone, on the 64 rows that the model has."""
    if "model" not in content:
        return content
    rows = {token: place % 60 for token, place in content["model"]["vocab"].items()}
    content["model"] |= {"vocab": rows, "merges": []}
    content["added_tokens"] = []
    return content


def compared(tenp, *words):
    result = tenp("compare", *words, "--max-new-tokens", "6", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_figures_equal_those_of_the_models(tenp, tiny_model, prompts, tmp_path):
    """Two models of random weights: KL and answers by plain forwards, one token at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model("deepseek_v3")
    pruned = tmp_path / "pruned"
    tokenizer, one = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source).eval()
    other = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[:4] = 0
    other.save_pretrained(pruned), tokenizer.save_pretrained(pruned)
    found = compared(tenp, source, pruned, "--prompts", prompts)
    assert [answer["prompt"] for answer in found["answers"]] == PROMPTS
    for answer in found["answers"]:
        ids = tokenizer(answer["prompt"])["input_ids"]
        for model, name in ((one, "source"), (other, "pruned")):
            assert answer[name]["ids"] == greedy(model, ids, 6)
            assert answer[name]["text"] == tokenizer.decode(answer[name]["ids"])
        for place, token in enumerate(answer["source"]["ids"]):
            p, q = (step(model, ids).double().softmax(-1) for model in (one, other))
            assert answer["kl"][place] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-3, abs=1e-6)
            ids = [*ids, token]
    assert found["mean_kl"] > 1e-4
    values = [value for answer in found["answers"] for value in answer["kl"]]
    assert found["mean_kl"] == pytest.approx(sum(values) / len(values))


@torch.no_grad()
def step(model, ids):
    return model(torch.tensor([ids])).logits[0, -1]


def greedy(model, ids, length):
    made = []
    while len(made) < length and (not made or made[-1] != model.config.eos_token_id):
        made.append(step(model, [*ids, *made]).argmax().item())
    return made


def test_a_model_is_the_same_as_itself(tenp, tiny_model, prompts):
    found = compared(tenp, tiny_model(), tiny_model(), "--prompts", prompts)
    assert found["same"] == 2 and found["mean_kl"] == 0 and found["agreement"] == 1
    assert all(answer["first_divergence"] is None for answer in found["answers"])


def test_a_ragged_checkpoint_in_the_terminal_and_as_a_page(tenp, folders, prompts, tmp_path):
    page = tmp_path / "page.html"
    words = (folders.source, folders.folder, "--prompts", prompts, "--max-new-tokens", "6", "--html", page)
    result = tenp("compare", *words)
    assert result.exit_code == 0, result.stderr
    assert "source" in result.stdout and "nats per token" in result.stdout
    text = page.read_text()
    assert text.count("<section>") == 2 and "nats per token" in text
    assert "<script" not in text and "http" not in text


def test_prompts_of_json_lines(tenp, tiny_model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the <b>expert"}\n{"text": "two\\nlines"}\n')
    page = tmp_path / "page.html"
    found = compared(tenp, tiny_model(), tiny_model(), "--prompts", path, "--html", page)
    assert [answer["prompt"] for answer in found["answers"]] == ["the <b>expert", "two\nlines"]
    assert "<b>" not in page.read_text()


def test_what_is_refused(tenp, tiny_model, prompts, folders, tmp_path):
    model = tiny_model()
    empty, odd = tmp_path / "empty.txt", tmp_path / "odd.jsonl"
    empty.write_text("\n"), odd.write_text('{"question": "x"}\n')
    for path in (tmp_path / "nowhere.txt", empty, odd):
        refused(tenp("compare", model, model, "--prompts", path), "CalibrationError", path.name, "correct --prompts")
    nowhere = tenp("compare", model, tmp_path / "nowhere", "--prompts", prompts)
    refused(nowhere, "SourceError", "does not load", "nowhere")
    refused(tenp("compare", model, model, "--prompts", prompts, "--chat"), "SourceError", "no chat template")
    other = tenp("compare", model, folders.source, "--prompts", prompts)
    refused(other, "SourceError", "different vocabularies", "64", "320")
    if not torch.cuda.is_available():
        refused(tenp("compare", model, model, "--prompts", prompts, "--device", "cuda"), "DeviceError", "No accel")


def test_divergence_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
    source_TV, pruned_TV = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0], [5.0, 5.0]]).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(divergence(source_TV, pruned_TV), torch.tensor([expected, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [1], 0), ([], [], None), ([4, 2], [1, 2], 0)],
)
def test_first_divergence(one, other, place):
    assert first_divergence(one, other) == place


def test_a_character_of_several_tokens_appears_with_its_last(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    ids = tokenizer("aéb")["input_ids"]
    assert len(ids) == 4
    assert Loaded(tiny_model(), None, tokenizer).texts(ids) == ["a", "", "é", "b"]
