"""The installed package: what its native module links and exports, what importing it costs, what it promises."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pgolf
from pgolf import _C

ROOT = Path(__file__).parent.parent
ON_DEMAND = {"huggingface_hub", "matplotlib", "rich", "sentencepiece", "tomli_w", "torch", "typer", "zstandard"}


def test_version_is_the_metadata_one() -> None:
    assert importlib.metadata.version("pgolf") == pgolf.__version__


def test_import_loads_only_what_it_needs() -> None:
    program = "import sys, pgolf; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "pgolf" in loaded
    assert not ON_DEMAND.intersection(loaded)


def test_recipes_and_stubs_are_installed() -> None:
    assert "tiny" in pgolf.recipes()
    package = Path(pgolf.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()


def test_only_the_package_is_installed() -> None:
    files = importlib.metadata.files("pgolf")
    assert files
    folders = {file.parts[0] for file in files if not file.parts[0].startswith(("pgolf", "_editable"))}
    assert folders <= {"..", "__pycache__"}  # the command pgolf, and what pip compiles


# Public names, and the methods of the public classes.
PUBLIC = [
    "Config",
    "Config.from_recipe",
    "Config.from_toml",
    "Config.to_toml",
    "DeviceError",
    "FormatError",
    "GPT",
    "GPT.generate",
    "GPT.load_state_dict",
    "GPT.logits",
    "GPT.loss",
    "GPT.loss_and_grads",
    "GPT.memory_table",
    "GPT.num_parameters",
    "GPT.state_dict",
    "GPT.token_losses",
    "NonFiniteError",
    "Report",
    "Score",
    "StepRecord",
    "Trainer",
    "Trainer.finish",
    "ValidationData",
    "check",
    "config_from_environment",
    "convert",
    "dequantize_rows",
    "download",
    "evaluate",
    "export",
    "fit",
    "get_num_threads",
    "inspect",
    "load",
    "load_state_dict",
    "newton_schulz",
    "prepare",
    "quantize_rows",
    "read_shard",
    "recipes",
    "save_state_dict",
    "score_as_configured",
    "set_num_threads",
    "submit",
    "write_shard",
]


def resolve(name: str) -> Any:
    value: Any = pgolf
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    assert inspect.getdoc(resolve(name))


def test_public_names_are_exactly_the_listed_ones() -> None:
    names = {name for name in PUBLIC if "." not in name}
    assert names | {"Tokenizer", "__version__"} == set(pgolf.__all__)


def takes_arguments(value: Any) -> bool:
    if isinstance(value, property) or dataclasses.is_dataclass(value):
        return False
    if inspect.isclass(value) and issubclass(value, Exception):
        return False
    return any(name not in ("self", "cls") for name in inspect.signature(value).parameters)


REFERS_TO = {"GPT.generate": "`pgolf.model.sampling.sample`", "GPT.loss": "`token_losses`"}  # says what is raised


@pytest.mark.parametrize("name", [name for name in PUBLIC if takes_arguments(resolve(name))])
def test_docstrings_say_what_is_raised(name: str) -> None:
    doc = inspect.getdoc(resolve(name)) or ""
    assert REFERS_TO[name] in doc if name in REFERS_TO else re.search(r"\braises?\b", doc, re.IGNORECASE)


@pytest.mark.parametrize(
    "name", ["GPT.logits", "GPT.token_losses", "dequantize_rows", "newton_schulz", "quantize_rows", "read_shard"]
)
def test_docstrings_of_arrays_give_shapes_and_dtypes(name: str) -> None:
    doc = inspect.getdoc(resolve(name)) or ""
    assert re.search(r"\b(u?int|float)\d+|integer|floating", doc)
    assert re.search(r"\(\w+(, \w+)*,?\)|1-D|2-D", doc)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        pgolf.no_such_name  # noqa: B018


# ---- The native module.


def test_allocations_of_native_containers_are_counted() -> None:
    model = pgolf.GPT(pgolf.Config.from_recipe("tiny").model)
    before = _C.allocation_count()
    model.memory_table()  # builds a vector of rows
    assert _C.allocation_count() > before


def test_native_errors_arrive_as_pythons() -> None:
    with pytest.raises(ValueError, match="number of threads is 0"):
        _C.set_num_threads(0)
    with pytest.raises(KeyError, match="vocab_size"):
        _C.Model({}, 0, -1, "float32")


if sys.platform == "linux":

    def output_of(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def test_module_exports_its_entry_point_alone() -> None:
        names = [line.split()[-1] for line in output_of("nm", "-D", "--defined-only", _C.__file__).splitlines()]
        assert names == ["PyInit__C"]  # least of all operator new, which is the process's

    def test_the_module_needs_the_systems_libraries_alone() -> None:
        dynamic = output_of("readelf", "--dynamic", "--wide", _C.__file__)
        assert not re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        assert needed and not any("/" in name or "blas" in name for name in needed)


# ---- The build's check of the kernels.


@pytest.fixture(scope="module")
def check() -> ModuleType:
    path = ROOT / "cmake" / "check_kernel_symbols.py"
    spec = importlib.util.spec_from_file_location("check_kernel_symbols", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernel_symbols_in_their_namespace_pass(check: ModuleType) -> None:
    lines = [
        "kernels.cpp.o:",
        "                 U _ZSt9terminatev",
        "0000000000000000 W _ZN5pgolf6avx51210CpuBackendIfE4zeroERKNS_10TensorViewE",
        "0000000000000000 W _ZZN5pgolf12parallel_forIZNS_6avx51214for_row_chunksEvE_clEv",
        "0000000000000000 V _ZTIN5pgolf7BackendE",
        "0000000000000000 t _ZN5pgolf6avx512L5localEv",
        "",
    ]
    assert check.shared_code(lines, "avx512") == []


@pytest.mark.parametrize(
    "line",
    [
        "0000000000000000 W _ZNSt6vectorIfSaIfEED1Ev",
        "0000000000000000 W _ZN5pgolf4avx25helpEv",
        "0000000000000010 t _GLOBAL__sub_I_embedding.cpp",
    ],
)
def test_kernel_symbols_for_every_machine_fail(check: ModuleType, line: str) -> None:
    assert check.shared_code([line], "avx512") == [line.split()[-1]]


# ---- What `make` says on a machine that lacks something.


def command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def find_python(tmp_path: Path, *arguments: str, python: str | None = None, compiler: bool = True) -> Any:
    """Runs dev/find_python.sh where PATH holds only a python3 script, if any, and a C++ compiler, if any."""
    for name, text in (("python3", python), ("c++", ":" if compiler else None)):
        if text is not None:
            command(tmp_path / "bin" / name, text)
    return subprocess.run(
        ["/bin/sh", str(ROOT / "dev" / "find_python.sh"), *arguments],
        env={"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "pyenv")},
        capture_output=True,
        text=True,
    )


THIS_PYTHON = f'exec "{sys.executable}" "$@"'


def test_make_finds_python(tmp_path: Path) -> None:
    result = find_python(tmp_path, python=THIS_PYTHON)
    assert (result.returncode, result.stdout, result.stderr) == (0, "python3\n", "")


@pytest.mark.parametrize(
    ("python", "compiler", "missing", "package"),
    [
        (None, True, "Python 3.10 or newer is missing", "apt install python3 "),
        ("exit 1", True, "Python 3.10 or newer is missing", "apt install python3 "),
        (f'case "$*" in *ensurepip*) exit 1;; esac\n{THIS_PYTHON}', True, "no venv module", "-venv"),
        (f'case "$*" in *Python.h*) exit 1;; esac\n{THIS_PYTHON}', True, "no header files", "-dev"),
        (THIS_PYTHON, False, "a C++ compiler is missing", "apt install g++"),
    ],
)
def test_make_names_what_is_missing(
    tmp_path: Path, python: str | None, compiler: bool, missing: str, package: str
) -> None:
    result = find_python(tmp_path, python=python, compiler=compiler)
    assert result.returncode == 1
    assert result.stdout == ""
    assert missing in result.stderr
    assert package in result.stderr


def test_a_version_is_found_where_pyenv_keeps_it(tmp_path: Path) -> None:
    kept = tmp_path / "pyenv" / "versions" / "3.98.1" / "bin" / "python3.98"
    command(kept, THIS_PYTHON)
    for shim in (False, True):  # pyenv's shim of a version that is not chosen is there, and fails
        if shim:
            command(tmp_path / "bin" / "python3.98", "exit 127")
        result = find_python(tmp_path, "python3.98", python=THIS_PYTHON)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{kept}\n", "")


def test_make_refuses_a_python_that_is_no_command(tmp_path: Path) -> None:
    result = find_python(tmp_path, "python3.99", python=THIS_PYTHON)
    assert result.returncode == 1
    assert 'PYTHON is "python3.99"' in result.stderr
