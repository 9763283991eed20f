"""Nothing passes that looked at nothing: every rule and empty evidence; and JSON, table and exit code say the same."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pgolf
from pgolf.config import Config
from pgolf.data.folder import DataFolder
from pgolf.scoring.audit import Duplicates
from pgolf.submission import CheckReport, Finding, Settings, check
from pgolf.submission import rules as rules_module
from pgolf.submission.checking import finding_of, judge_folder
from pgolf.submission.claims import PublicRun
from pgolf.submission.evidence import Claim, Evidence, Library, RunFolder, Timeline
from pgolf.submission.folder import Folder
from pgolf.submission.logs import TextLog
from pgolf.submission.rules import FOLDER_RULES, RUN_RULES, Rule
from pgolf.submission.verdict import Looked
from tests.runs import pgolf_, refused
from tests.test_submission import StandIn, edit, edit_log, outcomes, report_of, sentence, train

pytestmark = pytest.mark.usefixtures("one_thread")

NO_PROGRESS = Settings().progress
DECLARED = {"declared_by": "pgolf", "byte_basis": "decoded", "bos_id": 1}
"""What validation data says that somebody declares."""


@pytest.fixture(scope="session")
def once(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run folder, to be copied."""
    return train(tmp_path_factory.mktemp("rules") / "run", small_corpus, 1)


@pytest.fixture
def run(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "run"))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "train_gpt.py"
    path.write_text("print('training')\n")
    return path


# Every rule and nothing


class NothingToPredict:
    """A model of which every answer is empty."""

    config = SimpleNamespace(vocab_size=64)
    train_seq_len = 16

    def logits(self, ids: Any) -> Any:
        return np.zeros((len(ids), 0, 64), np.float32)

    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return np.zeros((len(ids), 0), np.float32)


class Empty(RunFolder):
    """A run all of whose files are there and hold nothing: no steps, tokens, documents, bytes, scores."""

    def __init__(self, path: Path, settings: Settings) -> None:
        super().__init__(path, settings, Library(), "empty")
        shards = DataFolder(path, (path / "train.bin",), (path / "val.bin",), None, None)
        for file in (*shards.train, *shards.val, path / "code.py", path / "model.pgolf"):
            file.write_bytes(b"")
        (path / "train.bin").write_bytes(b"\0")  # no copy of the validation shard
        nothing = np.zeros(0, np.int32)
        # Set here, as a property that is kept would be: each is asked for as often as a rule likes.
        self.__dict__.update(
            claim=Claim(val_loss=1.0, val_bpb=0.5, tokens=0, bytes=0, score_seconds=1.0),
            timeline=Timeline(((0, 0.0),), 0, "log.jsonl"),
            code=path / "code.py",
            artifact=path / "model.pgolf",
            records=[],
            header={"steps": 0, "tokens": 0, "seed": 1, "model": Config().model.to_stored()},
            config=Config(),
            report=SimpleNamespace(
                steps=0, tokens=0, seed=1, seconds=0.0, artifact_bytes=0, data={"train": 1, "val": 1}
            ),
            model=NothingToPredict(),
            data=shards,
            validation=SimpleNamespace(
                tokens=np.zeros(1, np.int32), target_bytes=nothing, duplicates=Duplicates(0, 0, 0, True), **DECLARED
            ),
            times=nothing,
            score=SimpleNamespace(tokens=0, loss=1.0, bpb=0.5, bytes=0, byte_basis="decoded"),
        )


def empty_runs(path: Path) -> list[Evidence]:
    """Evidence that holds nothing, in every form that there is."""
    settings = Settings(code=path / "code.py")
    (path / "empty.log").write_text("")
    (path / "hello.log").write_text("hello\n")
    no_claim = Empty(path, settings)
    no_claim.__dict__["claim"] = Claim()
    return [
        Evidence(path, settings, Library(), "bare"),
        RunFolder(path / "nowhere", settings, Library(), "no folder"),
        Empty(path, settings),
        no_claim,
        PublicRun(path, settings, Library(), "no log", None, Claim()),
        PublicRun(path, settings, Library(), "empty log", TextLog.read(path / "empty.log"), Claim()),
        PublicRun(path, settings, Library(), "hello", TextLog.read(path / "hello.log"), Claim()),
        PublicRun(
            path, settings, Library(), "a claim", TextLog.read(path / "empty.log"), Claim(val_loss=2.0, val_bpb=1.0)
        ),
    ]


@pytest.mark.parametrize("rule", RUN_RULES, ids=lambda rule: rule.name)
def test_no_rule_for_runs_passes_empty_evidence(rule: Rule, tmp_path: Path) -> None:
    for evidence in empty_runs(tmp_path):
        finding = finding_of(rule, evidence, evidence.name)
        assert finding.outcome != "passed" and finding.count == 0 and finding.sentence, finding


@pytest.mark.parametrize("rule", FOLDER_RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"name": "", "author": " ", "val_bpb": 1.0},
        {"name": "A", "author": "B", "val_bpb": 1.0, "seeds": [1, 2]},
    ],
)
def test_no_rule_for_folders_passes_empty_evidence(rule: Rule, values: dict[str, Any] | None, tmp_path: Path) -> None:
    for name in ("README.md", "train.log", "train_gpt.py"):
        (tmp_path / name).write_text("")
    runs = empty_runs(tmp_path)
    public = [run for run in runs if isinstance(run, PublicRun)]
    own = [run for run in runs if isinstance(run, RunFolder)]
    for path in (tmp_path, tmp_path / "nowhere"):
        # One run differs from no other: what `seeds` says of a single Empty is of that run, which is there.
        for of in ([], public, [runs[0]], [] if rule.name == "seeds" else own):
            (finding,) = judge_folder(Folder(path, values, list(of), NO_PROGRESS), [rule])
            assert finding.outcome != "passed" and finding.count == 0, (path, of, finding)


@pytest.mark.parametrize(("count", "outcome"), [(-1, "unchecked"), (0, "unchecked"), (1, "passed")])
def test_a_rule_passes_only_by_what_it_looked_at(count: int, outcome: str, tmp_path: Path) -> None:
    rule = Rule("new", "A new one.", lambda folder: Looked(count, "training steps", "All is well."))
    (finding,) = judge_folder(Folder(tmp_path, None, [], NO_PROGRESS), [rule])
    assert (finding.outcome, finding.count, finding.what) == (outcome, max(count, 0), "training steps")
    assert finding.sentence == (
        "All is well." if count > 0 else f"There was nothing to look at: {count} training steps."
    )


def test_what_passes_says_how_much_it_looked_at(run: Path, code: Path) -> None:
    report = check(run, Settings(code=code))
    assert report.ok, report.failed + report.unchecked
    seen = {finding.rule: (finding.count, finding.what) for finding in report.findings}
    assert set(seen) == {*(rule.name for rule in RUN_RULES), "seeds"}
    size = (run / "model.pgolf").stat().st_size + code.stat().st_size
    assert seen["bytes"] == (size, "bytes of artifact and code")
    assert seen["time"] == seen["log"] == (24, "training steps")
    assert seen["scoring-time"] == seen["reload"] == (1999, "scored tokens") and seen["coverage"] == (1999, "scores")
    assert seen["documents"] == (3, "validation documents") and seen["seeds"] == (1, "runs")
    assert seen["text-bytes"] == (report_of(run)["score_bytes"], "bytes of validation text")
    vocab = pgolf.load(run / "model.pgolf").config.vocab_size
    assert seen["normalisation"] == (16 * vocab, "probabilities")
    # By windows of 64 tokens, at 16, 32 and 63: logits up to there, and the losses but the last.
    assert seen["causality"] == ((16 + 32 + 63) * vocab + 15 + 31 + 62, "logits and losses")
    assert seen["order"][0] > 0


# Ways to have looked at nothing, rule by rule


def rule_of(run: Path, settings: Settings, rule: str) -> tuple[str, str]:
    (finding,) = [finding for finding in check(run, replace(settings, rescore=False)).findings if finding.rule == rule]
    return finding.outcome, finding.sentence


@pytest.mark.parametrize(("which", "what"), [("model.pgolf", "artifact"), ("train_gpt.py", "script")])
def test_an_empty_file_has_no_bytes_to_count(which: str, what: str, run: Path, code: Path) -> None:
    path = code if which == code.name else run / which
    path.write_bytes(b"")
    outcome, said = rule_of(run, Settings(code=code), "bytes")
    assert outcome == "unchecked" and f"{path} is empty: there is no {what}" in said


def test_an_empty_log_leaves_time_unchecked_and_breaks_the_log(run: Path, code: Path) -> None:
    (run / "log.jsonl").write_text("")
    outcome, said = rule_of(run, Settings(code=code), "time")
    assert outcome == "unchecked" and "ends at step 0 of the 24" in said
    assert rule_of(run, Settings(code=code), "log")[0] == "failed"


def test_a_log_that_ends_early_does_not_show_what_the_run_took(run: Path, code: Path) -> None:
    edit_log(run, lambda records: records.pop())
    outcome, said = rule_of(run, Settings(code=code), "time")
    assert outcome == "unchecked" and "log.jsonl ends at step 23 of the 24" in said


def test_steps_take_time(run: Path, code: Path) -> None:
    edit_log(run, lambda records: [record.update(seconds=0.0) for record in records])
    assert rule_of(run, Settings(code=code), "time") == (
        "failed",
        "By log.jsonl, 24 steps took 0.0 s, which no step can.",
    )


@pytest.mark.parametrize(("seconds", "outcome"), [(0.0, "unchecked"), (-1.0, "failed"), (1.0, "passed")])
def test_scoring_that_was_not_timed(seconds: float, outcome: str, run: Path, code: Path) -> None:
    edit(run / "report.json", score_seconds=seconds)
    assert rule_of(run, Settings(code=code), "scoring-time")[0] == outcome
    if seconds > 0:
        edit(run / "report.json", score_tokens=0)
        outcome, said = rule_of(run, Settings(code=code), "scoring-time")
        assert (outcome, said) == ("unchecked", "There was nothing to look at: 0 scored tokens.")


def of_empty(tmp_path: Path, rule: str, **evidence: Any) -> tuple[str, str]:
    """What a rule says of an empty run that has these."""
    run = Empty(tmp_path, Settings())
    run.__dict__.update(evidence)
    found = finding_of(next(each for each in RUN_RULES if each.name == rule), run, run.name)
    return found.outcome, found.sentence


@pytest.mark.parametrize(
    ("looked_up", "training", "outcome", "sentence"),
    [
        (0, 0, "unchecked", "There was nothing to look at: 0 training documents."),
        (5, 0, "unchecked", "There was nothing to look at: 0 training documents."),
        (0, 5, "unchecked", "There was nothing to look at: 0 validation documents."),
        (5, 7, "passed", "All 5 validation documents were looked up among 7 training documents; none stands there."),
    ],
)
def test_documents_that_are_not_there_were_not_looked_up(
    looked_up: int, training: int, outcome: str, sentence: str, tmp_path: Path
) -> None:
    validation = SimpleNamespace(duplicates=Duplicates(0, looked_up, training, True))
    assert of_empty(tmp_path, "documents", validation=validation) == (outcome, sentence)


def test_counts_of_nothing_are_said(tmp_path: Path) -> None:
    for rule, what in (("coverage", "scores"), ("text-bytes", "bytes of validation text"), ("reload", "scored tokens")):
        expected = f"There was nothing to look at: 0 {what}."
        assert of_empty(tmp_path, rule, claim=Claim(1.0, 0.5, tokens=0, bytes=0)) == ("unchecked", expected)


@pytest.mark.parametrize(("loss", "bpb"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_impossible_scores_are_not_compared_with_text(loss: float, bpb: float, tmp_path: Path) -> None:
    outcome, said = of_empty(tmp_path, "text-bytes", claim=Claim(loss, bpb))
    assert outcome == "failed" and said == f"{loss} nats per token and {bpb} bits per byte: both must be above 0."


def test_digits_that_fit_any_text_are_not_compared_with_it(tmp_path: Path) -> None:
    text = {
        "validation": SimpleNamespace(tokens=np.zeros(11), target_bytes=np.full(10, 2), **DECLARED),
        "times": np.ones(10, np.int64),
    }
    for precision, outcome in ((0.05, "unchecked"), (0.00005, "passed")):
        claim = Claim(2 * math.log(2), 1.0, loss_precision=precision, bpb_precision=precision)
        assert of_empty(tmp_path, "text-bytes", claim=claim, **text)[0] == outcome


class NoLogits(StandIn):
    def logits(self, ids: Any) -> Any:
        return self.model.logits(ids)[:, :0]


class NoLosses(StandIn):
    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return self.model.window_losses(ids, targets, first)[:, :0]


class OneLoss(StandIn):
    """Its losses would be spread over every position."""

    def window_losses(self, ids: Any, targets: Any, first: int) -> Any:
        return self.model.window_losses(ids, targets, first)[:, :1]


@pytest.mark.parametrize("kind", [NoLosses, OneLoss, NoLogits])
def test_answers_of_another_shape_are_not_looked_at(kind: type[StandIn], run: Path, code: Path) -> None:
    found = outcomes(check(run, Settings(code=code, load=lambda path, device: kind(path), rescore=False)))
    assert found["causality"] == "failed"
    assert found["normalisation"] == ("passed" if kind is NoLogits else "failed")


def test_a_method_that_scores_nothing_is_not_in_order(run: Path, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules_module.SCORERS, "sliding", lambda *_: np.zeros(0))
    report = check(run, Settings(code=code, rescore=False))
    assert outcomes(report)["order"] == "failed" and "have scores of the shape (0,)" in sentence(report, "order")


def test_without_training_nothing_can_be_scored_after_it(run: Path, code: Path) -> None:
    edit(run / "report.json", steps=0)
    outcome, said = rule_of(run, Settings(code=code), "order")
    assert (outcome, said) == (
        "unchecked",
        "There was nothing to look at: 0 scores with a changed text behind them, after training steps.",
    )


# Files


@pytest.fixture
def public(tmp_path: Path) -> Path:
    folder = tmp_path / "public"
    folder.mkdir()
    (folder / "README.md").write_text("# A run\n")
    (folder / "train_gpt.py").write_text("print('training')\n")
    (folder / "train.log").write_text(
        "step:100/100 train_time:1000ms\nfinal_int8_zlib_roundtrip val_loss:2.0000 val_bpb:1.2000 eval_time:1400ms\n"
    )
    (folder / "submission.json").write_text('{"name": "A run", "author": "Someone", "val_bpb": 1.2000}')
    return folder


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("README.md", "", "There is no README.md, or it is empty"),
        ("train.log", "", "train.log is empty; a training log is expected"),
        ("train.log", " \n", "train.log is empty"),
        ("train_gpt.py", "", "train_gpt.py holds no statement"),
        ("train_gpt.py", "# nothing\n", "train_gpt.py holds no statement"),
        ("submission.json", '{"name": " ", "author": "Someone", "val_bpb": 1.2}', "has no name or run_name"),
    ],
)
def test_files_that_hold_nothing_are_not_there(file: str, content: str, message: str, public: Path) -> None:
    assert outcomes(check(public))["files"] == "passed"
    (public / file).write_text(content)
    report = check(public)
    assert outcomes(report)["files"] == "failed" and message in sentence(report, "files")


# A submission of pgolf's own


@pytest.fixture
def submission(run: Path, code: Path, tmp_path: Path) -> Path:
    from pgolf.submission import About, submit

    submit([run], tmp_path / "out", About("Tiny", "someone"), settings=Settings(code=code))
    return tmp_path / "out"


def test_the_log_that_is_kept_of_a_run_agrees_with_it(submission: Path) -> None:
    log, bpb = submission / "train_seed1.log", report_of(submission / "seed1")["score_bpb"]
    steps = "step:24/24 train_time:100ms\n"
    for content, outcome, message in (
        (log.read_text(), "passed", ""),
        (steps, "passed", ""),
        (f"{steps}final_int8_zlib_roundtrip_exact val_loss:1.0 val_bpb:{bpb:.8f}\n", "passed", ""),
        (
            f"{steps}final_int8_zlib_roundtrip_exact val_loss:1.0 val_bpb:{bpb - 0.1:.8f}\n",
            "failed",
            "score in train_seed",
        ),
        ("hello\n", "unchecked", "train_seed1.log has no score"),
        ("", "unchecked", "train_seed1.log is empty"),
        (None, "unchecked", "There is no log of seed1 (train_seed1.log)"),
    ):
        log.unlink() if content is None else log.write_text(content)
        report = check(submission, Settings(rescore=False))
        assert outcomes(report)["claims"] == outcome, (content, report.findings)
        assert outcome == "passed" or message in sentence(report, "claims")


@pytest.mark.parametrize(
    ("change", "outcome", "message"),
    [
        (lambda v: {"val_bpb": v["val_bpb"] + 1e-5}, "failed", "val_bpb is .*; the run's is"),
        (lambda v: {"val_bpb": v["val_bpb"] - 1e-5}, "failed", "val_bpb is .*; the run's is"),
        (lambda v: {"val_loss": math.nan}, "failed", "val_loss is nan; a finite number above 0 is expected"),
        (lambda v: {"seeds": [1, 2]}, "unchecked", "names the seed 2, of which there is no run folder"),
        (lambda v: {"seed_results": {**v["seed_results"], "9": {}}}, "unchecked", "names the seed 9"),
        (lambda v: {"seed_results": {"1": {**v["seed_results"]["1"], "val_loss": 1.0}}}, "failed", "nats per token"),
        (lambda v: {"seed_results": {"1": {**v["seed_results"]["1"], "bytes_total": 9}}}, "failed", "says 9"),
    ],
)
def test_claims_are_what_the_runs_came_to(
    change: Callable[[dict[str, Any]], dict[str, Any]], outcome: str, message: str, submission: Path
) -> None:
    edit(submission / "submission.json", **change(json.loads((submission / "submission.json").read_text())))
    report = check(submission, Settings(rescore=False))
    assert outcomes(report)["claims"] == outcome, report.findings
    assert re.search(message, sentence(report, "claims")), sentence(report, "claims")


# JSON, table and exit code


def finding(outcome: str) -> Finding:
    return Finding("bytes", "", outcome, "Seen.")


@pytest.mark.parametrize(
    ("outcomes_", "verdict"),
    [
        ((), "incomplete"),
        (("passed",), "passed"),
        (("passed", "unchecked"), "incomplete"),
        (("unchecked",), "incomplete"),
        (("passed", "unchecked", "failed"), "failed"),
        (("failed",), "failed"),
    ],
)
def test_a_verdict_is_of_all_findings(outcomes_: tuple[str, ...], verdict: str) -> None:
    report = CheckReport("folder", tuple(map(finding, outcomes_)))
    values = report.to_dict()
    assert (report.verdict, values["verdict"], values["ok"]) == (verdict, verdict, verdict == "passed")
    assert report.ok == (verdict == "passed")
    assert {name: values[name] for name in ("passed", "failed", "unchecked")} == {
        name: outcomes_.count(name) for name in ("passed", "failed", "unchecked")
    }


def test_a_finding_can_be_made_as_before() -> None:
    assert Finding("bytes", "", "passed", "Seen.") == Finding("bytes", "", "passed", "Seen.", 0, "")


def agree(folder: Path, *options: str | Path) -> tuple[str, int]:
    """The verdict and the exit code of a check, which its JSON, its findings and its table also have."""
    with_json, with_table = (pgolf_("check", folder, *options, *last) for last in (["--json"], []))
    (line,) = with_json.stdout.splitlines()
    value = json.loads(line)
    found = [each["outcome"] for each in value["findings"]]
    counts = {outcome: found.count(outcome) for outcome in ("passed", "failed", "unchecked")}
    assert {outcome: value[outcome] for outcome in counts} == counts and sum(counts.values()) == len(found)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    last = f"{told}. Verdict: {value['verdict']}."
    assert with_table.stdout.splitlines()[-1] == last and last in with_json.stderr.splitlines()
    assert with_table.exit_code == with_json.exit_code
    assert value["ok"] == (value["verdict"] == "passed") == (set(found) == {"passed"})
    assert (value["verdict"] == "failed") == ("failed" in found) == (with_json.exit_code == 2)
    for each in value["findings"]:
        assert (each["count"] > 0 and each["what"] != "") == (each["outcome"] == "passed")
    return value["verdict"], with_json.exit_code


def test_json_table_and_exit_code_agree(run: Path, code: Path, public: Path) -> None:
    assert agree(run, "--code", code) == ("passed", 0)
    assert agree(run, "--code", code, "--no-rescore") == ("incomplete", 0)
    assert agree(public) == ("incomplete", 0)
    edit(public / "submission.json", val_bpb=1.1)
    assert agree(public) == ("failed", 2)
    (run / "log.jsonl").write_text("")
    assert agree(run, "--code", code, "--no-rescore") == ("failed", 2)


@pytest.mark.parametrize("plant", ["nowhere", "empty", "no object", "no JSON"])
def test_a_folder_that_cannot_be_judged_is_an_error_without_a_verdict(plant: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if plant != "nowhere":
        folder.mkdir()
    if plant in ("no object", "no JSON"):
        (folder / "submission.json").write_text("[]" if plant == "no object" else "{")
    for options in ([], ["--json"]):
        result = pgolf_("check", folder, *options)
        refused(result, str(folder))
        assert result.stdout == ""
