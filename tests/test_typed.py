"""What a person types: prompts as they are meant, empty paths, names that are not UTF-8, TOML of other editors."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import pgolf
from pgolf.cli.app import app
from pgolf.cli.generate import _given_tokens, continue_text
from pgolf.common.errors import FormatError
from pgolf.config import Config, ModelConfig
from pgolf.data.tokenizer import SPACE, Tokenizer
from pgolf.data.train_tokenizer import train_tokenizer
from pgolf.model import GPT
from tests.runs import TINY, files, last_json, pgolf_, refused
from tests.test_sources import prose

BAD = os.fsdecode(b"caf\xe9")  # Latin-1 on a system of UTF-8

# Prompts


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = ["The cat and the dog. " * 20, prose(400), 'Some <s> and "\\n".\nThe  end\n']
    for name in ("nmt_nfkc", "identity"):
        train_tokenizer(texts, folder / f"{name}.model", 340, name)
    return {name: Tokenizer(folder / f"{name}.model") for name in ("nmt_nfkc", "identity")}


@pytest.fixture(scope="module")
def model() -> GPT:
    sizes = {"vocab_size": 340, "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1}
    return GPT(ModelConfig(**sizes, bigram_vocab_size=8, bigram_dim=4), seed=5, device="cpu")


@pytest.mark.parametrize("name", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("prompt", ["The ", "The cat and ", "The  ", "ü "])
def test_a_space_at_the_end_begins_the_next_piece(
    tokenizers: dict[str, Tokenizer], model: GPT, name: str, prompt: str
) -> None:
    tokenizer = tokenizers[name]
    body = prompt[:-1] if name == "identity" else prompt.rstrip()
    for seed in range(8):
        sampling = {"max_new_tokens": 6, "seed": seed}
        text, new = continue_text(model, tokenizer, prompt, **sampling)
        assert text.startswith(prompt)
        assert tokenizer._pieces[new[0]].startswith(SPACE)
        given = [1, *tokenizer.encode(body)]
        assert text.removeprefix(prompt) == tokenizer.decode([*given, *new])[len(body) + 1 :]
        # After its first token the text goes on as it would after these tokens.
        after = model.generate([*given, new[0]], 5, temperature=0)
        first = model.generate(given, 6, temperature=0, first=[new[0]])
        assert first.tolist() == [new[0], *after.tolist()]
    assert continue_text(model, tokenizer, prompt, max_new_tokens=0) == (prompt, [])


def test_white_space_that_the_tokenizer_keeps_is_given_to_the_model(tokenizers: dict[str, Tokenizer]) -> None:
    kept, dropped = tokenizers["identity"], tokenizers["nmt_nfkc"]
    assert _given_tokens(kept, "The\n") == (kept.encode("The\n"), False)
    assert _given_tokens(kept, "The\n ") == (kept.encode("The\n"), True)
    assert _given_tokens(dropped, "The\n") == (dropped.encode("The"), True)
    for tokenizer in (kept, dropped):
        assert _given_tokens(tokenizer, "The") == (tokenizer.encode("The"), False)
        assert _given_tokens(tokenizer, "") == ([], False)
        assert _given_tokens(tokenizer, "  ") == (tokenizer.encode("  "), False)


@pytest.mark.parametrize("name", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize(
    "prompt",
    ["", "The", " The", "a  b", "<s>", "</s><pad>", "\\n", "two\nlines", "a\0b", "Ａ½", " ", "\n", "日本", "a▁b"],
)
def test_the_text_begins_with_the_prompt_as_typed(
    tokenizers: dict[str, Tokenizer], model: GPT, name: str, prompt: str
) -> None:
    tokenizer = tokenizers[name]
    text, new = continue_text(model, tokenizer, prompt, max_new_tokens=4, seed=3)
    given = [1, *tokenizer.encode(prompt)]
    assert given[1:].count(1) == 0  # "<s>" is text
    assert new == model.generate(given, 4, stop=1, seed=3).tolist()
    assert text == prompt + tokenizer.decode([*given, *new])[len(tokenizer.decode(given)) :]


def test_a_prompt_that_is_not_utf_8_is_refused(tokenizers: dict[str, Tokenizer], model: GPT) -> None:
    with pytest.raises(ValueError, match=r"the prompt is not UTF-8: its character 4 is '\\udce9', a byte or half of a"):
        continue_text(model, tokenizers["identity"], BAD)


def test_the_first_token_can_be_restricted(model: GPT) -> None:
    free = model.generate([1, 5], 3, temperature=0)
    assert np.array_equal(free, model.generate([1, 5], 3, temperature=0, first=range(340)))
    assert model.generate([1, 5], 3, temperature=0, first=[7])[0] == 7
    assert {int(model.generate([1, 5], 1, seed=seed, first={7, 9})[0]) for seed in range(40)} == {7, 9}
    for first, message in (([], "first is empty"), ([340], "first is 340; expected token ids of at most 339")):
        with pytest.raises(ValueError, match=message):
            model.generate([1, 5], 3, first=first)


# Empty paths


def commands() -> list[tuple[str, Any]]:
    (group,) = app.registered_groups
    assert group.typer_instance is not None
    found = [(info.name or "", info.callback) for info in app.registered_commands]
    return found + [(f"data {info.name}", info.callback) for info in group.typer_instance.registered_commands]


PATHS = [
    (command, name)
    for command, callback in commands()
    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items()
    if "Path" in str(parameter.annotation.__origin__ if hasattr(parameter.annotation, "__origin__") else "")
]


def test_every_path_is_known() -> None:
    assert len(PATHS) > 30 and {"train", "eval", "submit", "data prepare"} <= {command for command, _ in PATHS}


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_an_empty_path_is_refused(command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parameter = inspect.signature(dict(commands())[command], eval_str=True).parameters[name]
    (info,) = parameter.annotation.__metadata__
    words: list[str] = [*command.split()]
    words += [""] if isinstance(info, typer.models.ArgumentInfo) else [str(info.default), ""]
    result = pgolf_(*words)
    refused(result, "is empty; a path is expected, as . for the working folder")
    assert files(tmp_path) == {}


def test_an_empty_path_is_named() -> None:
    refused(pgolf_("train", "--run-dir", ""), r"^Error: --run-dir is empty")
    refused(pgolf_("train", "--config", ""), r"^Error: --config is empty")
    refused(pgolf_("inspect", ""), r"^Error: PATH is empty")
    refused(pgolf_("data", "prepare", "", "--out", "x"), r"^Error: SOURCES is empty")


# Names that are not UTF-8

if sys.platform == "darwin":
    pytest.skip("macOS has only names that are UTF-8", allow_module_level=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(Config.from_recipe("tiny", {**TINY, "train.warmdown_frac": 0}).to_toml())
    return path


def test_a_run_in_a_folder_that_is_not_utf_8(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / BAD
    trained = pgolf_("train", "--config", config_file, "--data", small_corpus, "--run-dir", run)
    assert trained.exit_code == 0, trained.output
    assert os.fsencode(run) in trained.stdout_bytes
    for words in (
        ("eval", run),
        ("inspect", run),
        ("generate", run, "--max-new-tokens", 2),
        ("export", run, "--out", run / f"{BAD}.pgolf"),
        ("inspect", run / f"{BAD}.pgolf"),
        ("plot", run, "--out", tmp_path / f"{BAD}.png"),
    ):
        result = pgolf_(*words)
        assert result.exit_code == 0, (words, result.output, result.exception)
    last_json(pgolf_("plot", run, "--out", tmp_path / f"{BAD}.png", "--json"))
    spaced = last_json(pgolf_("generate", run, "--prompt", "The ", "--max-new-tokens", 3, "--json"))
    assert spaced["text"].startswith("The ") and len(spaced["new_tokens"]) >= 1
    refused(pgolf_("generate", run, "--prompt", BAD), "the prompt is not UTF-8: its character 4")
    refused(pgolf_("train", "--config", config_file, "--data", small_corpus, "--run-dir", run), "already holds a run")


def test_data_in_a_folder_that_is_not_utf_8(config_file: Path, tmp_path: Path) -> None:
    source = tmp_path / f"{BAD}.txt"
    source.write_text("\n\n".join(prose(60, i) for i in range(40)))
    out = tmp_path / BAD
    made = pgolf_("data", "prepare", source, "--out", out, "--vocab-size", 400)
    assert made.exit_code == 0, made.output
    assert last_json(pgolf_("data", "inspect", out, "--json", "--verify"))["path"] == str(out)
    refused(
        pgolf_("train", "--config", config_file, "--data", out, "--set", "model.vocab_size=400"),
        r"train\.data_path = '.*\\udce9': must be UTF-8, for a run's config\.toml can hold nothing else; rename it",
    )


def test_the_terminal_gets_the_names_own_bytes(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pgolf", "data", "inspect", os.fsencode(tmp_path / BAD)]
    ran = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert ran.returncode == 2 and b"no such data folder or shard" in ran.stderr and b"Traceback" not in ran.stderr
    code = "from pgolf.cli.typed import print_any_name; print_any_name(); print('caf\\udce9 – ▁')"
    for encoding, printed in (("utf-8", "caf\udce9 – ▁"), ("latin-1", "café \\u2013 \\u2581")):
        environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert ran.stdout == printed.encode(encoding, "surrogateescape") + os.linesep.encode(), ran.stderr


# TOML


def test_toml_of_other_editors(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    plain = 'extends = "tiny"\n[train]\niterations = 7\n'
    for content in (plain, "\ufeff" + plain, plain.replace("\n", "\r\n"), "\ufeff" + plain.replace("\n", "\r\n")):
        path.write_bytes(content.encode())
        assert Config.from_toml(path).train.iterations == 7
    for encoding in ("utf-16", "utf-16-be", "utf-16-le"):
        path.write_bytes(("\ufeff" * (encoding != "utf-16") + plain).encode(encoding))
        with pytest.raises(FormatError, match=r"a\.toml is not a TOML file: it is UTF-16, and TOML is UTF-8"):
            Config.from_toml(path)


@pytest.mark.parametrize("key", ["data_path", "tokenizer_path", "replay"])
def test_a_path_that_toml_cannot_hold_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.{key} = .*: must be UTF-8"):
        Config.from_recipe("tiny", {f"train.{key}": BAD})
    assert pgolf.Config.from_recipe("tiny", {f"train.{key}": "日本 𝔘"})


def test_a_tokenizer_that_no_manifest_can_name_is_refused(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(prose(60, i) for i in range(40)))
    model = tmp_path / f"{BAD}.model"
    model.write_bytes(tokenizers["identity"].path.read_bytes())
    refused(
        pgolf_("data", "prepare", source, "--out", tmp_path / "out", "--tokenizer", model),
        r"manifest\.json holds only names of printable UTF-8",
    )
    assert not (tmp_path / "out").exists()


def test_a_submission_says_only_utf_8(small_corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "train_gpt.py"
    script.write_text("pass\n")
    words = ("submit", tmp_path, "--out", tmp_path / "out", "--code", script)
    refused(pgolf_(*words, "--name", BAD), r"The submission's --name is 'caf\\udce9', which is not UTF-8")
    refused(pgolf_(*words, "--author", "me", "--blurb", BAD), r"The submission's --blurb is 'caf\\udce9'")
    readme = tmp_path / "readme.md"
    readme.write_bytes(b"caf\xe9")
    refused(pgolf_(*words, "--readme", readme), r"readme\.md: the README's beginning is not UTF-8")
    assert not (tmp_path / "out").exists()
