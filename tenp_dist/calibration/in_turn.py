"""The sequences of a step of training: a few at a time, from an order in which domains take turns."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from tenp_dist.calibration.corpus import Corpus


def sequences_of(corpus: Corpus, count: int, seed: int, number: int, without: Collection[str] = ()) -> Corpus:
    """The sequences of a step: `count` from place `number * count` on of an order in which domains take turns.

    The order is drawn once; at its end it begins again.

    without: domains that are left out.
    """
    draw = np.random.Generator(np.random.Philox(seed % 2**64))
    own = [
        draw.permutation(np.flatnonzero(corpus.domain_N == i))
        for i, name in enumerate(corpus.domains)
        if name not in without
    ]
    most = max(map(len, own))
    order = [ids[turn] for turn in range(most) for ids in own if turn < len(ids)]
    chosen = sorted(order[(number * count + i) % len(order)] for i in range(min(count, len(order))))
    return Corpus(corpus.tokens_NS[chosen], corpus.mask_NS[chosen], corpus.domain_N[chosen], corpus.domains)
