"""What of a text its tokens still say: the text beside what its tokens decode to."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import NamedTuple


class RoundTrip(NamedTuple):
    """Counts over any number of texts: they add.

    characters, kept_characters: those that are no white space, and those of them that come back.
    spaces, kept_spaces: gaps of white space between words, and how many of them come back.
    """

    characters: int = 0
    kept_characters: int = 0
    spaces: int = 0
    kept_spaces: int = 0

    def plus(self, other: RoundTrip) -> RoundTrip:
        return RoundTrip(*(mine + its for mine, its in zip(self, other, strict=True)))


def round_trip(text: str, decoded: str) -> RoundTrip:
    """What of a text is in what its tokens decode to.

    Letter case and Unicode's compatibility forms do not count as lost (uncased tokenizers, NFKC). Order is not
    looked at.
    """
    if text == decoded:  # nearly always, and quick
        spaces, characters = _sizes(text)
        return RoundTrip(characters, characters, spaces, spaces)
    wanted, found = _folded(text), _folded(decoded)
    spaces, characters = _sizes(wanted)
    stays = Counter("".join(wanted.split())) & Counter("".join(found.split()))
    return RoundTrip(characters, stays.total(), spaces, min(spaces, _sizes(found)[0]))


def _sizes(text: str) -> tuple[int, int]:
    """Gaps between words, and characters of words."""
    words = text.split()
    return max(0, len(words) - 1), sum(map(len, words))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
