"""The rooms of the package: what each may import, what their names lead to, and the old names that still do."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgolf
from pgolf import _moved

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pgolf.__file__).parent

# From the ground up: a room imports itself and those before it.
FLOORS = (
    "common",
    "config",
    "data",
    "model",
    "ops",
    "scoring",
    "runs",
    "artifacts",
    "system",
    "report",
    "training",
    "submission",
    "cli",
)
# Imports upward, each with its reason: for the type checker alone.
UPWARD: dict[tuple[str, str], str] = {
    ("report.progress", "training.trainer"): "the type of whom it watches",
}

SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE
}


class _WithoutTypes(ast.NodeTransformer):
    """Leaves out what only the type checker imports."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports(module: str, types: bool = True) -> Iterator[str]:
    """The modules of the package that a module imports, wherever it does; types: also for the type checker alone."""
    tree: ast.AST = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree if types else _WithoutTypes().visit(tree)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pgolf."):
            found = node.module.removeprefix("pgolf.")
            for alias in node.names:
                yield f"{found}.{alias.name}" if f"{found}.{alias.name}" in SOURCES else found
        elif isinstance(node, ast.ImportFrom) and node.module == "pgolf":
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.Import):
            yield from (alias.name[6:] for alias in node.names if alias.name.startswith("pgolf."))


def test_every_module_has_a_room_and_every_room_a_floor() -> None:
    outside = {name for _, name, package in pkgutil.iter_modules(pgolf.__path__) if not package}
    assert outside <= {"__main__", "_C", "_moved", "libpgolf_cuda"}
    assert {module.partition(".")[0] for module in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_imports_upward(module: str) -> None:
    floor = FLOORS.index(module.partition(".")[0])
    upward = {name for name in imports(module) if name in SOURCES and FLOORS.index(name.partition(".")[0]) > floor}
    assert {name for name in upward if (module, name) not in UPWARD} == set()


def test_every_allowed_exception_is_one() -> None:
    assert [pair for pair in UPWARD if pair[1] not in set(imports(pair[0]))] == []


def test_modules_of_a_room_import_each_other_in_one_direction() -> None:
    """Within functions too."""
    edges = {module: set(imports(module, types=False)) - {module} for module in SOURCES}
    waiting = dict(edges)
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert sorted(waiting) == []


def test_no_module_has_a_public_function_s_name() -> None:
    names = {name for name in pgolf.__all__ if callable(getattr(pgolf, name))}
    library = [module for module in SOURCES if not module.startswith("cli.")]  # whose modules are commands
    assert [module for module in library if module.rpartition(".")[2] in names] == []


# Names ----------------------------------------------------------------------------------------------------------------


def in_a_new_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_nothing_is_imported_before_it_is_named() -> None:
    program = """
import sys, pgolf
print(*(name for name in sys.modules if name.startswith("pgolf.")))
print(pgolf.ops.attention.__name__, pgolf.data.__name__, callable(pgolf.evaluate), pgolf.submission.check.__name__)
for name in dir(pgolf):
    getattr(pgolf, name)
print("torch" in sys.modules, "matplotlib" in sys.modules, callable(pgolf.evaluate), callable(pgolf.fit))
"""
    before, used, after = in_a_new_process(program).splitlines()
    function = {"audit", "evaluation", "ttt", "windows"}
    expected = {"pgolf._moved", "pgolf.scoring", "pgolf.common", "pgolf.common.errors", "pgolf.common.types"}
    assert set(before.split()) <= expected | {f"pgolf.scoring.{name}" for name in function}
    assert used == "attention pgolf.data True check"
    assert after == "False False True True"


def test_a_star_imports_names_and_no_modules() -> None:
    names = in_a_new_process("from pgolf import *; print(*(n for n in dir() if not n.startswith('__')))").split()
    assert set(names) == set(pgolf.__all__) - {"__version__"}


def test_what_is_no_name_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opps'"):
        pgolf.opps  # noqa: B018


def test_examples_and_readme_import_public_names_alone() -> None:
    fences = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    programs = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))] + fences
    assert len(programs) >= 2
    for program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("pgolf."), ast.unparse(node)
                if node.module == "pgolf":
                    assert {alias.name for alias in node.names} <= set(pgolf.__all__), ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("pgolf.") for alias in node.names), ast.unparse(node)


# Old names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", _moved.MOVED)
def test_an_old_module_is_the_new_one_with_a_warning(old: str) -> None:
    sys.modules.pop(f"pgolf.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"pgolf\.{old} is now pgolf\.{_moved.MOVED[old]}") as told:
        found = importlib.import_module(f"pgolf.{old}")
    assert found is importlib.import_module(f"pgolf.{_moved.MOVED[old]}")
    assert found.__name__ == found.__spec__.name == f"pgolf.{_moved.MOVED[old]}"
    assert len(told) == 1
    assert f"pgolf.{old}" not in SOURCES


def test_an_old_import_is_told_where_it_stands(tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    lines = [
        "",
        "from pgolf.trainer import Trainer",
        "import pgolf",
        "assert pgolf.Trainer is Trainer",
        "pgolf.schedule",
    ]
    program.write_text("\n".join(lines))
    command = [sys.executable, "-W", "always", str(program)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "mine.py:2: DeprecationWarning: pgolf.trainer is now pgolf.training.trainer" in told
    assert "mine.py:5: DeprecationWarning: pgolf.schedule is now pgolf.training.schedule" in told


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in _moved.MOVED_NAMES.items() for n in names])
def test_an_old_name_is_the_new_one_with_a_warning(module: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"pgolf\.{module}\.{name} is now"):
        found = getattr(importlib.import_module(f"pgolf.{module}"), name)
    assert found is getattr(importlib.import_module(f"pgolf.{_moved.MOVED_NAMES[module][name]}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module(f"pgolf.{module}").nothing  # noqa: B018


def test_an_old_module_does_not_take_a_function_s_place() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("evaluate", "inspect"):
            importlib.import_module(f"pgolf.{name}")
            assert callable(getattr(pgolf, name))
        importlib.import_module("pgolf.submission.check")
        assert callable(pgolf.submission.check)
