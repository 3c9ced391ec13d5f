"""What became of a source's text on its way to tokens, counted while it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tenp_dist.calibration.round_trip import RoundTrip

_SMALL = 0.01  # shares up to it are not worth a word
_LOST = 0.5  # below it the text is another one
_FEW = 20  # characters or gaps that say nothing of a tokenizer
_BEGINNING = 200  # characters


@dataclass
class Tally:
    """Counts of one source.

    label: what messages call it.
    rows: read so far.
    blank: of them without text.
    repeated: of them with the text of an earlier one.
    given, taken: characters of chat messages, and those that the template hands on.
    tokenizer: what of the text its tokens still say.
    """

    label: str
    rows: int = 0
    blank: int = 0
    repeated: int = 0
    given: int = 0
    taken: int = 0
    tokenizer: RoundTrip = field(default_factory=RoundTrip)
    _seen: set[int] = field(default_factory=set)

    def count(self, text: str) -> bool:
        """Count a row's text; whether there is any."""
        self.rows += 1
        if not text.strip():
            self.blank += 1
            return False
        self.repeated += hash(text) in self._seen
        self._seen.add(hash(text))
        return True

    def messages(self, given: int, taken: int) -> None:
        """Count the characters of a conversation, and those that the template hands on."""
        self.given, self.taken = self.given + given, self.taken + taken

    def lost(self) -> str | None:
        """What of the text the tokenizer loses, where what is left is another text; None where it keeps it."""
        told = self.tokenizer
        if told.spaces >= _FEW and told.kept_spaces < _LOST * told.spaces:
            return f"{told.kept_spaces:,} of {told.spaces:,} spaces between words"
        if told.characters >= _FEW and told.kept_characters < _LOST * told.characters:
            return f"{told.kept_characters:,} of {told.characters:,} characters"
        return None

    def warnings(self) -> list[str]:
        """What a reader of the figures should know."""
        documents = self.rows - self.blank
        lost = 1 - _share(self.taken, self.given)
        silent = 1 - _share(self.tokenizer.kept_characters, self.tokenizer.characters)
        told = {
            f"{self.blank:,} of {self.rows:,} rows are blank": self.blank / max(self.rows, 1),
            f"{self.repeated:,} of {documents:,} documents equal an earlier one": self.repeated / max(documents, 1),
            f"the chat template leaves out {lost:.0%} of the messages' characters, as templates do with reasoning "
            "before </think>; render the rows yourself and set text_column to keep it": lost,
            f"the tokens do not say {silent:.0%} of the text's characters": silent,
        }
        return [f"{self.label}: {words}" for words, share in told.items() if share > _SMALL]


@dataclass(frozen=True)
class SourceReport:
    """What a source gave.

    label: path or name.
    domain: its domain.
    rows: that were read.
    documents: of them that hold text.
    sequences, tokens: that were taken, padding not counted.
    begins: what the first sequence decodes to, its beginning.
    warnings: what a reader of the figures should know.
    """

    label: str
    domain: str
    rows: int
    documents: int
    sequences: int
    tokens: int
    begins: str
    warnings: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON types, without the warnings."""
        return {name: value for name, value in vars(self).items() if name != "warnings"}


def report_of(tally: Tally, domain: str, lengths: list[int], decoded: str) -> SourceReport:
    """lengths: tokens of each sequence. decoded: the first one's text."""
    documents = tally.rows - tally.blank
    begins, warnings = decoded[:_BEGINNING], tuple(tally.warnings())
    return SourceReport(tally.label, domain, tally.rows, documents, len(lengths), sum(lengths), begins, warnings)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
