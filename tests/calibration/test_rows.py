"""Rows come from the whole of a source, each once, in an order that the seed decides."""

import gzip
import json
from collections import Counter

import datasets
import pytest

from tenp_dist.calibration import rows
from tenp_dist.calibration.rows import rows_of
from tenp_dist.config import Source
from tenp_dist.errors import CalibrationError


def source(path, **values):
    return Source(path=path, domain="d", **values)


def jsonl(path, count):
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(count)))
    return path


def test_small_file_is_shuffled_whole(tmp_path):
    found = list(rows_of(source(jsonl(tmp_path / "a.jsonl", 50)), seed=1))
    assert sorted(row.number for row in found) == list(range(50)) != [row.number for row in found]
    assert all(row.values == {"text": f"row {row.number}"} for row in found)


def test_large_file_is_drawn_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_IN_MEMORY", 50)
    path = jsonl(tmp_path / "a.jsonl", 400)
    numbers = [row.number for row in rows_of(source(path), seed=1)]
    assert sorted(numbers) == list(range(400))
    quarters = Counter(number // 100 for number in numbers[:50])
    assert min(quarters[q] for q in range(4)) >= 4  # 12.5 of 50 on average; all from the first quarter without drawing
    assert numbers == [row.number for row in rows_of(source(path), seed=1)]
    assert numbers != [row.number for row in rows_of(source(path), seed=2)]


@pytest.mark.parametrize("kind", ["jsonl.gz", "JSONL", "csv", "txt"])
def test_kinds_of_files(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    texts = [f"line {i}" for i in range(3)]
    body = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    body = {"csv": "text\n" + "\n".join(texts), "txt": "\n\n".join(texts)}.get(kind, body)
    path.write_bytes(gzip.compress(body.encode()) if kind.endswith(".gz") else body.encode())
    assert sorted(row.values["text"].strip() for row in rows_of(source(path), seed=0)) == texts


def test_folder_of_splits(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert [row.values for row in rows_of(source(tmp_path / "saved", split="test"), 0)] == [{"text": "test"}]
    with pytest.raises(CalibrationError) as caught:
        next(rows_of(source(tmp_path / "saved", split="dev"), 0))
    assert {"found": "train, test", "wanted": "dev"}.items() <= caught.value.details().items()


def test_folder_of_caches_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere")
    with pytest.raises(CalibrationError, match="folder of caches cannot be used") as caught:
        list(rows_of(source(jsonl(tmp_path / "a.jsonl", 5)), seed=1))
    assert "/proc/nowhere" in str(caught.value) and "HF_HOME" in str(caught.value)
