"""Text that the tokenizer or the chat template loses is told of or refused, before anything is scored."""

import json
import re

import pytest

from helpers.refusals import refused

CUTS_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'].split('</think>')[-1] %}<{{ m['role'] }}>{{ c }}{% endfor %}"
)
ONLY_KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}{% endif %}{% endfor %}"
)
SAID = "the expert routes a token to neurons " * 12


def chat(tmp_path, model, template, *conversations, samples=2):
    """A calibration part of these conversations, with the template beside the model."""
    (model / "chat_template.jinja").write_text(template)
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
    source = {"path": str(path), "domain": "d", "samples": samples, "messages_column": "messages"}
    return {"sources": [source], "sequence_length": 16}


def calibrated(tenp, job):
    """What `calibrate --json` says, once it has ended well."""
    assert tenp("inspect", job).exit_code == 0
    result = tenp("calibrate", job, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["stages"]["calibrate"]


def test_what_a_source_gave_is_said(tenp, job_file, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one same text " * 20}] * 4 + [{"text": " "}] + [{"text": "another " * 40}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(path), "domain": "d", "samples": 10}]
    job = job_file(calibration={"sources": sources, "sequence_length": 16})
    said = calibrated(tenp, job)
    (source,) = said["sources"]
    assert (source["rows"], source["documents"], source["sequences"], source["tokens"]) == (6, 5, 10, 160)
    assert re.match(r"<bos>(one same text|another) ", source["begins"])
    assert any("1 of 6 rows are blank" in words for words in said["warnings"])
    assert any("3 of 5 documents equal an earlier one" in words for words in said["warnings"])
    shown = tenp("calibrate", job, "--overwrite", "--set", "calibration.sequence_length=32").stdout
    assert "a.jsonl (d): 5 documents of 6 rows read, 10 sequences, 320 tokens; the first begins" in shown


def test_sharegpt_rows_reach_the_tokens(tenp, job_file, model, tmp_path):
    rows = [[{"from": "human", "value": SAID}, {"from": "gpt", "value": "nine"}]] * 2
    said = calibrated(tenp, job_file(model=model, calibration=chat(tmp_path, model, ONLY_KNOWN_ROLES, *rows)))
    assert said["sources"][0]["begins"].startswith("the expert routes")


def test_a_conversation_that_the_template_drops(tenp, job_file, model, tmp_path):
    rows = [[{"role": "critic", "content": SAID}]]
    job = job_file(model=model, calibration=chat(tmp_path, model, ONLY_KNOWN_ROLES, *rows))
    refused(tenp("run", job), "CalibrationError", "hands on no word", "chat.jsonl: messages, row 0", "critic")


def test_reasoning_that_the_template_cuts(tenp, job_file, model, tmp_path):
    answer = f"<think>{SAID * 9}</think>{SAID}"
    rows = [[{"role": "user", "content": "sum"}, {"role": "assistant", "content": answer}]] * 3
    said = calibrated(tenp, job_file(model=model, calibration=chat(tmp_path, model, CUTS_THOUGHT, *rows)))
    assert any("the chat template leaves out 90% of the messages' characters" in words for words in said["warnings"])


def test_row_without_messages(tenp, job_file, model, tmp_path):
    rows = [[{"role": "user", "content": SAID}], [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]]
    job = job_file(model=model, calibration=chat(tmp_path, model, ONLY_KNOWN_ROLES, *rows, samples=50))
    refused(tenp("run", job), "CalibrationError", "no chat messages", "messages, row 1", "part of type image_url")


def test_tokenizer_that_loses_spaces(tenp, job_file, model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(
        tenp("run", job_file(model=model)), "CalibrationError", "loses the text", "spaces between words", "auto_map"
    )


@pytest.mark.parametrize("whole", [True, False])
def test_tokenizer_that_is_code(whole, tenp, job_file, model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config | own))
    (model / "own.py").write_text("raise SystemExit('run')\n")
    if not whole:
        (model / "tokenizer.json").unlink()
    step = "take auto_map and tokenizer_class out" if whole else "put a tokenizer.json that says the same"
    refused(tenp("run", job_file(model=model)), "CalibrationError", "Tokenizer cannot be loaded", "never run", step)


def test_sequences_longer_than_the_model(tenp, job_file):
    job = job_file()
    job.write_text(
        job.read_text().replace("sequence_length: 32", "sequence_length: 300").replace("samples: 4", "samples: 2")
    )
    assert (
        "calibration.sequence_length 300 is more than the 256 positions of the model"
        in calibrated(tenp, job)["warnings"]
    )


@pytest.mark.parametrize(
    ("column", "samples", "words"), [("nope", 4, ("no such column", "nope")), ("text", 10**6, ("too little text",))]
)
def test_evaluation_text_is_tried_before_scoring(column, samples, words, tenp, job_file, text_files, tmp_path):
    source = {"path": str(text_files["prose"]), "domain": "d", "samples": samples, "text_column": column}
    job = job_file(evaluation={"sources": [source], "sequence_length": 32})
    refused(tenp("run", job), "CalibrationError", *words)
    assert not (tmp_path / "run" / "scores").exists()
