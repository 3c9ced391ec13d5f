"""Text for small calibration and training runs, read from the Python standard library where it lies.

Three domains:
  code        module sources, comments kept and docstrings taken out (so that it differs from `docstrings`)
  docstrings  prose docstrings of modules, classes and functions, doctest paragraphs taken out
  math        generated arithmetic: short sums and one-step word problems
Files go to one of three splits by a hash of their path, so a file's code and its docstrings share a split
and the split does not change with the Python version. The three splits of `math` use three seeds.
"""

import ast
import hashlib
import json
import os
import random
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

DOMAINS = ("code", "docstrings", "math")
SPLITS = ("training", "calibration", "evaluation")

SPLIT_ENDS = {"training": 0.80, "calibration": 0.90, "evaluation": 1.0}
MATH_DOCUMENTS = {"training": 3000, "calibration": 150, "evaluation": 150}
PIECE_CHARS = 4000
MIN_PIECE_CHARS = 200
MAX_FILE_BYTES = 150_000

SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"),
    *("encodings", "_bundled", "__pycache__", "lib-dynload", "turtledemo"),
}
# Tables of names and numbers, and build settings that hold the paths of one machine.
SKIPPED_PREFIXES = ("_sysconfigdata", "entities.py", "stringprep.py", "config-")

NAMES = ("Ana", "Ben", "Cara", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "cards", "coins", "shells", "stones")


def documents(domain: str, split: str) -> Iterator[str]:
    """The documents of one domain in one split, in a fixed order."""
    if domain not in DOMAINS or split not in SPLITS:
        raise ValueError(f"no such text: {domain}.{split} (domains {DOMAINS}, splits {SPLITS})")
    if domain == "math":
        yield from _math_documents(split)
        return
    for path in _split_files(split):
        code, prose = _code_and_prose(path)
        yield from _pieces(code if domain == "code" else prose)


def split_of(relative_path: str) -> str:
    """The split of a standard-library file, from a hash of its path."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return next(split for split, end in SPLIT_ENDS.items() if share < end)


def _split_files(split: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in _source_files(root) if split_of(path.relative_to(root).as_posix()) == split]
    if not files:
        raise FileNotFoundError(f"no Python sources for the {split} split under {root}; is the library zipped?")
    return files


@cache
def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, children, names in os.walk(root):
        children[:] = sorted(set(children) - SKIPPED_FOLDERS)
        paths = (Path(folder, name) for name in sorted(names) if name.endswith(".py"))
        found += [path for path in paths if not path.name.startswith(SKIPPED_PREFIXES)]
    return [path for path in found if path.stat().st_size <= MAX_FILE_BYTES]


@cache
def _code_and_prose(path: Path) -> tuple[str, str]:
    """One parse of a file gives both domains: its source without docstrings, and its docstrings."""
    source = path.read_text(encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    owners = [node for node in _definitions(tree) if ast.get_docstring(node, clean=False) is not None]
    prose = [_prose(ast.get_docstring(node)) for node in owners]
    return _without_docstrings(source, owners), "\n\n".join(text for text in prose if text)


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Modules, classes and functions in source order; expressions are not entered, which keeps this fast."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def _without_docstrings(source: str, owners: list[ast.AST]) -> str:
    # Python counts lines by \n alone, where splitlines() would also break at form feeds.
    lines = source.split("\n")
    for owner in owners:
        doc = owner.body[0]
        line = lines[doc.lineno - 1]
        if not line[: doc.col_offset].isspace() and doc.col_offset:
            continue  # on the line of its `def`: part of the code
        lines[doc.lineno - 1 : doc.end_lineno] = [None] * (doc.end_lineno - doc.lineno + 1)
        if len(owner.body) == 1:
            lines[doc.lineno - 1] = " " * doc.col_offset + "pass"
    return "\n".join(line for line in lines if line is not None)


def _prose(docstring: str) -> str:
    """The prose paragraphs of a docstring, or nothing if it is a bare phrase or a table."""
    paragraphs = [part for part in docstring.split("\n\n") if ">>>" not in part]
    text = "\n\n".join(paragraphs).strip()
    letters = sum(char.isalpha() or char == " " for char in text)
    return text if len(text.split()) >= 8 and letters >= 0.8 * len(text) else ""


def _pieces(text: str) -> Iterator[str]:
    """Cuts at blank lines into documents of about PIECE_CHARS characters; drops scraps."""
    piece = ""
    for block in text.split("\n\n"):
        if len(piece) + len(block) > PIECE_CHARS and piece:
            yield from _kept(piece)
            piece = ""
        piece += ("\n\n" if piece else "") + block
    yield from _kept(piece)


def _kept(piece: str) -> Iterator[str]:
    if len(piece) >= MIN_PIECE_CHARS:
        yield piece.strip("\n") + "\n"


def _math_documents(split: str) -> Iterator[str]:
    rng = random.Random(f"math/{split}")
    for _ in range(MATH_DOCUMENTS[split]):
        makers = rng.choices((_sum, _product, _gain, _loss), weights=(4, 3, 2, 2), k=rng.randint(12, 24))
        yield "\n".join(make(rng) for make in makers) + "\n"


def _sum(rng: random.Random) -> str:
    high, low = sorted((rng.randint(0, 99), rng.randint(0, 99)), reverse=True)
    if rng.random() < 0.5:
        return f"{high} - {low} = {high - low}"
    return f"{low} + {high} = {low + high}"


def _product(rng: random.Random) -> str:
    left, right = rng.randint(0, 12), rng.randint(0, 12)
    return f"{left} * {right} = {left * right}"


def _gain(rng: random.Random) -> str:
    name, things, had, more = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 60), rng.randint(2, 39)
    question = f"Q: {name} has {had} {things} and buys {more} more. How many {things} does {name} have?"
    return f"{question}\nA: {had} + {more} = {had + more}"


def _loss(rng: random.Random) -> str:
    name, things, had = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 60)
    given = rng.randint(1, had)
    question = f"Q: {name} has {had} {things} and gives away {given}. How many {things} are left?"
    return f"{question}\nA: {had} - {given} = {had - given}"


def write_jsonl(domain: str, split: str, folder: Path) -> Path:
    """Writes one domain of one split; a reader never sees half a file."""
    target = folder / f"{domain}.{split}.jsonl"
    lines = [json.dumps({"text": text, "domain": domain}) + "\n" for text in documents(domain, split)]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, delete=False) as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary = Path(file.name)
    temporary.chmod(0o644)  # temporary files are private, data sets are not
    temporary.replace(target)
    return target


@click.command()
@click.option("--split", "splits", type=click.Choice(SPLITS), multiple=True, required=True, help="May be repeated.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write to.")
def main(splits: tuple[str, ...], out: Path) -> None:
    """Write DOMAIN.SPLIT.jsonl files with the fields `text` and `domain`."""
    out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        for domain in DOMAINS:
            path = write_jsonl(domain, split, out)
            click.echo(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
