"""Two columns side by side, against hand arithmetic and brute force."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenp_dist.benchmark.column import why_it_ended
from tenp_dist.benchmark.harness import task_figures
from tenp_dist.benchmark.paired import compared, mean_and_error, paired

SCORES = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=30)


def column(values, metric="acc,none", value=None, tokens=None):
    items = {str(item): number for item, number in enumerate(values)}
    mean = sum(values) / len(values) if value is None else value
    figures = {"value": mean, "stderr": 0.1}
    task = {"items": len(items), "metrics": {metric: figures}, "samples": {metric: items}}
    return {"tasks": {"task": task | {"answer_tokens": tokens or {}}}}


def test_by_hand():
    # source 1 1 0 0, pruned 1 0 0 0: differences 0 -1 0 0, mean -1/4, squares 3 * 1/16 + 9/16 = 12/16,
    # variance of one (3/4) / 3 = 1/4, of the mean 1/16
    (row,) = compared(column([1, 1, 0, 0]), column([1, 0, 0, 0]))
    assert row["difference"] == {"value": -0.25, "stderr": 0.25}
    assert (row["task"], row["metric"], row["items"], row["answer_tokens"]) == ("task", "acc", 4, None)
    assert row["source"] == {"value": 0.5, "stderr": 0.1} and row["pruned"]["value"] == 0.25


@given(SCORES)
def test_difference_is_that_of_the_items(pairs):
    source = {str(item): one for item, (one, _) in enumerate(pairs)}
    pruned = {str(item): other for item, (_, other) in reversed(list(enumerate(pairs)))}
    differences = [other - one for one, other in pairs]
    found = paired(source, pruned)
    assert found["value"] == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert found["stderr"] == pytest.approx(statistics.stdev(differences) / math.sqrt(len(pairs)), abs=1e-12)


def test_only_items_of_both_are_compared():
    assert paired({"0": 1.0, "1": 0.0}, {"1": 1.0, "2": 5.0}) == {"value": 1.0, "stderr": None}
    assert paired({"0": 1.0}, {"2": 5.0}) is None


def test_a_metric_that_is_no_mean_has_no_difference():
    """A perplexity's items are log-likelihoods: their difference is none of perplexities."""
    one, other = (column([-1.0, -2.0], "perplexity,none", value=math.exp(1.5)) for _ in range(2))
    (row,) = compared(one, other)
    assert row["difference"] is None and row["metric"] == "perplexity"


def test_tokens_per_answer():
    one, other = column([1, 1], tokens={"0": 10, "1": 20}), column([1, 1], tokens={"0": 30, "1": 20})
    (row,) = compared(one, other)
    assert row["answer_tokens"] == {
        "source": {"value": 15, "stderr": 5},
        "pruned": {"value": 25, "stderr": 5},
        "difference": {"value": 10, "stderr": 10},
    }


def test_a_single_item_has_no_error():
    assert mean_and_error([3.0]) == {"value": 3.0, "stderr": None}


def test_figures_of_a_task_by_filter():
    """Items appear once for every filter; each metric takes those of its own, and answers count once."""
    row = {"alias": "t", "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A", "exact_match,loose": 1.0}
    samples = [
        {"doc_id": item, "filter": name, "exact_match": score, "resps": [["a b c"] if item else ["a"]]}
        for name, scores in (("strict", (0, 1)), ("loose", (1, 1)))
        for item, score in enumerate(scores)
    ]
    figures = task_figures(row, samples, lambda text: len(text.split()))
    assert figures == {
        "items": 2,
        "metrics": {
            "exact_match,strict": {"value": 0.5, "stderr": None},
            "exact_match,loose": {"value": 1.0, "stderr": None},
        },
        "samples": {"exact_match,strict": {"0": 0.0, "1": 1.0}, "exact_match,loose": {"0": 1.0, "1": 1.0}},
        "answer_tokens": {"0": 1.0, "1": 3.0},
    }


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        ("INFO ready\nTraceback:\n  x\nValueError: bad\n  of two lines\n", "ValueError: bad of two lines"),
        ("KeyError: 1\nDuring it:\na.b.NotFoundError: no\n    see https://x\n", "a.b.NotFoundError: no see https://x"),
        ("Killed\n", "Killed"),
    ],
)
def test_what_a_log_ends_with(log, wanted):
    assert why_it_ended(log.strip().splitlines()) == wanted
