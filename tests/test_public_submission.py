"""Checks of other people's submissions, which have the competition's files and logs and no run folder of pgolf's."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgolf
from pgolf.data.tokenizer import Tokenizer
from pgolf.submission import Settings, check
from tests.runs import declare
from tests.test_submission import edit, outcomes, sentence

LOG = """\
import torch  # the script itself stands here: step:{step}/{args.iterations} val_loss:{loss:.4f}
{seed_line}
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms
step:1000/20000 train_loss:2.4000 train_time:{first}ms step_avg:56.00ms
step:{last}/20000 val_loss:2.0606 val_bpb:1.2172 train_time:{time}ms step_avg:56.49ms
stopping_early: wallclock_cap train_time:{time}ms step:{last}/20000
Code size: 48140 bytes
Total submission size int8+zlib: {total} bytes
final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{scoring}ms
final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""


def public_log(seed: int | None = None, **changes: Any) -> str:
    values = {"first": 56490, "last": 10620, "time": 599924, "total": 15863068, "scoring": 1400, "loss": 2.06035852}
    values |= {"bpb": 1.21687994, "seed_line": "" if seed is None else f"seed:{seed}", **changes}
    return (
        LOG.replace("{step}", "{{step}}")
        .replace("{args.iterations}", "{{args.iterations}}")
        .replace("val_loss:{loss:.4f}\n{seed", "val_loss:{{loss:.4f}}\n{seed")
        .format(**values)
    )


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A folder in the form of the competition's own examples."""
    folder = tmp_path / "2026-03-17_Public"
    folder.mkdir()
    (folder / "README.md").write_text("# A baseline\n")
    (folder / "train_gpt.py").write_text("raise SystemExit('must not be run')\n")
    (folder / "train.log").write_text(public_log())
    values = {
        "author": "Someone", "github_id": "someone", "name": "A baseline", "val_loss": 2.06035852,
        "val_bpb": 1.21687994, "bytes_total": 15863068, "bytes_code": 48140,
    }  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(values))
    return folder


def seeds(folder: Path, **bpb: float) -> None:
    """Make it a submission of several seeds, each with its log."""
    (folder / "train.log").unlink()
    results = {name.removeprefix("s"): {"val_loss": 2.03, "val_bpb": value} for name, value in bpb.items()}
    for seed, result in results.items():
        (folder / f"train_seed{seed}.log").write_text(public_log(bpb=result["val_bpb"], loss=2.03))
    edit(folder / "submission.json", seed_results=results, val_bpb=float(np.mean(list(bpb.values()))))


def test_a_public_folder_is_checked_as_far_as_it_goes(public: Path) -> None:
    report = check(public)
    found = outcomes(report)
    assert not report.failed, report.failed
    assert {rule for rule, outcome in found.items() if outcome == "passed"} == {
        "time", "scoring-time", "files", "claims",
    }  # fmt: skip
    assert "are said to have 15,863,068 bytes, within 16,000,000" in sentence(report, "bytes")
    assert "10,620 steps in 599.9 s by train.log" in " ".join(f.sentence for f in report.findings)


def test_a_public_folders_seeds_are_told_apart(public: Path) -> None:
    seeds(public, s1337=1.2030105, s42=1.20155579, s7=1.20406767)
    report = check(public)
    assert not report.failed, report.failed
    assert {finding.where for finding in report.findings} == {"", "seed 1337", "seed 42", "seed 7"}
    assert outcomes(report)["claims"] == "passed"
    edit(public / "submission.json", val_bpb=1.20155579)
    assert "the mean of the 3 seeds is 1.20287799" in sentence(check(public), "claims")


def test_a_public_folders_text_is_compared_with_its_score(public: Path, small_corpus: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(small_corpus, tmp_path / "data"))
    declare(data)
    tokenizer = Tokenizer(next(data.glob("*.model")))
    tokens = pgolf.read_shard(next(data.glob("*_val_*.bin")))
    per_token = tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum() / (tokens.size - 1)
    bpb = 2.06035852 / math.log(2) / per_token
    edit(public / "submission.json", val_bpb=round(bpb, 6))
    (public / "train.log").write_text(public_log(bpb=bpb))
    found = check(public, Settings(data=data))
    assert (outcomes(found)["text-bytes"], outcomes(found)["documents"]) == ("passed", "passed")
    # Where nobody declares the data, nobody knows whether it is whole.
    found = check(public, Settings(data=small_corpus))
    assert (outcomes(found)["text-bytes"], outcomes(found)["documents"]) == ("unchecked", "passed")
    assert "Nobody declares what" in sentence(found, "text-bytes")
    edit(public / "submission.json", val_bpb=round(bpb / 1.04, 6))  # a byte table that is 4 % too large
    assert outcomes(check(public, Settings(data=data)))["text-bytes"] == "failed"


def times(folder: Path) -> str:
    return next(f.sentence for f in check(folder).findings if f.rule == "time")


def test_logs_are_read_as_people_keep_them(public: Path) -> None:
    """Two runs in one file: the last counts. Two logs of a seed: the one with the score. Times in minutes: the end."""
    (public / "train.log").write_text(public_log(last=99_000, time=700_000) + public_log())
    assert times(public) == "10,620 steps in 599.9 s by train.log, of 600 s."
    (public / "train_again.log").write_text(public_log(bpb=1.3, last=99_000, time=700_000))
    assert outcomes(check(public))["claims"] == "passed" and "train.log" in times(public)
    (public / "train_again.log").unlink()
    for stop, outcome in ((588_047, "passed"), (600_500, "failed")):
        (public / "train.log").write_text(
            "1/20000 train_loss: 8.3152 train_time: 0.0m tok/s: 8668352\n"
            "4500/20000 train_loss: 2.2951 train_time: 9.9m tok/s: 6618594\n"
            f"stopping_early: wallclock_cap train_time: {stop}ms step: 4550/20000\n"
        )
        assert f"4,550 steps in {stop / 1000:,.1f} s" in times(public)
        assert outcomes(check(public))["time"] == outcome


PUBLIC_VIOLATIONS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("bytes", {}, {"bytes_total": 16_500_000}, "said to have 16,500,000 bytes; the limit is 16,000,000"),
    ("time", {"time": 612_000}, {}, r"\d+ of them started after the limit of 600 s, and only 2 can be in flight"),
    ("scoring-time", {"scoring": 700_000}, {}, "Scoring took 700.0 s"),
    ("time", {"first": 700_000}, {}, r"By train\.log, step 10,620 ends at 599\.9 s, before step 1,000 at 700\.0 s"),
    ("claims", {}, {"val_bpb": 1.1}, "No line of train.log has val_bpb 1.1.*; the nearest is 1.2168"),
    # Digits that the loss does not have say nothing of bits per byte.
    ("claims", {}, {"val_loss": 2, "val_bpb": 1.18}, r"No line of train\.log has val_bpb 1\.18"),
    ("claims", {}, {"val_loss": 1e-7, "val_bpb": 1.0}, r"No line of train\.log has val_bpb 1\.0"),
    ("claims", {"total": 15_999_000}, {}, "train.log says 15,999,000 bytes in total; submission.json 15,863,068"),
    ("claims", {}, {"val_bpb": "1.2"}, "gives no val_bpb"),
    ("files", {}, {"name": None}, "has no name"),
]


@pytest.mark.parametrize(("rule", "logged", "claimed", "message"), PUBLIC_VIOLATIONS)
def test_planted_violations_of_public_folders_are_found(
    rule: str, logged: dict[str, Any], claimed: dict[str, Any], message: str, public: Path
) -> None:
    (public / "train.log").write_text(public_log(**logged))
    edit(public / "submission.json", **claimed)
    report = check(public)
    assert outcomes(report)[rule] == "failed", report.findings
    assert re.search(message, sentence(report, rule)), sentence(report, rule)


def test_a_public_folder_without_a_log_leaves_its_claims_unchecked(public: Path) -> None:
    (public / "train.log").unlink()
    found = outcomes(check(public))
    assert (found["claims"], found["time"], found["files"]) == ("unchecked", "unchecked", "failed")


@pytest.mark.parametrize("what", ["x.log", "train_again.txt", "other.py", "configs/config.toml", "logs/1.log"])
@pytest.mark.parametrize("how", ["folder", "nothing behind it", "another program's"])
def test_what_a_folder_holds_besides_is_left_alone(what: str, how: str, public: Path) -> None:
    expected = outcomes(check(public))
    path = public / what
    path.parent.mkdir(exist_ok=True)
    if how == "folder":
        path.mkdir()
    elif how == "nothing behind it":
        path.symlink_to("nowhere")
    else:
        path.write_text("colour = 1\n")
    assert outcomes(check(public)) == expected


@pytest.mark.parametrize(
    "code", ["x = (", "\0", "(" * 100_000, "-" * 100_000 + "1"], ids=["open", "NUL", "deep", "long"]
)
def test_scripts_that_cannot_be_read_are_told(code: str, public: Path) -> None:
    (public / "train_gpt.py").write_text(code)
    report = check(public)
    assert outcomes(report)["files"] == "failed" and "train_gpt.py is not a Python script" in sentence(report, "files")


names = st.sampled_from(["val_bpb", "val_loss", "bytes_total", "bytes_code", "seed_results", "name", "author"])
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names | st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


logs = st.text(max_size=80) | st.sampled_from(["", *(f"{line}\n" for line in (
    f"step:{'9' * 5000}/1 train_time:1ms",
    f"step:9/1 train_time:{'9' * 5000}ms",
    f"Total submission size: {'9' * 5000} bytes",
    f"val_loss:{'9' * 5000}.0 val_bpb:{'9' * 5000}.0",
))]).map(lambda line: public_log() + line)  # fmt: skip


@given(values=st.dictionaries(names, odd, max_size=7), log=logs)
def test_odd_public_folders_are_judged_without_a_crash(
    values: dict[str, Any], log: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "submission.json").write_text(json.dumps(values))
    (folder / "train.log").write_bytes(log.encode("utf-8", "surrogatepass"))
    report = check(folder)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict() and report.unchecked
    shutil.rmtree(folder)
