"""The rule `claims` on public folders: what submission.json says is what the logs say of the artifact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.submission import Finding, check
from pgolf.submission.claims import read_submission
from pgolf.submission.logs import TextLog, decode, moment_of, printed_precision

STEPS = """\
seed:{seed}
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms
step:10000/20000 train_loss:2.4000 train_time:560000ms step_avg:56.00ms
step:10620/20000 val_loss:1.5700 val_bpb:0.9260 train_time:599924ms step_avg:56.49ms
stopping_early: wallclock_cap train_time:599924ms step:10620/20000
"""
FINAL = """\
Total submission size int8+zlib: 15863068 bytes
final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:1400ms
final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""
BPB = {"1337": 0.92955001, "42": 0.92963002, "7": 0.92970101}  # their mean is 0.92962701333…
MEAN = 0.92962701


def log(bpb: float, seed: str = "1337", loss: float = 1.57, more: str = "") -> str:
    return STEPS.format(seed=seed) + FINAL.format(bpb=bpb, loss=loss) + more


def folder(path: Path, logs: dict[str, str | bytes], **values: Any) -> Path:
    """A submission with these logs and this submission.json."""
    path.mkdir(exist_ok=True)
    (path / "README.md").write_text("# A submission\n")
    (path / "train_gpt.py").write_text("print('training')\n")
    for name, text in logs.items():
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (path / "submission.json").write_text(json.dumps({"name": "A submission", "author": "Someone", **values}))
    return path


def three(path: Path, bpb: dict[str, float] = BPB, **values: Any) -> Path:
    """A submission of three seeds, each with its log and its score in submission.json."""
    logs: dict[str, str | bytes] = {f"train_seed{seed}.log": log(score, seed) for seed, score in bpb.items()}
    results = {seed: {"val_bpb": score, "val_loss": 1.57} for seed, score in bpb.items()}
    return folder(path, logs, **{"val_bpb": MEAN, "seed_results": results, **values})


def claims(path: Path) -> Finding:
    (finding,) = [finding for finding in check(path).findings if finding.rule == "claims"]
    return finding


# The mean


def test_the_mean_of_the_seeds_passes_and_counts_what_was_compared(tmp_path: Path) -> None:
    finding = claims(three(tmp_path / "a"))
    assert (finding.outcome, finding.count, finding.what) == ("passed", 3, "claimed scores and sizes"), finding
    assert finding.sentence == "val_bpb 0.929627 is what 3 runs came to."
    with_sizes = claims(three(tmp_path / "b", bytes_total=15863068))
    assert (with_sizes.outcome, with_sizes.count) == ("passed", 6)


@pytest.mark.parametrize("bpb", [*BPB.values(), MEAN - 2e-8, MEAN + 2e-8, MEAN + 0.1, 0.9297])
def test_what_is_not_the_mean_fails_in_both_directions(bpb: float, tmp_path: Path) -> None:
    finding = claims(three(tmp_path / "a", val_bpb=bpb))
    assert finding.outcome == "failed"
    assert finding.sentence == f"val_bpb is {bpb:.8f}; the mean of the 3 seeds is 0.92962701."


@pytest.mark.parametrize("bpb", [0.92962701, 0.929627, 0.92963, 0.9296, 0.930])
def test_the_mean_may_be_rounded(bpb: float, tmp_path: Path) -> None:
    assert claims(three(tmp_path / "a", val_bpb=bpb)).outcome == "passed"


@pytest.mark.parametrize("digits", ["0.9", "1", "0.93", "0.9300", "9.3e-1"])
def test_a_claim_without_digits_says_no_more_than_its_third_decimal(digits: str, tmp_path: Path) -> None:
    path = three(tmp_path / "a", {"1337": 0.9312, "42": 0.9307, "7": 0.9309})
    (path / "submission.json").write_text((path / "submission.json").read_text().replace(str(MEAN), digits))
    assert claims(path).outcome == "failed"


@pytest.mark.parametrize("name", ["mean_val_bpb", "val_bpb_mean"])
@pytest.mark.parametrize(("bpb", "outcome"), [(MEAN, "passed"), (BPB["1337"], "failed")])
def test_the_mean_by_its_other_names(name: str, bpb: float, outcome: str, tmp_path: Path) -> None:
    assert claims(three(tmp_path / "a", val_bpb=None, **{name: bpb})).outcome == outcome


@pytest.mark.parametrize("seeds", [list(map(int, BPB)), None])
@pytest.mark.parametrize(
    ("bpb", "outcome", "sentence"),
    [
        (MEAN, "passed", "is what 3 runs came to"),
        (BPB["1337"], "failed", "0.929627"),
        (0.92, "failed", "the mean of the 3 seeds is 0.92962701"),
    ],
)
def test_without_scores_of_the_seeds_the_logs_give_the_mean(
    seeds: list[int] | None, bpb: float, outcome: str, sentence: str, tmp_path: Path
) -> None:
    found = claims(three(tmp_path / "a", seed_results=None, seeds=seeds, val_bpb=bpb))
    assert found.outcome == outcome and sentence in found.sentence, found


def test_one_of_several_logs_may_be_claimed_if_it_is_not_better_than_their_mean(tmp_path: Path) -> None:
    best, worst = BPB["1337"], BPB["7"]
    found = claims(three(tmp_path / "a", seed_results=None, val_bpb=worst))
    assert (found.outcome, found.sentence) == ("passed", "val_bpb 0.929701 is what 1 run came to.")
    found = claims(three(tmp_path / "b", seed_results=None, val_bpb=best))
    assert "is that of train_seed1337.log alone; the mean of the 3 logs is 0.92962701" in found.sentence
    assert claims(three(tmp_path / "c", seed_results=None, seeds=[1337, 42, 7], val_bpb=worst)).outcome == "failed"


def test_the_mean_is_taken_over_one_evaluation_that_the_logs_have_in_common(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        f"train_seed{seed}.log": log(bpb, seed, more=f"quantized_ttt val_loss:1.5000 val_bpb:{bpb - 0.01:.8f}\n")
        for seed, bpb in BPB.items()
    }
    for index, (bpb, outcome) in enumerate([(MEAN, "passed"), (MEAN - 0.01, "passed"), (MEAN - 0.005, "failed")]):
        assert claims(folder(tmp_path / str(index), logs, val_bpb=bpb)).outcome == outcome


def test_seeds_as_an_object_are_their_results(tmp_path: Path) -> None:
    results = {seed: {"val_bpb": bpb} for seed, bpb in BPB.items()}
    assert claims(three(tmp_path / "a", seed_results=None, seeds=results)).outcome == "passed"
    results["42"]["val_bpb"] = 0.9
    assert (
        "No line of train_seed42.log has val_bpb 0.9"
        in claims(three(tmp_path / "b", seed_results=None, seeds=results)).sentence
    )


@pytest.mark.parametrize(("loss", "outcome"), [(1.57, "passed"), (1.5699, "failed"), (1.6, "passed")])
def test_the_loss_is_not_better_than_the_mean(loss: float, outcome: str, tmp_path: Path) -> None:
    found = claims(three(tmp_path / "a", val_loss=loss))
    assert found.outcome == outcome, found
    assert outcome == "passed" or found.sentence == f"val_loss is {loss:.8f}; the mean of the runs is 1.57000000."


@pytest.mark.parametrize(("seeds", "outcome"), [(3, "passed"), (4, "unchecked")])
def test_seeds_that_are_only_counted_are_not_seen(seeds: int, outcome: str, tmp_path: Path) -> None:
    found = claims(three(tmp_path / "a", n_seeds=seeds))
    assert found.outcome == outcome, found
    assert outcome == "passed" or found.sentence == "submission.json speaks of 4 seeds; 3 can be seen."


def test_one_seeds_result_is_the_folders(tmp_path: Path) -> None:
    one: dict[str, str | bytes] = {"train.log": log(0.92955001)}
    for index, (bpb, outcome) in enumerate([(0.92955001, "passed"), (0.92, "failed")]):
        values = {"val_bpb": 0.92955001, "seed_results": {"1337": {"val_bpb": bpb}}}
        assert claims(folder(tmp_path / str(index), one, **values)).outcome == outcome


# Which lines are the artifact's


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("step:10620/20000", "before quantisation"),
        ("4500/20000", "before quantisation"),
        ("step 100", "before quantisation"),
        ("DIAGNOSTIC post_ema", "before quantisation"),
        ("pre-quantization post-ema", "before quantisation"),
        ("diagnostic pre-quantization post-ema", "before quantisation"),
        ("prequant_final", "before quantisation"),
        ("final_unquantized", "before quantisation"),
        ("final before quantisation", "before quantisation"),
        ("final_fp32", "before quantisation"),
        ("final_float", "before quantisation"),
        ("final_ema", "before quantisation"),
        ("swa", "before quantisation"),
        ("final_int8_zlib_roundtrip", "artifact"),
        ("final_int8_zlib_roundtrip_exact", "artifact"),
        ("final_int6_sliding_window_exact", "artifact"),
        ("final_sliding_window_eval stride:64", "artifact"),
        ("final_ternary_roundtrip", "artifact"),
        ("final_ema_int6_roundtrip", "artifact"),
        ("final_ttt_lora", "artifact"),
        ("legal_ttt_exact", "artifact"),
        ("ttt_sliding:done", "artifact"),
        ("quantized", "artifact"),
        ("diagnostic quantized", "artifact"),
        ("post-quantization", "artifact"),
        ("quantized_ttt_phased", "artifact"),
        ("", "unknown"),
        ("eval", "unknown"),
        ("theme", "unknown"),
    ],
)
def test_a_lines_name_says_what_is_scored(name: str, moment: str) -> None:
    assert moment_of(name) == moment


def test_a_score_before_quantisation_is_not_the_artifacts(tmp_path: Path) -> None:
    averaged = "DIAGNOSTIC post_ema val_loss:1.5600 val_bpb:0.92111111 eval_time:900ms\n"
    text = STEPS.format(seed=1) + averaged + FINAL.format(bpb=0.92955001, loss=1.57)
    for index, (bpb, name) in enumerate([(0.926, "step:10620/20000"), (0.92111111, "DIAGNOSTIC post_ema")]):
        found = claims(folder(tmp_path / str(index), {"train.log": text}, val_bpb=bpb))
        assert found.outcome == "failed"
        assert found.sentence == (
            f"val_bpb {bpb:.8f} is in train.log the score of '{name}', before quantisation; the artifact's last score "
            "there is 0.92955001."
        )


def test_without_a_final_line_no_claim_passes(tmp_path: Path) -> None:
    for index, (line, bpb, outcome, sentence) in enumerate(
        [
            ("", 0.926, "failed", "no line there is the artifact's"),
            ("", 0.9, "unchecked", "No line of train.log is known to score the artifact"),
            ("eval val_loss:1.5 val_bpb:0.9\n", 0.9, "unchecked", "of 'eval', which does not say whether"),
        ]
    ):
        found = claims(folder(tmp_path / str(index), {"train.log": STEPS.format(seed=1) + line}, val_bpb=bpb))
        assert found.outcome == outcome and sentence in found.sentence, found


def test_any_evaluation_of_the_artifact_can_be_claimed(tmp_path: Path) -> None:
    more = (
        "final_int6_sliding_window_exact val_loss:1.5200 val_bpb:0.91000001\nlegal_ttt_exact val_loss=1.5 val_bpb=0.9\n"
    )
    for index, bpb in enumerate([0.92955001, 0.91000001, 0.9]):
        assert claims(folder(tmp_path / str(index), {"train.log": log(0.92955001, more=more)}, val_bpb=bpb)).count == 1
    assert claims(folder(tmp_path / "no", {"train.log": log(0.92955001, more=more)}, val_bpb=0.905)).outcome == "failed"


def test_a_finer_line_of_the_same_score_leaves_less_room(tmp_path: Path) -> None:
    one = {"train.log": log(0.92955001)}
    assert claims(folder(tmp_path / "a", {**one}, val_bpb=0.9296)).outcome == "passed"  # four decimals, as printed
    assert claims(folder(tmp_path / "b", {**one}, val_bpb=0.92960001)).outcome == "failed"


def test_the_loss_is_that_of_the_line_with_the_score(tmp_path: Path) -> None:
    one: dict[str, str | bytes] = {"train.log": log(0.92955001, loss=1.57012345)}
    assert claims(folder(tmp_path / "a", one, val_bpb=0.92955001, val_loss=1.5701)).outcome == "passed"
    found = claims(folder(tmp_path / "b", one, val_bpb=0.92955001, val_loss=1.5))
    assert found.sentence == (
        "train.log has val_bpb 0.92955001 with val_loss 1.57012345; submission.json says val_loss 1.50000000."
    )


def test_of_several_runs_in_a_log_the_last_counts(tmp_path: Path) -> None:
    text = log(0.9) + log(0.92955001)
    assert claims(folder(tmp_path / "a", {"train.log": text}, val_bpb=0.92955001)).outcome == "passed"
    assert claims(folder(tmp_path / "b", {"train.log": text}, val_bpb=0.9)).outcome == "failed"


# Logs that show nothing


@pytest.mark.parametrize(
    ("content", "outcome", "sentence"),
    [
        (b"", "unchecked", "train.log is empty."),
        (b" \n\n\t", "unchecked", "train.log is empty."),
        (b"\xef\xbb\xbf", "unchecked", "train.log is empty."),
        (b"\xff\xfe", "unchecked", "train.log is empty."),
        (b"hello\n", "unchecked", "train.log has no score: none of its 1 lines has val_loss and val_bpb."),
        ("hello".encode("utf-16"), "unchecked", "train.log has no score"),
        (b"\0" * 100, "unchecked", "full of NUL characters"),
        (log(0.92955001).encode("utf-16"), "passed", "came to"),
        (log(0.9).encode("utf-16"), "failed", "No line of train.log has val_bpb 0.92955001"),
        (b"\xfe\xff" + log(0.92955001).encode("utf-16-be"), "passed", "came to"),
        (log(0.92955001).encode("utf-32"), "passed", "came to"),
        (log(0.92955001).encode("utf-8-sig"), "passed", "came to"),
        (log(0.92955001).encode("utf-16-le"), "unchecked", "as UTF-16 without a byte order mark is"),
        (log(0.92955001).encode("utf-16-be"), "unchecked", "as UTF-16 without a byte order mark is"),
        (log(0.92955001).encode("utf-16")[:-1], "passed", "came to"),  # cut within a character
        ("val_loss: soon val_bpb: 0.92955001", "unchecked", "has no score"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, (bytes, str)) else None,
)
def test_a_log_is_read_as_what_it_is(content: bytes | str, outcome: str, sentence: str, tmp_path: Path) -> None:
    found = claims(folder(tmp_path / "a", {"train.log": content}, val_bpb=0.92955001))
    assert found.outcome == outcome and sentence in found.sentence, found


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=60))
def test_text_is_decoded_by_its_mark(text: str) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode(text.encode(encoding)) == (text, "")


@pytest.mark.parametrize("what", ["missing", "empty", "hello"])
@pytest.mark.parametrize("with_results", [True, False])
def test_every_named_seed_needs_its_log(what: str, with_results: bool, tmp_path: Path) -> None:
    path = three(tmp_path / "a", seeds=list(map(int, BPB)))
    if not with_results:
        three(path, seed_results=None, seeds=list(map(int, BPB)))
    (path / "train_seed42.log").unlink()
    if what != "missing":
        (path / "train_seed42.log").write_text("" if what == "empty" else "hello\n")
    found = claims(path)
    expected = {
        "missing": "There is no log of seed 42",
        "empty": "train_seed42.log is empty",
        "hello": "train_seed42.log has no score",
    }
    assert found.outcome == "unchecked" and expected[what] in found.sentence, found


def test_no_logs_at_all_leave_seeds_unchecked_and_a_wrong_mean_failed(tmp_path: Path) -> None:
    for index, (bpb, outcome) in enumerate([(MEAN, "unchecked"), (BPB["1337"], "failed")]):
        path = three(tmp_path / str(index), val_bpb=bpb)
        for name in path.glob("*.log"):
            name.unlink()
        assert claims(path).outcome == outcome


def test_a_seed_without_a_score_of_its_own_has_its_logs(tmp_path: Path) -> None:
    results: dict[str, Any] = {seed: {"steps": 10620} for seed in BPB}
    assert claims(three(tmp_path / "a", seed_results=results)).outcome == "passed"
    assert claims(three(tmp_path / "b", seed_results=results, val_bpb=BPB["1337"])).outcome == "failed"


# Numbers that nothing can have


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, 0.0, -0.0, -1.2, 10**400, -(10**400)])
@pytest.mark.parametrize("name", ["val_bpb", "val_loss", "bytes_total", "bytes_code", "mean_val_bpb"])
def test_impossible_claims_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    good: dict[str, Any] = {"val_bpb": 0.92955001, "val_loss": 1.57}
    found = claims(folder(tmp_path / "a", {"train.log": log(0.92955001)}, **{**good, name: value}))
    assert found.outcome == "failed" and f"{name} is " in found.sentence, found
    assert "a finite number above 0 is expected" in found.sentence
    results = {seed: {"val_bpb": bpb} for seed, bpb in BPB.items()}
    results["42"][name] = value
    found = claims(three(tmp_path / "b", seed_results=results))
    assert found.outcome == "failed" and f"submission.json of seed 42: {name} is " in found.sentence, found


@pytest.mark.parametrize("value", [None, "1.2", True, [], {}])
def test_what_is_no_number_claims_nothing(value: Any, tmp_path: Path) -> None:
    found = claims(folder(tmp_path / "a", {"train.log": log(0.92955001)}, val_bpb=value))
    assert (found.outcome, found.sentence) == ("failed", "submission.json gives no val_bpb.")


@pytest.mark.parametrize(
    ("digits", "half"),
    [
        ("1.2240", 5e-5),
        ("1.224", 5e-4),
        ("2", 0.5),
        ("1e-3", 5e-4),
        ("1.5E2", 5.0),
        ("1e999", math.inf),
        ("1e-999", 0.0),
    ],
)
def test_the_precision_of_a_number_is_that_of_its_digits(digits: str, half: float, tmp_path: Path) -> None:
    assert printed_precision(digits) == pytest.approx(half)
    if digits not in ("2", "1e999"):
        (tmp_path / "submission.json").write_text(f'{{"val_bpb": {digits}}}')
        assert read_submission(tmp_path / "submission.json")["val_bpb"].precision == pytest.approx(half)


# Steps and times


def test_a_log_with_stamped_lines_and_an_indented_seed_is_read(tmp_path: Path) -> None:
    text = log(0.92955001).replace("seed:", "  seed: ")
    stamped = "".join(f"1776142360.282 {line}\n" for line in text.splitlines())
    (tmp_path / "train1.txt").write_text(stamped)
    read = TextLog.read(tmp_path / "train1.txt")
    assert (read.seed, read.ends[-1], read.claim.val_bpb) == ("1337", (10620, 599.924), 0.92955001)
    assert read.claim.total_bytes == 15863068 and read.claim.score_seconds == 1.4


def outcome(path: Path, rule: str) -> tuple[str, str]:
    return next((f.outcome, f.sentence) for f in check(path).findings if f.rule == rule)


@pytest.mark.parametrize(
    ("lines", "claimed", "expected", "sentence"),
    [
        ("step:100/200 train_time:1000ms\n", {}, "unchecked", "train.log ends at step 100 of 200, without a line"),
        ("step:200/200 train_time:1000ms\n", {}, "passed", "200 steps in 1.0 s"),
        ("step:100/200 train_time:1000ms\nquantized val_loss:1.1 val_bpb:0.9\n", {}, "passed", "100 steps in 1.0 s"),
        ("stopping_early: wallclock_cap train_time:1000ms step:100/200\n", {}, "passed", "100 steps in 1.0 s"),
        ("step:200/200 train_time:1000ms\n", {"step_stop": 201}, "unchecked", "ends at step 200 of the 201"),
        ("step:200/200 train_time:1000ms\n", {"steps": 200}, "passed", "200 steps"),
        ("step:200/200 train_time:900000ms\n", {"steps": 201}, "failed", "started after the limit of 600 s"),
        ("step:200/200 train_time:0ms\n", {}, "failed", "200 steps took 0.0 s, which no step can"),
        ("step:0/200 train_time:0ms\n", {}, "unchecked", "has lines of the form"),
        ("hello\n", {}, "unchecked", "has lines of the form"),
        ("", {}, "unchecked", "has lines of the form"),
    ],
)
def test_times_are_judged_if_they_go_to_the_end(
    lines: str, claimed: dict[str, Any], expected: str, sentence: str, tmp_path: Path
) -> None:
    found = outcome(folder(tmp_path / "a", {"train.log": lines}, val_bpb=0.9, **claimed), "time")
    assert found[0] == expected and sentence in found[1], found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantized val_loss:1.1 val_bpb:0.9 eval_time:1400ms", "passed"),
        ("quantized val_loss:1.1 val_bpb:0.9 eval_time:0ms", "unchecked"),
        ("quantized val_loss:1.1 val_bpb:0.9", "unchecked"),
        ("DIAGNOSTIC post_ema val_loss:1.1 val_bpb:0.9 eval_time:1400ms", "unchecked"),
    ],
)
def test_scoring_time_is_that_of_the_artifacts_score(line: str, expected: str, tmp_path: Path) -> None:
    assert outcome(folder(tmp_path / "a", {"train.log": line}, val_bpb=0.9), "scoring-time")[0] == expected


@pytest.mark.parametrize("total", [0, -1])
def test_a_total_of_nothing_fits_nowhere(total: int, tmp_path: Path) -> None:
    found = outcome(folder(tmp_path / "a", {"train.log": log(0.9)}, val_bpb=0.9, bytes_total=total), "bytes")
    assert found == ("failed", f"Code and artifact are said to have {total} bytes; they have at least 1.")
