"""Calibration and evaluation tokens: text of any `datasets` source -> fixed-length sequences.

`concat` joins BOS + text + EOS of the documents of a source and cuts the stream (no padding);
`document` keeps one document per sequence, cut or padded. Documents are drawn in a seeded order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tenp_dist.artifacts import atomic_write
from tenp_dist.calibration.documents import documents_of
from tenp_dist.calibration.round_trip import round_trip
from tenp_dist.calibration.rows import label_of
from tenp_dist.calibration.tally import SourceReport, Tally, report_of
from tenp_dist.calibration.tokenizer import load_tokenizer, token_ids
from tenp_dist.config import Source, Text
from tenp_dist.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_BATCH = 64
_WINDOW = 32  # tokens that are compared at a time


@dataclass(frozen=True)
class Corpus:
    """Sequences of one length.

    tokens_NS: int32.
    mask_NS: bool, false on padding.
    domain_N: int32, index into `domains`.
    domains: their names.
    """

    tokens_NS: np.ndarray
    mask_NS: np.ndarray
    domain_N: np.ndarray
    domains: tuple[str, ...]

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(json.dumps([self.domains, self.tokens_NS.shape]).encode())
        for array in (self.tokens_NS, self.mask_NS, self.domain_N):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def tokens_by_domain(self) -> dict[str, int]:
        """Tokens per domain, padding not counted."""
        per_sequence = self.mask_NS.sum(axis=1)
        return {name: int(per_sequence[self.domain_N == i].sum()) for i, name in enumerate(self.domains)}


class Split(NamedTuple):
    """The sequences of a text.

    corpus: those to use.
    aside: those set aside, None where none were asked for.
    sources: what each source gave.
    """

    corpus: Corpus
    aside: Corpus | None
    sources: tuple[SourceReport, ...]

    @property
    def warnings(self) -> list[str]:
        """What a reader of the figures should know of the text."""
        return [words for source in self.sources for words in source.warnings]


def build_corpus(text: Text, model: Path, vocab_size: int) -> Corpus:
    """Tokenise every source.

    Raises:
        CalibrationError: no tokenizer, or one that loses the text; tokens outside the vocabulary; unreadable, empty or
            too short text.
    """
    return build_split(text, model, vocab_size, Fraction(0)).corpus


def build_split(text: Text, model: Path, vocab_size: int, share: Fraction) -> Split:
    """Tokenise every source and set aside the last `share` of its sequences, at least one; none for share 0.

    The last ones, so that no more than one document of a source lies on both sides.

    Raises:
        CalibrationError: as `build_corpus`.
    """
    tokenizer = load_tokenizer(model)
    domains = tuple(dict.fromkeys(source.domain for source in text.sources))
    kept, aside, reports = [], [], []
    for source in text.sources:
        sequences, tally = _sequences(source, text, tokenizer)
        _check_vocabulary(sequences, vocab_size, source, model)
        _check_kept(tally, model)
        decoded = tokenizer.decode(sequences[0], clean_up_tokenization_spaces=False)
        reports.append(report_of(tally, source.domain, list(map(len, sequences)), decoded))
        last = max(1, math.floor(share * len(sequences))) if share else 0
        domain, cut = domains.index(source.domain), len(sequences) - last
        kept += [(domain, row) for row in sequences[:cut]]
        aside += [(domain, row) for row in sequences[cut:]]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    pad = pad if pad < vocab_size else 0  # some tokenizers add a pad token that the model has no row for
    assembled = [_assemble(rows, text.sequence_length, pad, domains) for rows in (kept, aside)]
    return Split(assembled[0], assembled[1] if share else None, tuple(reports))


def _assemble(rows: Sequence[tuple[int, list[int]]], length: int, pad: int, domains: tuple[str, ...]) -> Corpus:
    """rows: (domain, tokens) of every sequence."""
    tokens_NS = np.full((len(rows), length), pad, dtype=np.int32)
    mask_NS = np.zeros(tokens_NS.shape, dtype=bool)
    for i, (_, row) in enumerate(rows):
        tokens_NS[i, : len(row)] = row
        mask_NS[i, : len(row)] = True
    return Corpus(tokens_NS, mask_NS, np.asarray([domain for domain, _ in rows], dtype=np.int32), domains)


def joined(*corpora: Corpus) -> Corpus:
    """Corpora of the same domains and length, one after the other."""
    tokens_NS, mask_NS, domain_N = (
        np.concatenate([getattr(c, name) for c in corpora]) for name in ("tokens_NS", "mask_NS", "domain_N")
    )
    return Corpus(tokens_NS, mask_NS, domain_N, corpora[0].domains)


def write_corpus(path: Path, corpus: Corpus) -> None:
    """Store as an Arrow file: input_ids, attention_mask, domain; the digest in its metadata."""
    import pyarrow as pa

    table = pa.table(
        {
            "input_ids": pa.array(list(corpus.tokens_NS), type=pa.list_(pa.int32())),
            "attention_mask": pa.array(list(corpus.mask_NS.astype(np.int8)), type=pa.list_(pa.int8())),
            "domain": pa.array([corpus.domains[i] for i in corpus.domain_N]),
        }
    ).replace_schema_metadata({"domains": json.dumps(corpus.domains), "digest": corpus.digest})
    with atomic_write(path) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def read_corpus(path: Path) -> Corpus:
    """What `write_corpus` stored."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        domains = tuple(json.loads(table.schema.metadata[b"domains"]))
        shape = (table.num_rows, -1)
        return Corpus(
            table["input_ids"].combine_chunks().flatten().to_numpy().reshape(shape).copy(),
            table["attention_mask"].combine_chunks().flatten().to_numpy().reshape(shape).astype(bool),
            np.asarray([domains.index(name) for name in table["domain"].to_pylist()], dtype=np.int32),
            domains,
        )


def seen_share(corpus: Corpus, reference: Corpus) -> dict[str, float]:
    """Share of a corpus's aligned pieces of 32 tokens that occur anywhere in `reference`, per domain.

    Evaluation text that was calibrated on flatters the result; 0 is what a trusted figure needs.
    """
    known = np.unique(np.concatenate([_window_hashes(row[mask], 1) for row, mask in _rows(reference)]))
    shares = {}
    for i, name in enumerate(corpus.domains):
        pieces = [_window_hashes(row[mask], _WINDOW) for row, mask in _rows(corpus, i)]
        hashes = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint64)
        shares[name] = float(np.isin(hashes, known).mean()) if hashes.size else 0.0
    return shares


def _rows(corpus: Corpus, domain: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i in range(len(corpus.tokens_NS)):
        if domain is None or corpus.domain_N[i] == domain:
            yield corpus.tokens_NS[i], corpus.mask_NS[i]


def _window_hashes(tokens: np.ndarray, step: int) -> np.ndarray:
    if tokens.size < _WINDOW:
        return np.zeros(0, dtype=np.uint64)
    powers = np.cumprod(np.full(_WINDOW, 0x9E3779B97F4A7C15, dtype=np.uint64))  # wraps modulo 2^64
    views = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), _WINDOW)[::step]
    return (views * powers).sum(axis=1, dtype=np.uint64)


def _sequences(source: Source, text: Text, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], Tally]:
    tally = Tally(label_of(source))
    encoded = _encode(documents_of(source, text.seed, tokenizer, tally), source, tokenizer, tally)
    cut = _concatenated if text.packing == "concat" else _one_per_document
    sequences: list[list[int]] = []
    for sequence in cut(encoded, text.sequence_length):
        sequences.append(sequence)
        if len(sequences) == source.samples:
            return sequences, tally
    raise CalibrationError(
        "Source has too little text" if sequences else "Source is empty or shorter than one sequence",
        where=f"{label_of(source)} (domain {source.domain})",
        found=f"{len(sequences)} sequences of {text.sequence_length} tokens",
        wanted=f"{source.samples} sequences",
        next_step="lower `samples` or `sequence_length`, or give more text",
    )


def _concatenated(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    stream: list[int] = []
    for tokens in documents:
        stream.extend(tokens)
        whole = len(stream) // length * length
        yield from (stream[i : i + length] for i in range(0, whole, length))
        stream = stream[whole:]


def _one_per_document(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    yield from (tokens[:length] for tokens in documents if len(tokens) > 1)


def _encode(
    documents: Iterable[str], source: Source, tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> Iterator[list[int]]:
    chat = source.messages_column is not None  # a chat template brings its own special tokens
    bos = [] if chat or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _TOKENIZER_BATCH:
            yield from _encode_batch(batch, tokenizer, bos, eos, tally)
            batch = []
    if batch:
        yield from _encode_batch(batch, tokenizer, bos, eos, tally)


def _encode_batch(
    batch: list[str], tokenizer: PreTrainedTokenizerBase, bos: list[int], eos: list[int], tally: Tally
) -> Iterator[list[int]]:
    encoded, texts = token_ids(tokenizer, batch)
    for document, decoded in zip(batch, texts, strict=True):
        tally.tokenizer = tally.tokenizer.plus(round_trip(document, decoded))
    yield from (bos + tokens + eos for tokens in encoded if tokens)


def _check_kept(tally: Tally, model: Path) -> None:
    lost = tally.lost()
    if lost is not None:
        raise CalibrationError(
            "The tokenizer loses the text",
            where=f"{model}, text of {tally.label}",
            found=f"its tokens give back {lost}",
            wanted="tokens that decode to the text",
            next_step="use the tokenizer.json and tokenizer_config.json that belong to the weights; where "
            "tokenizer_config.json names a class by auto_map, that code is never run: take the entry out",
        )


def _check_vocabulary(sequences: list[list[int]], vocab_size: int, source: Source, model: Path) -> None:
    largest = max((max(sequence) for sequence in sequences), default=0)
    if largest >= vocab_size:
        raise CalibrationError(
            "Tokenizer does not belong to the model",
            where=f"{model}, text of {label_of(source)}",
            found=f"token id {largest}",
            wanted=f"ids below the model's vocab_size {vocab_size}",
            next_step="use the tokenizer that came with the weights",
        )
