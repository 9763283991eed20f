"""On the shell, errors name options: for the sentences of every command, and for the rule that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from pgolf.cli.app import app
from pgolf.cli.words import in_shell_words
from tests.runs import pgolf_

OPTIONS = {
    "data": "--data",
    "seq_len": "--seq-len",
    "device": "--device",
    "resume": "--resume",
    "val_docs": "--val-docs",
    "seed": "--seed",
    "limit_seconds": "--time-limit",
}


@pytest.mark.parametrize(
    ("sentence", "shell"),
    [
        (
            "No data was given: pass data= or set train.data_path.",
            "No data was given: give --data or set train.data_path.",
        ),
        ("seq_len is None; give seq_len.", "--seq-len is None; give --seq-len."),
        ("resume it (resume=True, --resume) or not.", "resume it (--resume) or not."),
        ("val_docs is 0; or fewer: val_docs=3.", "--val-docs is 0; or fewer: --val-docs 3."),
        ("limit_seconds is -1.", "--time-limit is -1."),
        # Words of the language, keys of the configuration and what is not an option of the command stay.
        ("The device is 'x'; the data is short.", "The device is 'x'; the data is short."),
        ("train.seed is 3, batch_size is 2.", "train.seed is 3, batch_size is 2."),
        ("--seed is 3.", "--seed is 3."),
    ],
)
def test_a_sentence_in_shell_words(sentence: str, shell: str) -> None:
    assert in_shell_words(sentence, OPTIONS) == shell
    assert in_shell_words(sentence, {}) == sentence


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("".join(f'{{"text": "the cat number {n} sat on the mat"}}\n' for n in range(40)))
    return path


PROVOKED = [
    (["train", "--no-run-dir"], "give --data or set train.data_path"),
    (["train", "--resume"], "--run-dir"),
    (["data", "prepare", "{text}", "--out", "{tmp}/out", "--val-docs", "0"], "--val-docs is 0"),
    (["data", "prepare", "{text}", "--out", "{tmp}/out", "--val-docs", "40"], "--val-docs 39"),
    (["data", "prepare", "{text}", "--out", "{tmp}/out", "--vocab-size", "9"], "--vocab-size is 9"),
    (["data", "prepare", "{text}", "--out", "{tmp}/out", "--workers", "0"], "--workers is 0"),
    (["data", "download", "sp1024", "--out", "{tmp}/out", "--train-shards", "-1"], "--train-shards is -1"),
    (["eval", "{golden}", "--stride", "999"], "--stride is 999"),
    (["eval", "{golden}", "--tail", "none"], "--tail is 'none'"),
    (["eval", "{golden}", "--method", "none"], "--method is 'none'"),
    (["eval", "{golden}", "--audit", "none"], "--audit is 'none'"),
    (["eval", "{golden}/model.pgolf"], "give --data"),
    (["generate", "{golden}", "--temperature", "-1"], "--temperature is -1"),
    (["generate", "{golden}", "--top-p", "2"], "--top-p is 2"),
    (["generate", "{golden}", "--seed", "-1"], "--seed is -1"),
    (["generate", "{golden}", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
    (["generate", "{golden}/model.pgolf"], "give --tokenizer"),
    (["check", "{golden}", "--audit", "none"], "--audit is 'none'"),
    (["data", "inspect", "{text}", "--samples", "-1"], "--samples is -1"),
]


@pytest.mark.parametrize(("words", "said"), PROVOKED, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_name_their_options(
    words: list[str], said: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Path(__file__).with_name("golden")
    monkeypatch.chdir(golden)
    places = {"text": text, "tmp": tmp_path, "golden": golden / "finished"}
    result = pgolf_(*(word.format(**places) for word in words))
    assert result.exit_code == 2 and said in result.stderr, result.stderr


def test_every_option_is_known_by_its_argument() -> None:
    from pgolf.cli.evaluate import evaluate_command
    from pgolf.cli.words import options_of

    found = options_of(evaluate_command)
    assert found["any_tokenizer"] == "--any-tokenizer" and found["ttt_batch_size"] == "--ttt-batch-size"
    assert typer.main.get_command(app) is not None
