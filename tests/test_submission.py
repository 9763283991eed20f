"""Submissions: every rule finds its planted violation; nothing is written unless all rules were checked and hold."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgolf
from pgolf.common.errors import FormatError
from pgolf.config import Config
from pgolf.data.folder import find_data
from pgolf.data.shards import ShardSet
from pgolf.data.tokenizer import Tokenizer
from pgolf.submission import About, CheckReport, Refused, Settings, check, submit
from pgolf.submission import rules as rules_module
from pgolf.submission import writing as write_module
from pgolf.submission.evidence import Timeline
from pgolf.submission.rules import FOLDER_RULES, RUN_RULES
from pgolf.training.trainer import Trainer
from tests.runs import SMALL_MODEL, files, last_json, pgolf_, refused

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = (1, 2, 3)
ABOUT = About("Tiny", "someone", "someone-7", "A small one.", "What is new here.", "2026-03-20")
SMALL = {
    **SMALL_MODEL,
    "train.iterations": 24,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 256,
    "train.train_seq_len": 64,
    "train.grad_accum_steps": 2,
    "train.val_loss_every": 0,
    "eval.eval_stride": 16,
    "eval.tail": "exact",
}


def train(folder: Path, data: Path, seed: int, **changes: Any) -> Path:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    config = Config.from_recipe("tiny", {**SMALL, "train.seed": seed, "train.data_path": str(data), **keys})
    trainer = Trainer(config, run_dir=folder)
    for _ in trainer:
        pass
    trainer.finish()
    shutil.rmtree(folder / "checkpoint")
    return folder


@pytest.fixture(scope="session")
def trained(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three real run folders, to be copied and not to be touched."""
    folder = tmp_path_factory.mktemp("submission_runs")
    return [train(folder / f"run{seed}", small_corpus, seed) for seed in SEEDS]


@pytest.fixture
def runs(trained: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of them to doctor."""
    return [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in trained]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "train_gpt.py"
    path.write_text("print('training')\n")
    return path


@pytest.fixture
def data(small_corpus: Path, tmp_path: Path) -> Path:
    """A copy of the data to doctor."""
    return Path(shutil.copytree(small_corpus, tmp_path / "data"))


@pytest.fixture(scope="session")
def written(trained: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submission of the three runs, to be copied."""
    folder = tmp_path_factory.mktemp("submission")
    (folder / "train_gpt.py").write_text("print('training')\n")
    submit(trained, folder / "out", ABOUT, settings=Settings(code=folder / "train_gpt.py"))
    return folder / "out"


@pytest.fixture
def submission(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "submission"))


def outcomes(report: CheckReport, where: str | None = None) -> dict[str, str]:
    """The outcome of every rule; of several runs' the worst."""
    order = ["passed", "unchecked", "failed"]
    found: dict[str, str] = {}
    for finding in report.findings:
        if where in (None, finding.where):
            found[finding.rule] = max(found.get(finding.rule, "passed"), finding.outcome, key=order.index)
    return found


def sentence(report: CheckReport, rule: str) -> str:
    """What the rule says of the first run of which it says anything but passed."""
    return next(f.sentence for f in report.findings if f.rule == rule and f.outcome != "passed")


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def report_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "report.json").read_text())
    return values


def edit_log(run: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the records of a run's log."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    change(records)
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def take(run: Path, seconds: float) -> None:
    """Make every step have taken so long, in all that tells of it."""

    def stretch(records: list[dict[str, Any]]) -> None:
        for record in records:
            record["seconds"] = record["step"] * seconds
            if record["step"]:
                record["tokens_per_second"] = 256 / seconds

    edit_log(run, stretch)
    edit(run / "report.json", seconds=24 * seconds)


def sign(run: Path, data: Path) -> None:
    """Make the run say that it used the shards that lie in a folder now."""
    folder = find_data(data, splits=())
    edit(
        run / "report.json",
        data={split: ShardSet(getattr(folder, split)).fingerprint() for split in ("train", "val")},
    )


# What holds


def test_real_runs_pass_every_rule(trained: list[Path], code: Path) -> None:
    for run in trained:
        report = check(run, Settings(code=code))
        assert report.ok, report.failed + report.unchecked
        assert [finding.rule for finding in report.findings] == [*(rule.name for rule in RUN_RULES), "seeds"]
        assert {finding.where for finding in report.findings} == {str(run), ""}


def test_a_run_by_windows_side_by_side_passes(small_corpus: Path, code: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", small_corpus, 4, eval__method="standard")
    report = check(run, Settings(code=code))
    assert report.ok, report.failed + report.unchecked
    assert "all but the last 15, which the method drops" in " ".join(f.sentence for f in report.findings)


def test_rules_have_names_of_their_own_and_reasons() -> None:
    every = [*RUN_RULES, *FOLDER_RULES]
    assert len({rule.name for rule in every}) == len(every)
    assert all(rule.reason.endswith(".") for rule in every)
    documented = (Path(__file__).parent.parent / "docs" / "submission.md").read_text()
    assert all(f"`{rule.name}`" in documented for rule in every)


# Planted violations

Plant = Callable[[Path, Path, Path], dict[str, Any] | None]
"""Changes a run, its data, or the script; may return settings."""


class StandIn:
    """A pgolf model whose answers are changed on their way."""

    def __init__(self, path: Path) -> None:
        self.model = pgolf.load(path)
        self.config, self.train_seq_len = self.model.config, self.model.train_seq_len

    def logits(self, ids: Any) -> Any:
        return self.model.logits(ids)

    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return self.model.window_losses(ids, targets, first)


class LooksAhead(StandIn):
    """Its logits know the next token a little."""

    def logits(self, ids: Any) -> Any:
        logits = self.model.logits(ids)
        logits[:, :-1] += 0.01 * np.eye(logits.shape[2], dtype=np.float32)[np.asarray(ids)[:, 1:]]
        return logits


class LossesLookAhead(StandIn):
    """Its losses know the window's last target."""

    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return self.model.window_losses(ids, targets, first) + 1e-6 * np.asarray(targets)[:, -1:]


class TooSure(StandIn):
    """Its probabilities sum to more than one."""

    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return 0.999 * self.model.window_losses(ids, targets, first)


class NotANumber(StandIn):
    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return np.nan * self.model.window_losses(ids, targets, first)


class TrainsFirst(StandIn):
    """It adapts to a window's targets and then scores them: what stands there more often is cheaper, and normalised."""

    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        counts = np.stack([np.bincount(row, minlength=self.config.vocab_size) for row in np.asarray(targets)])
        logits = self.model.logits(ids) + 0.5 * counts[:, None, :]
        every = np.log(np.exp(logits).sum(axis=2))
        chosen = np.take_along_axis(logits, np.asarray(targets)[:, :, None], axis=2)[:, :, 0]
        return (every - chosen)[:, first:].astype(np.float32)


def load_as(kind: type[StandIn]) -> dict[str, Any]:
    return {"load": lambda path, device: kind(path)}


def too_much_code(run: Path, data: Path, code: Path) -> None:
    code.write_bytes(b"#" * 15_990_000)


def said_to_be_too_large(run: Path, data: Path, code: Path) -> None:
    edit(run / "report.json", total_bytes=16_000_001)


def an_artifact_too_large(run: Path, data: Path, code: Path) -> dict[str, Any]:
    return {"limit_bytes": (run / "model.pgolf").stat().st_size - 1}


def a_step_after_the_limit(run: Path, data: Path, code: Path) -> None:
    take(run, 600 / 23)  # the 24th starts at 600 s exactly


def three_steps_after_the_limit_on_a_gpu(run: Path, data: Path, code: Path) -> None:
    take(run, 600 / 21)
    edit(run / "report.json", device="cuda NVIDIA H100 80GB HBM3, bfloat16, path 1")


def slow_scoring(run: Path, data: Path, code: Path) -> None:
    edit(run / "report.json", score_seconds=601.0)


def a_step_missing(run: Path, data: Path, code: Path) -> None:
    edit_log(run, lambda records: records.pop(10))


def a_log_cut_off(run: Path, data: Path, code: Path) -> None:
    edit_log(run, lambda records: records.pop())


def a_faster_clock(run: Path, data: Path, code: Path) -> None:
    edit_log(run, lambda records: [record.update(seconds=record["seconds"] / 2) for record in records])


def a_time_that_is_none(run: Path, data: Path, code: Path) -> None:
    edit_log(run, lambda records: records[-1].update(seconds="soon"))


def another_batch(run: Path, data: Path, code: Path) -> None:
    edit_log(run, lambda records: records[-1].update(tokens=records[-1]["tokens"] + 1))


def another_seed(run: Path, data: Path, code: Path) -> None:
    edit(run / "report.json", seed=77)


def another_runs_artifact(run: Path, data: Path, code: Path) -> None:
    shutil.copy(run.parent / "run2" / "model.pgolf", run)


def training_on_validation(run: Path, data: Path, code: Path) -> dict[str, Any]:
    (val,) = find_data(data).val
    shutil.copy(val, data / "zz_train_000001.bin")
    sign(run, data)
    return {"data": data}


def scores_left_out(run: Path, data: Path, code: Path) -> None:
    edit(run / "report.json", score_tokens=1990)


def a_context_that_drops_a_third(run: Path, data: Path, code: Path) -> None:
    config = Config.from_toml(run / "config.toml").override({"eval.method": "standard", "eval.eval_seq_len": 1300})
    (run / "config.toml").write_text(config.to_toml())
    edit(run / "report.json", score_tokens=1300)


def a_bytes_table_too_large(run: Path, data: Path, code: Path) -> None:
    edit(run / "report.json", score_bpb=report_of(run)["score_bpb"] * 0.96)


def bytes_added(run: Path, data: Path, code: Path) -> None:
    edit(run / "report.json", score_bytes=report_of(run)["score_bytes"] + 1)


def a_document_trained_on(run: Path, data: Path, code: Path) -> dict[str, Any]:
    (val,), (shard,) = find_data(data).val, find_data(data).train
    tokens = pgolf.read_shard(val)
    ends = np.append(np.flatnonzero(tokens == 1), tokens.size)
    taught = np.concatenate([pgolf.read_shard(shard), tokens[ends[1] : ends[2]]])
    pgolf.write_shard(shard, taught)
    sign(run, data)
    return {"data": data}


def a_better_score(run: Path, data: Path, code: Path) -> None:
    report = report_of(run)  # bytes per token stay what they are
    edit(run / "report.json", score_loss=report["score_loss"] * 0.999, score_bpb=report["score_bpb"] * 0.999)


def a_damaged_artifact(run: Path, data: Path, code: Path) -> None:
    content = bytearray((run / "model.pgolf").read_bytes())
    content[2000] ^= 1
    (run / "model.pgolf").write_bytes(content)


VIOLATIONS: list[tuple[str, Plant, str]] = [
    ("bytes", too_much_code, r"code \(15,990,000\) have 16,0\d\d,\d{3} bytes, .* more than the limit of 16,000,000"),
    ("bytes", said_to_be_too_large, "are said to have 16,000,001 bytes"),
    ("bytes", an_artifact_too_large, "The artifact alone has"),
    ("time", a_step_after_the_limit, "1 of them started after the limit of 600 s, and none may"),
    ("time", three_steps_after_the_limit_on_a_gpu, "3 of them started after .* only 2 can be in flight"),
    ("scoring-time", slow_scoring, "Scoring took 601.0 s; the limit is 600 s"),
    ("log", a_step_missing, "does not have every step from 1 to 24"),
    ("log", a_log_cut_off, "disagree about the steps"),
    ("log", a_faster_clock, "by its seconds, and .* by its tokens_per_second"),
    ("log", a_time_that_is_none, "seconds of step 24 is 'soon'; expected a number"),
    ("log", another_batch, "Step 24 has 6145 tokens; expected 6,144"),
    ("log", another_seed, r"disagree about the seed: \(77, 1, 1\)"),
    ("log", another_runs_artifact, r"disagree about the seed: \(1, 1, 2\)"),
    ("order", training_on_validation, "The training shard zz_train_000001.bin has the content of the validation shard"),
    ("order", lambda *_: load_as(TrainsFirst), "By the method sliding, the score of target .* knows of the targets"),
    ("coverage", scores_left_out, "1,990 scores were given; the method and the data define 1,999"),
    ("coverage", a_context_that_drops_a_third, "699 of 1,999 validation targets are never scored"),
    (
        "text-bytes",
        a_bytes_table_too_large,
        r"bits per byte mean 1\.95\d+ bytes per token; the text that the tokens decode to has 1\.87",
    ),
    ("text-bytes", bytes_added, "the text that the tokens decode to has"),
    ("documents", a_document_trained_on, "1 of 3 validation documents also stand in the training shards"),
    ("causality", lambda *_: load_as(LooksAhead), "The logits at position .* changed when only tokens from"),
    ("causality", lambda *_: load_as(LossesLookAhead), "The loss at position .* changed when only tokens from"),
    ("normalisation", lambda *_: load_as(TooSure), r"sum to 1\.00\d+"),
    ("normalisation", lambda *_: load_as(NotANumber), "sum to nan"),
    ("reload", a_better_score, r"The artifact scores \d\.\d+ loss; \d\.\d+ is claimed"),
    ("reload", another_runs_artifact, r"is claimed"),
    ("reload", a_damaged_artifact, "CRC"),
]


@pytest.mark.parametrize(
    ("rule", "plant", "message"), VIOLATIONS, ids=[f"{rule}-{index}" for index, (rule, *_) in enumerate(VIOLATIONS)]
)
def test_planted_violations_are_found_and_refused(
    rule: str,
    plant: Plant,
    message: str,
    runs: list[Path],
    data: Path,
    code: Path,
    tmp_path: Path,
) -> None:
    settings = Settings(code=code, **(plant(runs[0], data, code) or {}))
    report = check(runs[0], settings)
    assert outcomes(report)[rule] == "failed", report.findings
    assert re.search(message, sentence(report, rule)), sentence(report, rule)
    before = files(tmp_path)
    with pytest.raises(Refused, match="refused: .*" + re.escape(rule)) as error:
        submit([runs[0]], tmp_path / "out", ABOUT, settings=settings)
    assert outcomes(error.value.report)[rule] == "failed"
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_every_run_rule_has_a_planted_violation() -> None:
    assert {rule for rule, *_ in VIOLATIONS} == {rule.name for rule in RUN_RULES}


def test_a_wrong_byte_table_is_found_in_the_text(runs: list[Path], code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tokenizer.target_bytes
    monkeypatch.setattr(Tokenizer, "target_bytes", lambda self, before, targets: right(self, before, targets) + 1)
    report = check(runs[0], Settings(code=code))
    assert outcomes(report)["text-bytes"] == "failed"
    assert "The score audit found a wrong byte count" in sentence(report, "text-bytes")


def test_two_steps_in_flight_are_a_gpus_right(runs: list[Path], code: Path) -> None:
    take(runs[0], 600 / 22)
    edit(runs[0] / "report.json", device="cuda NVIDIA H100 80GB HBM3, bfloat16, path 1")
    assert outcomes(check(runs[0], Settings(code=code)))["time"] == "passed"
    edit(runs[0] / "report.json", device="cpu avx2, float32, 1 thread")
    assert outcomes(check(runs[0], Settings(code=code)))["time"] == "failed"
    for limit in (0.0, 700.0):
        assert outcomes(check(runs[0], Settings(code=code, limit_seconds=limit)))["time"] == "passed"


def test_a_validation_set_that_was_cut_is_not_the_manifests(
    runs: list[Path], corpus: Path, code: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(corpus, tmp_path / "whole"))
    (val,) = find_data(whole).val
    pgolf.write_shard(val, pgolf.read_shard(val)[:2000])
    sign(runs[0], whole)
    report = check(runs[0], Settings(code=code, data=whole))
    assert re.search(r"the shard has 2,000 tokens; .*manifest\.json says", sentence(report, "coverage"))


def by_training(first: bool) -> Any:
    """A stand-in for test-time training: chunks are scored by counts of what was trained on."""

    def losses(model: Any, tokens: Any, config: Config, length: int) -> Any:
        counts, out = np.ones(config.model.vocab_size), []
        for start in range(1, tokens.size, length):
            chunk = tokens[start : start + length]
            learnt = counts + np.bincount(chunk, minlength=counts.size)
            out.append(-np.log((learnt if first else counts)[chunk] / (learnt if first else counts).sum()))
            counts = learnt
        return np.concatenate(out)

    return losses


@pytest.mark.parametrize(("first", "outcome"), [(False, "passed"), (True, "failed")])
def test_training_while_scoring_is_looked_at_token_by_token(
    first: bool, outcome: str, runs: list[Path], code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_toml(runs[0] / "config.toml").override({"eval.method": "ttt"})
    (runs[0] / "config.toml").write_text(config.to_toml())
    monkeypatch.setitem(rules_module.SCORERS, "ttt", by_training(first))
    report = check(runs[0], Settings(code=code, rescore=False))
    assert outcomes(report)["order"] == outcome
    assert outcomes(report)["coverage"] == "passed"
    monkeypatch.delitem(rules_module.SCORERS, "ttt")
    assert outcomes(check(runs[0], Settings(code=code, rescore=False)))["order"] == "unchecked"


def test_pgolfs_own_test_time_training_scores_before_it_trains(
    runs: list[Path], code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_toml(runs[0] / "config.toml").override({"eval.method": "ttt"})
    (runs[0] / "config.toml").write_text(config.to_toml())
    report = check(runs[0], Settings(code=code, rescore=False))
    assert outcomes(report)["order"] == "passed", report.findings
    own = rules_module.SCORERS["ttt"]

    def late(model: Any, tokens: Any, config: Config, length: int) -> Any:  # a chunk's losses after it is known
        return own(model, tokens, config, length) + 1e-3 * np.arange(tokens.size - 1) * (tokens[-1] % 7)

    monkeypatch.setitem(rules_module.SCORERS, "ttt", late)
    assert outcomes(check(runs[0], Settings(code=code, rescore=False)))["order"] == "failed"


# What cannot be checked


def no_data(run: Path, data: Path, code: Path) -> dict[str, Any]:
    return {"data": data / "nowhere"}


def other_data(run: Path, data: Path, code: Path) -> dict[str, Any]:
    (val,) = find_data(data).val
    pgolf.write_shard(val, pgolf.read_shard(val)[::-1])
    return {"data": data}


def no_training_shards(run: Path, data: Path, code: Path) -> dict[str, Any]:
    (shard,) = find_data(data).train
    shard.unlink()
    return {"data": data}


def no_tokenizer(run: Path, data: Path, code: Path) -> dict[str, Any]:
    next(data.glob("*.model")).unlink()
    return {"data": data}


def an_old_report(run: Path, data: Path, code: Path) -> None:
    values = report_of(run)
    for name in ("data", "score_tokens", "score_bytes"):
        del values[name]
    (run / "report.json").write_text(json.dumps(values))


def no_script(run: Path, data: Path, code: Path) -> None:
    code.unlink()


def without(name: str) -> Callable[[Path, Path, Path], None]:
    return lambda run, data, code: (run / name).unlink()


UNCHECKED: list[tuple[Plant, set[str], str]] = [
    (no_data, {"order", "coverage", "text-bytes", "documents", "reload"}, "no such data folder"),
    (other_data, {"order", "coverage", "text-bytes", "documents", "reload"}, "are not those of the run"),
    (no_training_shards, {"order", "documents"}, "holds no training shards"),
    (no_tokenizer, {"text-bytes", "reload"}, "no tokenizer|cannot be compared"),
    (an_old_report, {"order"}, "an older pgolf wrote it"),
    (no_script, {"bytes"}, "no such script"),
    (lambda *_: {"rescore": False}, {"reload"}, "as was asked for"),
    (lambda *_: {"device": "cuda:99"}, {"order", "causality", "normalisation", "reload"}, "GPU|driver|CUDA"),
    (without("log.jsonl"), {"time", "log"}, r"holds no log\.jsonl; a finished run's folder does"),
    (
        without("model.pgolf"),
        {"bytes", "log", "order", "causality", "normalisation", "reload", "seeds"},
        "holds no model.pgolf",
    ),
]


@pytest.mark.parametrize(("plant", "rules", "message"), UNCHECKED)
def test_what_cannot_be_checked_is_said_and_refused(
    plant: Plant,
    rules: set[str],
    message: str,
    runs: list[Path],
    data: Path,
    code: Path,
    tmp_path: Path,
) -> None:
    settings = Settings(code=code, **(plant(runs[0], data, code) or {}))
    report = check(runs[0], settings)
    assert not report.failed, report.failed
    assert {finding.rule for finding in report.unchecked} == rules
    assert all(re.search(message, finding.sentence) for finding in report.unchecked)
    with pytest.raises((Refused, FileNotFoundError)):
        submit([runs[0]], tmp_path / "out", ABOUT, settings=settings)
    assert not (tmp_path / "out").exists()


def test_a_sample_of_documents_leaves_the_rule_unchecked(
    runs: list[Path], code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgolf.scoring.audit.SAMPLED_DOCUMENTS", 2)
    assert check(runs[0], Settings(code=code)).ok
    report = check(runs[0], Settings(code=code, audit="sample"))
    assert outcomes(report)["documents"] == "unchecked"
    assert "Only a sample, 2 validation documents" in sentence(report, "documents")


def test_folders_that_are_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="holds neither a run's config.toml nor a submission.json"):
        check(tmp_path)
    (tmp_path / "submission.json").write_text("[1]")
    with pytest.raises(FormatError, match="this is a JSON list; an object is expected"):
        check(tmp_path)
    (tmp_path / "submission.json").write_text("{")
    with pytest.raises(FormatError, match="this is not JSON"):
        check(tmp_path)


# Time lines


@given(st.integers(1, 200), st.integers(0, 250), st.integers(1, 17))
def test_steps_after_the_limit_are_those_that_start_there(steps: int, limit: int, every: int) -> None:
    """A step takes a second. A log with few lines tells the same, at its mean pace."""
    ends = [(step, float(step)) for step in range(steps + 1)]
    sparse = [end for end in ends if end[0] % every == 0 or end[0] == steps]
    for log in (ends, sparse):
        for moment in (limit, limit + 0.5):
            late = sum(seconds >= moment for _, seconds in ends[:-1])
            assert Timeline(tuple(log), 0, "log").started_after(moment) == late


# A written submission


def test_a_submission_is_what_the_competition_asks_for(written: Path, trained: list[Path]) -> None:
    names = {
        f"seed{seed}/{name}" for seed in SEEDS for name in ("config.toml", "log.jsonl", "report.json", "model.pgolf")
    }
    logs = {f"train_seed{seed}.log" for seed in SEEDS}
    assert set(files(written)) == {*names, *logs, "README.md", "submission.json", "train_gpt.py"}
    reports = [report_of(run) for run in trained]
    values = json.loads((written / "submission.json").read_text())
    bpb = [report["score_bpb"] for report in reports]
    assert (values["name"], values["author"], values["github_id"], values["date"]) == (
        "Tiny", "someone", "someone-7", "2026-03-20",
    )  # fmt: skip
    assert values["val_bpb"] == pytest.approx(np.mean(bpb), rel=1e-12)
    assert values["val_bpb_std"] == pytest.approx(np.std(bpb, ddof=1), rel=1e-9)
    assert values["val_loss"] == pytest.approx(np.mean([report["score_loss"] for report in reports]), rel=1e-12)
    assert values["bytes_code"] == 18 and values["track"] == "10min_16mb" and values["seeds"] == list(SEEDS)
    assert values["bytes_total"] == max((run / "model.pgolf").stat().st_size for run in trained) + 18
    assert {seed: result["val_bpb"] for seed, result in values["seed_results"].items()} == {
        str(report["seed"]): report["score_bpb"] for report in reports
    }
    for run, seed in zip(trained, SEEDS, strict=True):
        assert (written / f"seed{seed}" / "model.pgolf").read_bytes() == (run / "model.pgolf").read_bytes()
        assert (written / f"train_seed{seed}.log").read_bytes() == (run / "log.jsonl").read_bytes()


def test_the_readme_has_the_seeds_and_what_was_checked(written: Path) -> None:
    values, text = json.loads((written / "submission.json").read_text()), (written / "README.md").read_text()
    assert text.startswith("# Tiny\n\n**val_bpb ") and "A small one." in text and "What is new here." in text
    for seed, result in values["seed_results"].items():
        assert f"\n| {seed} | {result['val_loss']:.6f} | {result['val_bpb']:.6f} |" in text
    assert f"| **mean** | **{values['val_loss']:.6f}** | **{values['val_bpb']:.6f}** |" in text
    assert f"| **standard deviation** | {values['val_loss_std']:.6f} | {values['val_bpb_std']:.6f} |" in text
    for rule in RUN_RULES:
        assert f"\n| {rule.reason} | " in text
    assert str(written.parent) not in text, "no path of this machine"


def test_a_written_submission_passes_its_own_check(submission: Path) -> None:
    report = check(submission)
    assert report.ok, report.failed + report.unchecked
    assert {finding.where for finding in report.findings} == {"", "seed1", "seed2", "seed3"}
    assert [f.rule for f in report.findings if not f.where] == [rule.name for rule in FOLDER_RULES]


def doctored(values: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder / "submission.json", **values(json.loads((folder / "submission.json").read_text())))

    return change


FOLDER_VIOLATIONS: list[tuple[str, Callable[[Path], object], str]] = [
    ("files", lambda folder: (folder / "README.md").write_text(" \n"), "There is no README.md, or it is empty"),
    ("files", lambda folder: (folder / "train_gpt.py").unlink(), "holds no train_gpt.py"),
    ("files", lambda folder: (folder / "train_gpt.py").write_text("def f(:"), "train_gpt.py is not a Python script"),
    ("files", lambda folder: [log.unlink() for log in folder.glob("*.log")], "There is no training log"),
    ("files", doctored(lambda values: {"name": ""}), "submission.json has no name"),
    ("files", doctored(lambda values: {"author": None, "github_id": ""}), "has no author or github_id"),
    ("claims", doctored(lambda values: {"val_bpb": None}), "gives no val_bpb"),
    (
        "claims",
        doctored(lambda values: {"val_bpb": min(r["val_bpb"] for r in values["seed_results"].values())}),
        "the mean of the 3 seeds is",
    ),
    (
        "claims",
        doctored(lambda values: {"bytes_total": values["bytes_total"] - 1}),
        "the largest artifact and the code",
    ),
    ("claims", doctored(lambda values: {"seed_results": {}}), "is not in submission.json's seed_results"),
    (
        "claims",
        doctored(lambda v: {"seed_results": {s: {**r, "val_bpb": 1.0} for s, r in v["seed_results"].items()}}),
        "submission.json says 1.0",
    ),
    ("seeds", lambda folder: shutil.copytree(folder / "seed2", folder / "seed7"), "have the same seed"),
    (
        "seeds",
        lambda folder: shutil.copy(folder / "seed1" / "model.pgolf", folder / "seed2" / "model.pgolf"),
        "have the same artifact",
    ),
    (
        "seeds",
        lambda folder: (folder / "seed2" / "config.toml").write_text(
            (folder / "seed2" / "config.toml").read_text().replace("matrix_lr = ", "matrix_lr = 1")
        ),
        "seed1 has train.matrix_lr = .* and seed2",
    ),
]


@pytest.mark.parametrize(
    ("rule", "plant", "message"), FOLDER_VIOLATIONS, ids=[f"{r}-{i}" for i, (r, *_) in enumerate(FOLDER_VIOLATIONS)]
)
def test_planted_violations_of_a_folder_are_found(
    rule: str, plant: Callable[[Path], object], message: str, submission: Path
) -> None:
    plant(submission)
    report = check(submission, Settings(rescore=False))
    assert outcomes(report, "")[rule] == "failed", report.findings
    assert re.search(message, sentence(report, rule)), sentence(report, rule)


def test_every_folder_rule_has_a_planted_violation() -> None:
    assert {rule for rule, *_ in FOLDER_VIOLATIONS} == {rule.name for rule in FOLDER_RULES}


def test_the_scripts_own_log_is_the_train_log(runs: list[Path], code: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run1.txt").write_text("step:24/24 train_time:100ms\n")
    submit(runs[:2], tmp_path / "out", ABOUT, settings=Settings(code=code))
    assert (tmp_path / "out" / "train_seed1.log").read_text() == "step:24/24 train_time:100ms\n"
    assert (tmp_path / "out" / "train_seed2.log").read_bytes() == (runs[1] / "log.jsonl").read_bytes()


def test_a_longer_limit_is_another_track(runs: list[Path], code: Path, tmp_path: Path) -> None:
    take(runs[0], 100.0)
    done = submit(runs[:1], tmp_path / "out", ABOUT, settings=Settings(code=code, limit_seconds=2400.0))
    assert done.submission["track"] == "non_record_16mb" and done.submission["val_bpb_std"] is None
    assert check(tmp_path / "out", Settings(limit_seconds=2400.0)).ok
    assert outcomes(check(tmp_path / "out"))["time"] == "failed"


# The t-test


def test_against_a_stated_score(runs: list[Path], code: Path, tmp_path: Path) -> None:
    bpb = np.array([report_of(run)["score_bpb"] for run in runs])
    loss = np.array([report_of(run)["score_loss"] for run in runs])
    done = submit(runs, tmp_path / "out", ABOUT, against=4.5, settings=Settings(code=code))
    margin = 0.005 * bpb.mean() / loss.mean()  # nats per token in bits per byte
    assert done.test is not None and done.test.kind == "one-sample"
    assert done.test.statistic == pytest.approx((bpb.mean() - 4.5 + margin) * np.sqrt(3) / bpb.std(ddof=1))
    assert done.submission["p_value"] == done.test.p_value < 0.01
    assert f"p = {done.test.p_value:.3g}." in (tmp_path / "out" / "README.md").read_text()


def test_against_a_baseline(runs: list[Path], trained: list[Path], code: Path, tmp_path: Path) -> None:
    for run, shift in zip(runs, (1.01, 1.02, 1.03), strict=True):  # the baseline is a little worse, and not checked
        edit(run / "report.json", score_bpb=report_of(run)["score_bpb"] * shift)
    settings = Settings(code=code)
    paired = submit(trained, tmp_path / "a", ABOUT, baseline=runs[::-1], margin_nats=0.0, settings=settings).test
    ours, theirs = ([report_of(run)["score_bpb"] for run in folders] for folders in (trained, runs))
    difference = np.array(ours) - theirs
    assert paired is not None and (paired.kind, paired.df) == ("paired", 2)
    assert paired.statistic == pytest.approx(difference.mean() * np.sqrt(3) / difference.std(ddof=1))
    welch = submit(trained, tmp_path / "b", ABOUT, baseline=runs[:2], margin_nats=0.0, settings=settings).test
    assert welch is not None and welch.kind == "welch"
    with pytest.raises(ValueError, match="given twice"):
        submit(trained, tmp_path / "c", ABOUT, baseline=runs, against=1.0, settings=settings)
    with pytest.raises(ValueError, match="at least two runs on a side"):
        submit(trained, tmp_path / "c", ABOUT, baseline=runs[:1], settings=settings)
    with pytest.raises(ValueError, match="at least two runs on a side"):
        submit(trained[:1], tmp_path / "c", ABOUT, against=1.0, settings=settings)
    assert not (tmp_path / "c").exists()


# Whole or not at all


def test_nothing_is_overwritten_without_force(
    runs: list[Path], written: Path, submission: Path, code: Path, tmp_path: Path
) -> None:
    before = files(submission)
    with pytest.raises(FileExistsError, match="holds files; choose another, or replace it"):
        submit(runs, submission, ABOUT, settings=Settings(code=code))
    assert files(submission) == before
    submit(runs[:1], submission, ABOUT, settings=Settings(code=code), force=True)
    assert json.loads((submission / "submission.json").read_text())["seeds"] == [1]
    assert not (submission / "seed2").exists()
    other = tmp_path / "other"
    for content in (None, "[]", '{"name": "someone else\'s"}'):
        other.mkdir(exist_ok=True)
        (other / "mine.txt").write_text("dear")
        if content is not None:
            (other / "submission.json").write_text(content)
        with pytest.raises(FileExistsError, match="no submission of pgolf's"):
            submit(runs[:1], other, ABOUT, settings=Settings(code=code), force=True)
        assert (other / "mine.txt").read_text() == "dear"
    with pytest.raises(FileExistsError, match="this is a file"):
        submit(runs[:1], other / "mine.txt", ABOUT, settings=Settings(code=code), force=True)


def test_where_a_submission_may_lie(
    runs: list[Path], code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below folders that are not there yet, and where a link leads; not in the place of the current folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for out in (".", empty):
        with pytest.raises(ValueError, match="this is the current folder, which cannot be replaced; name another one"):
            submit(runs[:1], out, ABOUT, settings=Settings(code=code))
    link = tmp_path / "link"
    link.symlink_to("behind", target_is_directory=True)
    for out, place in (("new/../a/b/", empty / "a" / "b"), (link, tmp_path / "behind")):
        submit(runs[:1], out, ABOUT, settings=Settings(code=code))
        assert (place / "submission.json").is_file()
    submit(runs[1:2], link, ABOUT, settings=Settings(code=code), force=True)
    assert json.loads((tmp_path / "behind" / "submission.json").read_text())["seeds"] == [SEEDS[1]]
    assert link.is_symlink() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moment", ["README", "rules", "rename"])
def test_a_failure_leaves_what_was_there(
    moment: str, runs: list[Path], submission: Path, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, there = files(tmp_path), sorted(tmp_path.iterdir())

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    def fail_late(source: Path, target: Path, replace: Any = os.replace) -> None:
        if str(source).endswith(".partial") and Path(source).is_dir():
            fail()
        replace(source, target)

    if moment == "README":
        monkeypatch.setattr(write_module, "readme", fail)
    elif moment == "rules":
        monkeypatch.setattr(write_module, "judge_folder", fail)
    else:
        monkeypatch.setattr(write_module.os, "replace", fail_late)
    with pytest.raises(OSError, match="No space left"):
        submit(runs, submission, ABOUT, settings=Settings(code=code), force=True)
    with pytest.raises(OSError, match="No space left"):
        submit(runs, tmp_path / "records" / "mine" / "new", ABOUT, settings=Settings(code=code))
    assert files(tmp_path) == before and sorted(tmp_path.iterdir()) == there


def test_requests_that_cannot_be(runs: list[Path], code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(code=code)
    with pytest.raises(ValueError, match="at least one run folder"):
        submit([], tmp_path / "out", ABOUT, settings=settings)
    with pytest.raises(FileNotFoundError, match="this folder is not a run folder"):
        submit([tmp_path], tmp_path / "out", ABOUT, settings=settings)
    with pytest.raises(ValueError, match=r"have the seeds \[\d+, (\d+), \1\]; each may stand there once"):
        submit(runs, tmp_path / "out", ABOUT, baseline=[*runs[:2], runs[1]], settings=settings)
    with pytest.raises(FileNotFoundError, match="holds no report.json"):
        (runs[1] / "report.json").unlink()
        submit(runs, tmp_path / "out", ABOUT, baseline=runs[1:], settings=settings)
    with pytest.raises(FileNotFoundError, match="no such script"):
        submit(runs[:1], tmp_path / "out", ABOUT, settings=Settings(code=tmp_path / "no.py"))
    monkeypatch.chdir(runs[0])
    with pytest.raises(FileNotFoundError, match="There is no train_gpt.py and no examples/train_gpt.py here"):
        submit(runs[:1], tmp_path / "out", ABOUT)
    assert not (tmp_path / "out").exists()


# The command line


@pytest.fixture
def in_place(runs: list[Path], code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The runs, in a folder whose train_gpt.py is the default script."""
    monkeypatch.chdir(tmp_path)
    return [run.relative_to(tmp_path) for run in runs]


def test_submit_and_check_commands(in_place: list[Path], tmp_path: Path) -> None:
    (tmp_path / "about.md").write_text("Words of my own.\n")
    value = last_json(
        pgolf_(
            "submit",
            *in_place,
            "--out",
            "records/mine",
            "--author",
            "me",
            "--against",
            9,
            "--readme",
            "about.md",
            "--json",
        )
    )
    assert value["written"] == "records/mine" and value["check"]["ok"]
    assert value["submission"] == json.loads(Path("records/mine/submission.json").read_text())
    assert (value["submission"]["name"], value["submission"]["author"]) == ("mine", "me")
    assert "Words of my own." in Path("records/mine/README.md").read_text()
    result = pgolf_("check", "records/mine")
    assert result.exit_code == 0, result.output
    assert re.search(r"passed +bytes +seed1 ", result.stdout) and "36 passed, 0 failed, 0 unchecked." in result.stdout
    report = last_json(pgolf_("check", "records/mine", "--no-rescore", "--json"))
    assert report["unchecked"] == 3 and report["failed"] == 0 and not report["ok"]


def test_a_refusal_is_told_and_leaves_nothing(in_place: list[Path], tmp_path: Path) -> None:
    first, *_ = in_place
    slow_scoring(first, tmp_path, tmp_path)
    before = files(tmp_path)
    result = pgolf_("submit", first, "--out", "out", "--json")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert f"Error: The submission is refused: [{first}: scoring-time] Scoring took 601.0 s" in result.stderr
    value = json.loads(result.stdout.splitlines()[-1])
    assert value["written"] is None and value["check"]["failed"] == 1
    checked = pgolf_("check", first, "--code", "train_gpt.py")
    assert checked.exit_code == 2 and f"Error: {first} breaks 1 rule: scoring-time." in checked.stderr
    assert files(tmp_path) == before


def test_wrong_requests(in_place: list[Path], tmp_path: Path) -> None:
    first, *_ = in_place
    refused(pgolf_("check", "nowhere"), "nowhere: no such folder")
    refused(pgolf_("submit", first, "--out", first), "holds files; choose another, or replace it")
    refused(pgolf_("submit", first, "--out", "out", "--code", "no.py"), "no.py: no such script")
    assert not Path("out").exists()


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="audit is 'some'"):
        Settings(audit="some")
    for limits in ({"limit_bytes": 0}, {"limit_seconds": -1.0}, {"limit_seconds": math.nan}):
        with pytest.raises(ValueError, match="expected at least 1 and 0"):
            Settings(**limits)
