"""Text and tokenizers that cannot be used, through the real command line."""

import json

import pytest

from helpers.refusals import refused
from helpers.spoiling import change, configure


def jsonl(*rows):
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


CALIBRATION = {
    "empty": ("a.jsonl", "", ("is empty", "a.jsonl", "0 bytes")),
    "only line ends": ("a.jsonl", "\n\n", ("a.jsonl",)),
    "only blank texts": ("a.jsonl", jsonl({"text": " "}, {"text": ""}), ("empty or shorter", "a.jsonl", "0 sequences")),
    "too short": (
        "a.jsonl",
        jsonl(*[{"text": "seven times nine is sum of the neurons"}] * 4),
        ("too little text", "domain d", "sequences of 32 tokens", "wanted: 4 sequences", "lower `samples`"),
    ),
    "malformed line": (
        "a.jsonl", jsonl({"text": "x"}, '{"text": "y\n', '}{\n'), ("cannot be read", "a.jsonl", "one object a line"),
    ),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe\xff"}\n', ("cannot be read", "a.jsonl")),
    "other column": (
        "a.jsonl", jsonl({"body": "x", "id": 1}), ("no such column", "body, id", "wanted: text", "set text_column"),
    ),
    "numbers for text": ("a.jsonl", jsonl(*[{"text": 7}] * 3), ("Column holds no text", "a.jsonl: text", "int 7")),
    "nulls for text": ("a.jsonl", jsonl({"text": None}), ("Column holds no text", "NoneType")),
    "unknown kind": ("a.xml", "<text/>\n", ("Unknown kind", "a.xml", "found:  .xml", ".jsonl", "convert")),
    "not found": ("a.jsonl", None, ("not found", "a.jsonl", "correct `path`")),
    "parquet that is none": ("a.parquet", "PAR1 no", ("cannot be read", "a.parquet")),
    "a folder without a dataset": ("a", "folder", ("no saved dataset", "save_to_disk", "one source for each")),
}  # fmt: skip


@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration_text_refused(case, tenp, job_file, tmp_path):
    name, text, expected = CALIBRATION[case]
    path = tmp_path / name
    if text == "folder":
        path.mkdir()
    elif text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    sources = [{"path": str(path), "domain": "d", "samples": 4}]
    job = job_file(calibration={"sources": sources, "sequence_length": 32})
    refused(tenp("run", job), "CalibrationError", *expected)
    assert not (tmp_path / "run" / "calibration").exists()


def test_chat_messages_without_a_template(tenp, job_file, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(jsonl({"messages": [{"role": "user", "content": "seven times nine"}]}))
    sources = [{"path": str(path), "domain": "d", "samples": 1, "messages_column": "messages"}]
    job = job_file(calibration={"sources": sources, "sequence_length": 4})
    refused(tenp("run", job), "CalibrationError", "chat template", "chat.jsonl: messages", "use text_column")


@pytest.mark.parametrize("text", [None, "{", '{"model": {"type": "none"}}'], ids=["missing", "cut", "other format"])
def test_tokenizer_missing_or_cut(text, tenp, job_file, model):
    (model / "tokenizer.json").unlink()
    if text is not None:
        (model / "tokenizer.json").write_text(text)
    refused(
        tenp("run", job_file(model=model)), "CalibrationError", "Tokenizer cannot be loaded", str(model), "config.json"
    )


def test_tokenizer_of_a_larger_vocabulary(tenp, job_file, model):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change(name, lambda tensor: tensor[:200].clone())(model)
    configure(vocab_size=200)(model)
    refused(
        tenp("run", job_file(model=model)),
        "CalibrationError", "does not belong to the model", "token id", "vocab_size 200", "came with the weights",
    )  # fmt: skip
