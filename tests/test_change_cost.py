"""dev/change_cost.py: which files of a commit count as what."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def change_cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("change_cost", ROOT / "dev" / "change_cost.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "room"),
    [
        ("csrc/cpu/mlp.cpp", "computes"),
        ("python/pgolf/training/schedule.py", "computes"),
        ("csrc/model/config.cpp", "computes"),
        ("csrc/model/config.h", "the key's plumbing"),
        ("python/pgolf/config/recipes/base.toml", "the key's plumbing"),
        ("csrc/bindings/model.cpp", "the key's plumbing"),
        ("csrc/bindings/ops.cpp", "bindings and ops"),
        ("tests/reference/model.py", "tests"),
        ("tests/reference/shapes.py", "the key's plumbing"),
        ("dev/mutants.toml", "tests"),
        ("README.md", "documents"),
        ("benchmarks/results/a.json", "documents"),
        ("docs/variables.md", None),
    ],
)
def test_every_file_has_one_room(change_cost: ModuleType, file: str, room: str | None) -> None:
    assert change_cost.room_of(file) == room


def test_a_row_counts_a_commit_s_files(change_cost: ModuleType, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for name in ("csrc/cpu/mlp.cpp", "csrc/pieces.h", "tests/test_ops.py", "docs/variables.md", "docs/a b.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    git("add", "-A")
    git("commit", "-q", "-m", "An idea: of one row")
    header, _, row = change_cost.table(["HEAD"], tmp_path).splitlines()
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells.pop("commit") and cells == {
        "computes": "2",
        "bindings and ops": "0",
        "the key's plumbing": "0",
        "tests": "1",
        "documents": "1",
        "what": "An idea: of one row",
    }
    with pytest.raises(ValueError, match="git knows no commit 'nothing'"):
        change_cost.table(["nothing"], tmp_path)
