"""The built-in corpus: the prose in the running Python's own standard library, for runs without a download.

Its documents are the docstrings of every standard module (one document a module) and pydoc's help topics (one document
each). Sources are parsed, never imported; one Python version always gives the same corpus. A module is in one split as
a whole, and a docstring that stands in several modules never enters validation: none of its docstrings was trained on.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_VAL_FRACTION = 0.05
MIN_VAL_BYTES = 60_000

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
)


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a module's path in the standard library, or a topic."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]


def builtin_corpus(stdlib: Path | None = None) -> Corpus:
    """Read the corpus off the running Python's standard library (or off another one's folder).

    At least 5 % and 60 kB of it are validation: modules in the order of their names' SHA-256, none of them larger than
    a tenth of that share, so that no single module makes the score. pydoc's topics quote one another, so they stay
    together, in training.

    Raises FileNotFoundError where the standard library's sources are missing, or too few to fill a validation set.
    """
    folder = Path(sysconfig.get_path("stdlib")) if stdlib is None else stdlib
    modules = dict(_modules(folder))
    topics = tuple(_topics())
    held_by = Counter(docstring for docstrings in modules.values() for docstring in docstrings)
    total = sum(_size(docstrings) for docstrings in modules.values()) + _size(topic.text for topic in topics)
    share = max(MIN_VAL_BYTES, MIN_VAL_FRACTION * total)
    val: dict[str, list[str]] = {}
    size = 0
    for name in sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest()):
        own = [docstring for docstring in modules[name] if held_by[docstring] == 1]
        if own and _size(own) <= share / 10:
            val[name] = own
            size += _size(own)
        if size >= share:
            break
    else:
        raise FileNotFoundError(
            f"{folder}: the sources of Python's standard library are missing or stripped: their docstrings fill no "
            f"validation set of {share:,.0f} bytes. Prepare text files of your own instead."
        )
    train = {name: docstrings for name, docstrings in modules.items() if name not in val}
    return Corpus(_distinct([*_documents(train), *topics]), _distinct(_documents(dict(sorted(val.items())))))


def _modules(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every module's path and its docstrings, each once."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            docstrings = list(dict.fromkeys(_docstrings(path)))
            if docstrings:
                yield relative.as_posix(), docstrings


def _docstrings(path: Path) -> Iterator[str]:
    """A source file's docstrings in source order; none where it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    for node in sorted(owners, key=lambda node: node.body[0].lineno):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring.encode("utf-8", "replace").decode("utf-8")  # escapes may spell lone surrogates


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield Document(f"pydoc topic {name}", topics[name].strip())


def _documents(modules: dict[str, list[str]]) -> Iterator[Document]:
    for name, docstrings in modules.items():
        yield Document(name, "\n\n".join(docstrings))


def _distinct(documents: Iterable[Document]) -> tuple[Document, ...]:
    return tuple({document.text: document for document in documents}.values())


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)
