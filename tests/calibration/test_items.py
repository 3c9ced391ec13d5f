"""Items for a search: what a line may be, which tokens are an answer, and what is refused."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from tenp_dist.calibration.items import EXACT, Item, build_items, read_items, stored_items, write_items
from tenp_dist.calibration.tokenizer import load_tokenizer
from tenp_dist.errors import CalibrationError
from tenp_dist.stages.search_text import split_items

ROWS = [
    {"prompt": "seven times nine", "choices": ["is", "the sum"], "answer": 1, "id": "further keys are no matter"},
    {"prompt": "the expert ", "answer": "routes"},
    {"prompt": "layer", "answer": " norm"},
]


def file_of(folder, *rows):
    path = folder / "items.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_answer_is_a_sequence_behind_its_prompt(tiny_model, tmp_path):
    """lm-eval's rule: one space between, and blanks at a prompt's end are the answer's."""
    model, path = tiny_model(), file_of(tmp_path, *ROWS)
    items, tokenizer = read_items(path), load_tokenizer(tiny_model())
    assert [(one.line, one.right) for one in items] == [(1, 1), (2, EXACT), (3, EXACT)]
    built = build_items(path, items, model, 320, 64)
    texts = [
        ("seven times nine", " is"),
        ("seven times nine", " the sum"),
        ("the expert", " routes"),
        ("layer", " norm"),
    ]
    for number, (prompt, answer) in enumerate(texts):
        begin, end = built.begin_N[number], built.end_N[number]
        row = built.corpus.tokens_NS[number]
        assert row[0] == tokenizer.bos_token_id and tokenizer.decode(row[1:begin]) == prompt
        assert tokenizer.decode(row[begin:end]) == answer
        assert built.corpus.mask_NS[number].sum() == end and not built.corpus.mask_NS[number, end:].any()
    assert built.item_N.tolist() == [0, 0, 1, 2] and built.letters_N.tolist() == [2, 7, 6, 5]
    assert built.first_M.tolist() == [0, 2, 3] and built.right_N.tolist() == [False, True, True, True]
    write_items(tmp_path / "items.arrow", built)
    again = stored_items(tmp_path / "items.arrow")
    for name in ("begin_N", "end_N", "item_N", "letters_N", "right_M"):
        assert np.array_equal(getattr(again, name), getattr(built, name))
    assert again.corpus.digest == built.corpus.digest


def test_the_last_items_are_set_aside():
    items = [Item(number, "p", ("a",), EXACT) for number in range(1, 10)]
    assert [[one.line for one in part] for part in split_items(items, Fraction(1, 4))] == [
        [1, 2, 3, 4, 5, 6, 7],
        [8, 9],
    ]
    assert [len(part) for part in split_items(items, Fraction(1, 4), 3)] == [3, 2]
    assert [len(part) for part in split_items(items[:2], Fraction(1, 4))] == [1, 1]


@pytest.mark.parametrize(
    "row, found",
    [
        ("{", "Line is no JSON"),
        ([1], "list"),
        ({"question": "?", "answer": "x"}, "prompt: null"),
        ({"prompt": " ", "answer": "x"}, 'prompt: " "'),
        ({"prompt": "p", "answer": 1}, "without choices"),
        ({"prompt": "p", "choices": ["a"], "answer": 0}, "choices"),
        ({"prompt": "p", "choices": ["a", 2], "answer": 0}, "choices"),
        ({"prompt": "p", "choices": ["a", "a"], "answer": 0}, "twice"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "answer: 2, of 2 choices"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": True}, "answer: true"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": "a"}, 'answer: "a"'),
    ],
    ids=str,
)
def test_lines_of_another_form_are_named(row, found, tmp_path):
    with pytest.raises(CalibrationError) as caught:
        read_items(file_of(tmp_path, ROWS[0], "", row))
    assert found in f"{caught.value.what} {caught.value.found}" and "line 3" in str(caught.value.where)


def test_files_without_items_and_items_too_long(tiny_model, tmp_path):
    with pytest.raises(CalibrationError, match="holds none"):
        read_items(file_of(tmp_path, "", " "))
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_items(tmp_path / "nowhere.jsonl")
    path = file_of(tmp_path, ROWS[1], {"prompt": "word " * 60, "answer": "end"})
    with pytest.raises(CalibrationError, match="too long") as caught:
        build_items(path, read_items(path), tiny_model(), 320, 32)
    assert "line 2" in str(caught.value.where) and caught.value.wanted == "at most 32"
    with pytest.raises(CalibrationError, match="does not belong"):
        build_items(path, read_items(path), tiny_model(), 5, 4096)
