"""`import pgolf` is enough for every module of the package: it is imported when it is first named."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import pgolf

NO_ATTRIBUTES = {
    "__main__": "it runs the command",
    "_C": "native, and private",
    "cli": "the command line is no library",
    "demo_plot": "what demo draws with",
    "evaluate": "the function has its name",
    "libpgolf_cuda": "native, and private: the CUDA backend, where it is built",
    "op_calls": "what ops is made of",
    "public_variables": "what environment is made of",
}
MODULES = sorted({module.name for module in pkgutil.iter_modules(pgolf.__path__)} - set(NO_ATTRIBUTES))


def in_a_new_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_the_packages_attribute(name: str) -> None:
    assert getattr(pgolf, name).__name__ == f"pgolf.{name}"
    assert name in dir(pgolf)


def test_no_module_is_imported_before_it_is_named() -> None:
    program = f"""
import sys, pgolf
before = [name for name in {MODULES!r} if f"pgolf.{{name}}" in sys.modules]
print(*before)
print(pgolf.submission.check.__module__, pgolf.ops.attention.__name__, pgolf.data.__name__, callable(pgolf.evaluate))
for name in {MODULES!r}:
    getattr(pgolf, name)
print("torch" in sys.modules, "matplotlib" in sys.modules, callable(pgolf.evaluate), callable(pgolf.fit))
"""
    before, used, after = in_a_new_process(program).splitlines()
    assert set(before.split()) <= {"audit", "errors", "ttt", "windows"}  # those of the function evaluate
    assert used == "pgolf.submission.check attention pgolf.data True"
    assert after == "False False True True"


def test_a_star_imports_names_and_no_modules() -> None:
    names = in_a_new_process("from pgolf import *; print(*(n for n in dir() if not n.startswith('__')))").split()
    assert set(names) == set(pgolf.__all__) - {"__version__"}
    assert not set(names) & set(MODULES)


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opps'"):
        pgolf.opps  # noqa: B018
