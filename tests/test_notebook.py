"""examples/notebook.ipynb: its cells are executed in order, and its stored form is what viewers expect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def pyplot() -> Iterator[Any]:
    """matplotlib.pyplot without a window; the cells' settings and figures go when the test ends."""
    plt.switch_backend("agg")
    with matplotlib.rc_context():
        yield plt
    plt.close("all")


def sources(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_every_cell_runs_and_the_results_are_there(
    notebook: dict[str, Any],
    pyplot: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PGOLF_NOTEBOOK_STEPS", "2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources(notebook, "code"), start=1):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    output = capsys.readouterr().out

    assert [record.step for record in names["trained"]] == [1, 2]
    assert len(pyplot.get_fignums()) == 5
    drawn = tmp_path / "drawn.png"
    for number in pyplot.get_fignums():
        pyplot.figure(number).savefig(drawn)

    sizes = {name: exported.bytes for name, (exported, _) in names["results"].items()}
    assert sizes["fp32"] > sizes["fp16"] > sizes["int6"] > sizes["int5"]
    assert re.search(r"^as trained +\d\.\d{4} bits per byte$", output, re.M)
    assert all(f"\n{prompt}" in output for prompt in ("Return the", "If the file", "This module"))

    assert not names["work"].exists()
    assert list(tmp_path.iterdir()) == [drawn]


def test_the_notebook_says_how_to_shorten_it(notebook: dict[str, Any]) -> None:
    assert "`PGOLF_NOTEBOOK_STEPS=10`" in sources(notebook, "markdown")[0]
    assert '"PGOLF_NOTEBOOK_STEPS"' in sources(notebook, "code")[0]


def test_it_is_a_notebook_of_format_4_5_with_its_results_and_without_errors(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    identities = [cell["id"] for cell in cells]
    assert len(set(identities)) == len(cells) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in identities)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert NOTEBOOK.stat().st_size < 500_000
