"""The shipped recipes, fully resolved, against the tables in docs/spec.md §7."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import pgolf.config.keys
from pgolf.config import NEWTON_SCHULZ, Config, recipe_policy, recipes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPEC = (Path(__file__).parents[1] / "docs" / "spec.md").read_text(encoding="utf-8")
RECIPES = Path(pgolf.config.keys.__file__).parent / "recipes"


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with ``header``, the header's first."""
    lines = SPEC[SPEC.index(f"\n{header}") + 1 :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def value(cell: str) -> Any:
    try:
        return tomllib.loads(f"value = {cell}")["value"]
    except tomllib.TOMLDecodeError:
        return cell


def golden() -> dict[str, dict[str, Any]]:
    """{recipe: {"table.key": value}} as docs/spec.md states it."""
    (_, *names), *body = rows("| key | base |")
    tables: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, *cells in body:
        for name, cell in zip(names, cells, strict=True):
            tables[name][key.strip("`")] = value(cell)
    for name, policy in rows("| recipe | policy |")[1:]:
        tables[name]["export.policy"] = [list(pair) for pair in re.findall(r"`([^`]+)` (\w+)", policy)]
    for table in tables.values():
        table["train.muon_coefficients"] = [list(abc) for abc in NEWTON_SCHULZ[table["train.muon_coefficients"]]]
    controls = SPEC[SPEC.index("`export.control_patterns` is the same for all:") :].split("\n\n")[0]
    for table in tables.values():
        table["export.control_patterns"] = re.findall(r"`([^`]+)`", controls)[1:]
    return tables


def resolved(name: str) -> dict[str, Any]:
    config = Config.from_recipe(name).to_dict()
    return {f"{table}.{key}": value for table, values in config.items() for key, value in values.items()}


def test_the_document_lists_every_recipe() -> None:
    assert sorted(golden()) == recipes() == ["base", "pr286", "pr289", "pr465", "pr560", "pr997", "tiny"]


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_the_documented_one(name: str) -> None:
    expected, found = golden()[name], resolved(name)
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize("name", recipes())
def test_policy_is_spelled_out_and_ends_with_a_default(name: str) -> None:
    document = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    assert document["export"]["policy"] == golden()[name]["export.policy"]
    assert recipe_policy(name) == [tuple(pair) for pair in document["export"]["policy"]]
    assert recipe_policy(name)[-1][0] == "*"


def test_base_states_every_key_and_is_the_default() -> None:
    document = tomllib.loads((RECIPES / "base.toml").read_text(encoding="utf-8"))
    assert document == Config().to_dict()
    assert Config.from_recipe("base") == Config()


@pytest.mark.parametrize("name", [name for name in recipes() if name != "base"])
def test_other_recipes_state_only_what_differs_from_base(name: str) -> None:
    document = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    assert document.pop("extends") == "base"
    base = resolved("base")
    stated = {f"{table}.{key}": value for table, values in document.items() for key, value in values.items()}
    stated.pop("export.policy")
    assert [key for key, value in stated.items() if value == base[key]] == []


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "skips", "parameters"),
    [("base", 10, 1536, 5, 25_517_137), ("pr286", 10, 1536, 5, 24_730_705), ("pr289", 11, 1536, 5, 26_829_913)],
)
def test_recipes_have_the_published_parameter_counts(
    name: str, layers: int, hidden: int, skips: int, parameters: int
) -> None:
    model = Config.from_recipe(name).model
    assert (model.num_layers, model.mlp_hidden, model.num_skips) == (layers, hidden, skips)
    d, kv = model.model_dim, model.num_kv_heads * model.head_dim
    block = 2 * d * d + 2 * kv * d + 2 * model.mlp_hidden * d + 2 * d + 2 * d + model.num_heads
    bigram = model.bigram_vocab_size * model.bigram_dim + d * model.bigram_dim + 1
    assert model.vocab_size * d + bigram + d + layers * block + skips * d == parameters
