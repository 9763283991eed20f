"""The list of mutants (dev/mutants.toml), and when a result of one is still good."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "pgolf_dev_mutants", Path(__file__).parents[1] / "dev" / "mutants.py"
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # its dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_every_mutant_has_one_place_to_bend(mutants: ModuleType) -> None:
    assert len(mutants.read_mutants()) > 200


def test_a_result_is_good_while_the_mutant_its_file_and_its_test_stay(mutants: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    code, test = tmp_path / "code.h", tmp_path / "tests" / "test_code.py"
    code.write_text("x = 1;\n")
    test.write_text("assert x == 1\n")
    mutant = mutants.Mutant("x: another", "code.h", "x = 1", "x = 2", "tests/test_code.py")
    survivor = replace(mutant, name="x: the same", new="x = 1.0")
    results = mutants.Results(tmp_path / "done", tmp_path)
    assert mutant not in results
    results[mutant] = "tests/test_code.py::test_x"
    results[survivor] = None

    def known() -> list[bool]:
        again = mutants.Results(tmp_path / "done", tmp_path)
        return [each in again for each in (mutant, survivor)]

    assert known() == [True, True]
    again = mutants.Results(tmp_path / "done", tmp_path)
    assert (again[mutant], again[survivor]) == ("tests/test_code.py::test_x", None)
    assert replace(mutant, new="x = 3") not in again
    test.write_text("assert x != 2\n")
    assert known() == [False, False]  # a test that changed may catch the survivor
    test.write_text("assert x == 1\n")
    assert known() == [True, True]
    code.write_text("x = 1; y = 2;\n")
    assert known() == [False, False]
