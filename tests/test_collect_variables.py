"""dev/collect_variables.py finds every way in which scripts read their environment, and says what it could not read."""

from __future__ import annotations

import base64
import importlib.util
import json
import lzma
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

DEV = Path(__file__).parents[1] / "dev"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEV / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


collector = tool("collect_variables")


def found(source: str) -> dict[str, set[str | None]]:
    read = collector.variables_of(source)
    assert read.unread == []
    return dict(read.variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nx = os.environ['A']", {"A": {None}}),
        ("import os\nx = os.environ.get('A', 5)", {"A": {"5"}}),
        ("import os\nx = int(os.environ.get('A', str(0.5)))", {"A": {"0.5"}}),
        ("import os\nx = os.getenv('A', True)", {"A": {"1"}}),
        ("import os as o\nx = o.environ.pop('A', n // 2)", {"A": {"n // 2"}}),
        ("from os import environ as e\nx = e.setdefault('A', '')\ny = 'B' in e", {"A": {""}, "B": {None}}),
        ("from os import getenv\nx = getenv('A')\ny = getenv('A', '1')", {"A": {None, "1"}}),
        ("import os\ng = os.environ.get\nx = g('A', 1)", {"A": {"1"}}),
        ("import os\nfor k in ('A', 'B'): print(os.environ[k])", {"A": {None}, "B": {None}}),
        ("import os\nfor k, v in {'A': '1'}.items(): os.environ.get(k, v)", {"A": {"v"}}),
        ("import os\ndef e(k, d, t=str): return t(os.environ.get(k, d))\nx = e('A', 3, int)", {"A": {"3"}}),
        ("import os\ndef e(k, d=7): return os.environ.get(k, str(d))\nx = e('A')", {"A": {"7"}}),
        ("import os\nf = lambda k: os.environ.get(k, '0') == '1'\nx = f('A')", {"A": {"0"}}),
        ("import os\ndef e(k): return os.environ[k]\ndef f(n): return e(n)\nx = f('A')", {"A": {None}}),
        ("import os\nfor i in ('X', 'Y'): os.environ.get(f'{i}_LR')", {"X_LR": {None}, "Y_LR": {None}}),
        ("import os\nos.environ['A'] = '1'", {}),
        ("settings = {}\nx = settings.get('A', 1)", {}),
    ],
)
def test_every_way_of_reading_is_found(source: str, expected: dict[str, set[str | None]]) -> None:
    assert found(source) == expected


INNER = "import os\nx = os.environ.get('INSIDE', 1)\n" + "# a comment that makes the script long enough\n" * 400


LZMA = base64.b85encode(lzma.compress(INNER.encode()))
ZLIB = base64.b64encode(zlib.compress(INNER.encode(), 0))


@pytest.mark.parametrize(
    "packed",
    [
        f"import lzma, base64\nexec(lzma.decompress(base64.b85decode({LZMA!r})))",
        f"import zlib, base64 as b\nexec(zlib.decompress(b.b64decode({ZLIB!r})))",
    ],
)
def test_a_script_that_unpacks_itself_is_read_and_not_run(
    packed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collector, "PACKED_LEAST", 100)
    assert found(packed) == {"INSIDE": {"1"}}
    assert found("print('run')") == {} and capsys.readouterr().out == ""


def test_what_cannot_be_read_is_said() -> None:
    read = collector.variables_of("import os\nx = os.environ.get(name())")
    assert (dict(read.variables), read.unread) == ({}, ["line 2: the variable name()"])
    read = collector.variables_of("import os\nx = f(\nos.environ.get('A',3)\nos.environ['B'] os.getenv('C','4')")
    assert dict(read.variables) == {"A": {"3"}, "B": {None}, "C": {"4"}}
    assert len(read.unread) == 1 and read.unread[0].endswith("read by its text, not by its syntax")


def test_scripts_of_one_content_count_once_and_only_capitals_are_variables() -> None:
    one, two = b"import os\nos.environ.get('A', 1)", b"import os\nos.environ.get('A', 2)\nos.environ.get('no')"
    collection, unread = collector.collect([("a", one), ("b", one), ("c", two)])
    assert (collection, unread) == ({"scripts": 2, "variables": {"A": [2, "1", "2"]}}, [])


def test_a_repository_is_read_at_a_commit_and_with_its_pull_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, "-C", tmp_path, *arguments], check=True, capture_output=True)

    def commit(path: str, name: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"import os\nos.environ.get('{name}', '0')\n", encoding="utf-8")
        git("add", "-A")
        git("commit", "-m", name)

    git("init", "-b", "main")
    commit("train_gpt.py", "ROOT")
    commit("records/a/train_gpt.py", "RECORD")
    commit("records/a/prepare_caseops_data.py", "DATA")
    commit("tools/train_gpt.py", "TOOL")
    git("checkout", "-b", "other")
    commit("records/b/train_gpt.py", "PULL")
    git("update-ref", "refs/pull/7/head", "other")
    git("checkout", "main")
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["collect_variables.py", str(tmp_path), "--pulls", "7", "--out", str(out)])
    assert collector.main() == 0
    assert capsys.readouterr().out == "3 scripts read 3 variables\n"
    collection = json.loads(out.read_text(encoding="utf-8"))
    assert collection["variables"] == {"PULL": [1, "0"], "RECORD": [1, "0"], "ROOT": [1, "0"]}
    assert (collection["pulls"], collection["scripts"], len(collection["commit"])) == ([7], 3, 40)


def test_the_collection_is_small_and_sorted() -> None:
    text = (Path(__file__).parent / "data" / "public_variables.json").read_text(encoding="utf-8")
    collection = json.loads(text)
    names = list(collection["variables"])
    assert len(text) <= 60_000 and names == sorted(names) and len(names) > 400
    assert {180, 286, 289, 465, 560, 997, 2014} <= set(collection["pulls"])


def test_the_page_of_variables_is_the_codes() -> None:
    page = tool("variables_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python dev/variables_page.py"
