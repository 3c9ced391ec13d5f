"""A part of a text: the first sequences of every domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tenp_dist.calibration.corpus import Corpus


def first_sequences(corpus: Corpus, count: int) -> Corpus:
    """The first sequences of every domain, at most `count`."""
    domain_N = corpus.domain_N
    place_N = np.zeros(len(domain_N), dtype=np.int64)
    for domain in range(len(corpus.domains)):
        own = domain_N == domain
        place_N[own] = np.arange(own.sum())
    first = place_N < count
    return replace(corpus, tokens_NS=corpus.tokens_NS[first], mask_NS=corpus.mask_NS[first], domain_N=domain_N[first])
