"""Which environment variables do the public training scripts read, and with which defaults?

    python dev/collect_variables.py CLONE --pulls 286 289 --out tests/data/public_variables.json

CLONE is a clone of github.com/openai/parameter-golf. Read are its train_gpt.py, the trainers under records/, and those
that the named pull requests add (git fetch origin refs/pull/286/head:refs/pull/286/head).

Scripts are parsed and never run. Found is what reads `os.environ` or `os.getenv` under any name they are given, by
get, pop, setdefault, an index or `in`; directly or through functions that the script defines for it; with keys that are
literals, or loop and constant variables over literals. A script that unpacks itself (exec of a compressed literal)
is unpacked and read. What could not be read is said on stderr. The collection, names and defaults, is what
tests/test_environment.py checks pgolf.config.environment against: {variable: [scripts that read it, default, ...]}.
"""

from __future__ import annotations

import argparse
import ast
import base64
import binascii
import bz2
import itertools
import json
import lzma
import re
import subprocess
import sys
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a self-extracting script may unpack to, in bytes; the largest known one is 0.2 MB.
UNPACKED_MOST = 16_000_000
# Shorter literals are no packed scripts.
PACKED_LEAST = 500
# Characters of a default that the collection keeps; lists of patterns are longer, and their whole is the script's own.
KEPT_MOST = 60

_READING_METHODS = ("get", "pop", "setdefault")

# A variable's name; then a default in its quotes, or one that has none.
_READ = re.compile(
    r"""(?:environ(?:\.get|\.pop|\.setdefault)\(|getenv\(|environ\[)['"](\w+)['"](?:,(?:(['"])(.*?)\2|([^,()]+)))?"""
)


@dataclass
class Found:
    """What one script reads: {variable: its defaults as text}, None for a read without one; and what stayed unread."""

    variables: dict[str, set[str | None]] = field(default_factory=lambda: defaultdict(set))
    unread: list[str] = field(default_factory=list)


def variables_of(source: str | bytes) -> Found:
    """The variables that a script reads; raises ValueError where it is not text."""
    found = Found()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a script's invalid escapes are not ours to mend
            tree = ast.parse(source)
    except SyntaxError as error:
        # Python before 3.12 does not know f-strings with their own quotes inside, which short scripts have.
        found.unread.append(f"{error}: read by its text, not by its syntax")
        for name, quote, quoted, bare in _READ.findall(source if isinstance(source, str) else source.decode()):
            found.variables[name].add(quoted if quote else _plain_number(bare))
        return found
    _Reader(tree, found).read()
    for inner in _unpacked(tree, found):
        there = variables_of(inner)
        found.unread += there.unread
        for name, defaults in there.variables.items():
            found.variables[name] |= defaults
    return found


# ---- Reads of the environment


@dataclass
class _Wrapper:
    """A function of the script's own that reads the variable that its parameter number `key` names."""

    parameters: list[str]
    key: int
    default: int | None  # the parameter that is the default
    fixed: str | None  # the default where it is no parameter
    defaults: dict[str, ast.expr]  # what parameters are where a call leaves them out

    def arguments(self, call: ast.Call) -> tuple[ast.expr | None, ast.expr | None]:
        """The expressions of the variable's name and of its default in a call."""
        given = {**self.defaults, **dict(zip(self.parameters, call.args, strict=False))}
        given.update((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg)
        default = None if self.default is None else given.get(self.parameters[self.default])
        return given.get(self.parameters[self.key]), default


class _Reader:
    def __init__(self, tree: ast.Module, found: Found) -> None:
        self.tree, self.found = tree, found
        self.os, self.environ, self.readers = {"os"}, set[str](), set[str]()
        self.constants: dict[str, set[str]] = defaultdict(set)
        self.wrappers: dict[str, list[_Wrapper]] = defaultdict(list)
        self.functions = {
            node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        }
        self.names_of: dict[ast.AST, str] = {
            node: node.name for node in self.functions if not isinstance(node, ast.Lambda)
        }
        self.inside: dict[ast.AST, ast.AST | None] = {}  # the function around each node

    def read(self) -> None:
        self._enclose(self.tree, None)
        self._aliases()
        self._bindings()
        reads = [read for node in ast.walk(self.tree) for read in self._direct(node)]
        pending, done = reads, set[tuple[str, int]]()
        while pending:
            added = []
            for node, key, default in pending:
                wrapper = self._wrapper(node, key, default)
                if wrapper is None:
                    self._take(node, key, default)
                    continue
                name, made = wrapper
                if (name, made.key) not in done:
                    done.add((name, made.key))
                    self.wrappers[name].append(made)
                    added.append((name, made))
            pending = [read for name, made in added for read in self._calls(name, made)]

    def _enclose(self, node: ast.AST, function: ast.AST | None) -> None:
        stack = [(node, function)]
        while stack:
            node, function = stack.pop()
            self.inside[node] = function
            within = node if node in self.functions else function
            stack += [(child, within) for child in ast.iter_child_nodes(node)]

    def _aliases(self) -> None:
        """The names that `os`, `os.environ` and the functions that read it go by."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                self.os |= {name.asname or name.name for name in node.names if name.name == "os"}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                for name in node.names:
                    if name.name == "environ":
                        self.environ.add(name.asname or name.name)
                    elif name.name == "getenv":
                        self.readers.add(name.asname or name.name)
        for _ in range(3):  # an alias of an alias of an alias
            for targets, value in self._assignments():
                for name in (target.id for target in targets if isinstance(target, ast.Name)):
                    if isinstance(value, ast.Name) and value.id in self.os:
                        self.os.add(name)
                    elif self._is_environ(value):
                        self.environ.add(name)
                    elif self._is_reader(value):
                        self.readers.add(name)
                    elif isinstance(value, ast.Lambda):
                        self.names_of[value] = name

    def _assignments(self) -> Iterator[tuple[list[ast.expr], ast.expr]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if (
                        isinstance(target, ast.Tuple)
                        and isinstance(node.value, ast.Tuple)
                        and len(target.elts) == len(node.value.elts)
                    ):
                        yield from (([one], value) for one, value in zip(target.elts, node.value.elts, strict=True))
                    else:
                        yield [target], node.value
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                yield [node.target], node.value

    def _bindings(self) -> None:
        """What texts each name may stand for: assigned literals, and loops over literals."""
        for targets, value in self._assignments():
            for target in targets:
                self._bind(target, [value])
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.For, ast.comprehension)):
                self._bind(node.target, self._elements(node.iter))

    def _elements(self, node: ast.expr) -> list[ast.expr]:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return node.elts
        if isinstance(node, ast.Dict):
            return [key for key in node.keys if key is not None]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Dict)
        ):
            pairs = [
                (key, value) for key, value in zip(node.func.value.keys, node.func.value.values, strict=True) if key
            ]
            if node.func.attr == "items":
                return [ast.Tuple([key, value], ast.Load()) for key, value in pairs]
            return [key for key, _ in pairs]
        if isinstance(node, ast.Name):  # a list that has a name
            lists = [value for targets, value in self._assignments() if _names(targets, node.id)]
            return [item for value in lists if not isinstance(value, ast.Name) for item in self._elements(value)]
        return []

    def _bind(self, target: ast.expr, values: Iterable[ast.expr]) -> None:
        for value in values:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                self.constants[target.id].add(value.value)
            elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
                for inner, item in zip(target.elts, value.elts, strict=False):
                    self._bind(inner, [item])

    def _is_environ(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.environ
        return (
            isinstance(node, ast.Attribute)
            and node.attr == "environ"
            and isinstance(node.value, ast.Name)
            and node.value.id in self.os
        )

    def _is_reader(self, node: ast.expr) -> bool:
        """Whether an expression is a function that takes a variable's name and a default."""
        if isinstance(node, ast.Name):
            return node.id in self.readers
        if not isinstance(node, ast.Attribute):
            return False
        if node.attr in _READING_METHODS:
            return self._is_environ(node.value)
        return node.attr == "getenv" and isinstance(node.value, ast.Name) and node.value.id in self.os

    def _direct(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.expr, ast.expr | None]]:
        """(node, key, default) of a read that stands there."""
        if isinstance(node, ast.Call) and self._is_reader(node.func):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if given:
                yield node, given[0], given[1] if len(given) > 1 else None
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and self._is_environ(node.value):
            yield node, node.slice, None
        elif (
            isinstance(node, ast.Compare)
            and isinstance(node.ops[0], (ast.In, ast.NotIn))
            and self._is_environ(node.comparators[0])
        ):
            yield node, node.left, None

    def _wrapper(self, node: ast.AST, key: ast.expr, default: ast.expr | None) -> tuple[str, _Wrapper] | None:
        """The function that a read makes one that reads: its key is a parameter of the function around it."""
        function = self.inside.get(node)
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return None
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [argument.arg for argument in arguments]
        name = self.names_of.get(function)
        if name is None or not isinstance(key, ast.Name) or key.id not in names:
            return None
        if names[0] in ("self", "cls"):
            arguments, names = arguments[1:], names[1:]
        positional = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
        absent = dict(zip(positional[::-1], function.args.defaults[::-1], strict=False))
        absent.update(
            (argument.arg, value)
            for argument, value in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            if value is not None
        )
        inner = default
        while isinstance(inner, ast.Call) and inner.args:  # str(default)
            inner = inner.args[0]
        number = names.index(inner.id) if isinstance(inner, ast.Name) and inner.id in names else None
        fixed = None if default is None or number is not None else _text(default)
        if number is None and default is None:
            # `if name in os.environ ... else default`: the second parameter is the default by custom.
            number = next((i for i, other in enumerate(names) if other in ("default", "d", "fallback")), None)
        return name, _Wrapper(names, names.index(key.id), number, fixed, absent)

    def _calls(self, name: str, wrapper: _Wrapper) -> Iterator[tuple[ast.AST, ast.expr, ast.expr | None]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and _called(node) == name:
                key, default = wrapper.arguments(node)
                if key is not None:
                    fixed = None if wrapper.fixed is None else ast.Constant(wrapper.fixed)
                    yield node, key, fixed if default is None else default

    def _take(self, node: ast.AST, key: ast.expr, default: ast.expr | None) -> None:
        names = self._texts(key)
        if not names:
            self.found.unread.append(f"line {getattr(node, 'lineno', 0)}: the variable {ast.unparse(key)}")
        for name in names:
            self.found.variables[name].add(None if default is None else _text(default))

    def _texts(self, node: ast.expr) -> set[str]:
        """Every text that an expression may be; empty: not known."""
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else set()
        if isinstance(node, ast.Name):
            return self.constants.get(node.id, set())
        if isinstance(node, ast.FormattedValue):
            return self._texts(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
            method = {"upper": str.upper, "lower": str.lower, "strip": str.strip}.get(node.func.attr)
            return {method(text) for text in self._texts(node.func.value)} if method else set()
        if isinstance(node, ast.IfExp):
            return self._texts(node.body) | self._texts(node.orelse)
        parts = []
        if isinstance(node, ast.JoinedStr):
            parts = [self._texts(part) for part in node.values]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts = [self._texts(node.left), self._texts(node.right)]
        return {"".join(texts) for texts in itertools.product(*parts)} if parts else set()


def _names(targets: Iterable[ast.expr], name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _called(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None


def _text(default: ast.expr) -> str:
    """A default as the variable's text would be: 0.5 and "0.5" alike; an expression as it is written."""
    while isinstance(default, ast.Call) and _called(default) in ("str", "int", "float") and len(default.args) == 1:
        default = default.args[0]
    if isinstance(default, ast.Constant):
        value = default.value
        return str(int(value)) if isinstance(value, bool) else str(value)
    return ast.unparse(default)


def _plain_number(text: str) -> str | None:
    """A default without quotes as ``_text`` would write it; None for none."""
    try:
        return _text(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return None


# ---- Scripts that unpack themselves


def _unpacked(tree: ast.Module, found: Found) -> Iterator[str]:
    """The Python sources in the compressed literals of a script that calls exec."""
    if not any(isinstance(node, ast.Call) and _called(node) == "exec" for node in ast.walk(tree)):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and len(node.value) >= PACKED_LEAST:
            inner = _decoded(node.value)
            if inner is not None:
                yield inner
            elif b" " not in (node.value if isinstance(node.value, bytes) else node.value.encode()):
                found.unread.append(f"line {node.lineno}: a packed script of {len(node.value):,} characters")


_DECODERS: tuple[Callable[[bytes], bytes], ...] = (
    base64.b85decode,
    lambda text: base64.b64decode(text, validate=True),
    base64.a85decode,
    lambda text: text,
)


def _decoded(literal: str | bytes) -> str | None:
    raw = literal if isinstance(literal, bytes) else literal.encode("latin-1", "replace")
    for decode in _DECODERS:
        try:
            packed = decode(raw)
        except (ValueError, binascii.Error):
            continue
        for make in (
            lzma.LZMADecompressor,
            lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]),
            bz2.BZ2Decompressor,
        ):
            try:
                return make().decompress(packed, UNPACKED_MOST).decode()
            except (lzma.LZMAError, OSError, UnicodeDecodeError, EOFError):
                continue
        for bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
            try:
                return zlib.decompressobj(bits).decompress(packed, UNPACKED_MOST).decode()
            except (zlib.error, UnicodeDecodeError):
                continue
    return None


# ---- All scripts together

# What lies beside the trainers: it prepares data.
_NO_TRAINERS = (
    "cached_challenge_fineweb.py",
    "download_hf_docs_and_tokenize.py",
    "lossless_caps.py",
    "prepare_caseops_data.py",
    "transpile_to_bytes.py",
)

# Scripts name variables in capitals; what else a reader finds is a key of some dictionary of theirs.
_NAME = re.compile("[A-Z][A-Z0-9_]*")


def scripts_of(repository: Path, commit: str, pulls: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the trainers at ``commit``, and of those that the pull requests add to it."""
    for path in _git(repository, "ls-tree", "-r", "--name-only", "-z", commit).decode().split("\0"):
        if _is_trainer(path):
            yield path, _git(repository, "show", f"{commit}:{path}")
    for pull in pulls:
        head = f"refs/pull/{pull}/head"
        base = _git(repository, "merge-base", commit, head).decode().strip()
        for path in _git(repository, "diff", "--diff-filter=d", "--name-only", "-z", base, head).decode().split("\0"):
            if _is_trainer(path):
                yield f"#{pull} {path}", _git(repository, "show", f"{head}:{path}")


def _is_trainer(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return path == "train_gpt.py" or (
        folder.startswith("records/") and name.endswith(".py") and name not in _NO_TRAINERS
    )


def _git(repository: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", repository, *arguments], check=True, capture_output=True).stdout


def collect(scripts: Iterable[tuple[str, bytes]]) -> tuple[dict[str, Any], list[str]]:
    """What tests/data/public_variables.json holds of scripts (name, content), and what could not be read, line by line.

    Scripts of the same content count once.
    """
    variables: dict[str, list[set[str | None]]] = defaultdict(list)
    unread, seen = [], set[bytes]()
    for name, content in scripts:
        if content in seen:
            continue
        seen.add(content)
        try:
            found = variables_of(content)
        except ValueError as error:
            unread.append(f"{name}: not text: {error}")
            continue
        unread += [f"{name}: {what}" for what in found.unread]
        for variable, defaults in found.variables.items():
            if _NAME.fullmatch(variable):
                variables[variable].append(defaults)
    return {
        "scripts": len(seen),
        "variables": {
            name: [
                len(reads),
                *sorted({_short(default) for defaults in reads for default in defaults if default is not None}),
            ]
            for name, reads in sorted(variables.items())
        },
    }, unread


def _short(default: str) -> str:
    """A default as it is kept: whole, or its beginning where it is a list of patterns or an expression."""
    return default if len(default) <= KEPT_MOST else default[: KEPT_MOST - 1] + "…"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repository", type=Path, help="a clone of openai/parameter-golf with its pull requests' heads")
    parser.add_argument("--commit", default="HEAD", help="whose train_gpt.py and records/ are read (default: HEAD)")
    parser.add_argument("--pulls", type=int, nargs="*", default=[], help="pull requests whose trainers are read too")
    parser.add_argument("--out", type=Path, help="where the collection is written; without it nothing is")
    arguments = parser.parse_args()
    collection, unread = collect(scripts_of(arguments.repository, arguments.commit, arguments.pulls))
    print(*unread, sep="\n", file=sys.stderr)
    print(f"{collection['scripts']} scripts read {len(collection['variables'])} variables")
    if arguments.out:
        commit = _git(arguments.repository, "rev-parse", arguments.commit).decode().strip()
        head = {"commit": commit, "pulls": sorted(arguments.pulls), "scripts": collection["scripts"]}
        lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in collection["variables"].items()]
        first = json.dumps(head)[:-1] + ', "variables": {\n'
        arguments.out.write_text(first + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
