"""What submission.json claims, held against what the runs and their logs say: the rule `claims`, in its parts.

Claims and logs agree where they are equal within the digits that they are printed with, in both directions: a score
that is worse than the logs' is another run's too. Each function returns how many values it compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pgolf.submission.claims import PublicRun, claim_of, impossible, named_seeds, seed_claims, seed_results
from pgolf.submission.evidence import Claim, Evidence
from pgolf.submission.logs import COARSEST, LoggedScore, TextLog
from pgolf.submission.verdict import Broken, Looked, Unchecked

_ROUNDING = 1e-9  # of sums in binary floating point, next to digits that are compared


def submission_agrees(values: Mapping[str, Any], runs: Sequence[Evidence], logs: Sequence[Path]) -> Looked:
    """Every claimed score and size against its run; raises Broken where they differ, Unchecked where one is missing."""
    for where, each in (("", values), *((f" of seed {seed}", each) for seed, each in seed_results(values).items())):
        if wrong := impossible(each):
            raise Broken(f"submission.json{where}: {wrong}")
    claimed, by_seed = _fine(claim_of(values)), {seed: _fine(claim) for seed, claim in seed_claims(values).items()}
    if claimed.val_bpb is None:
        raise Broken("submission.json gives no val_bpb.")
    if not runs:
        raise Unchecked("There are no runs and no logs to compare submission.json with.")
    public = [run for run in runs if isinstance(run, PublicRun)]
    scores, compared = _of_logs(claimed, by_seed, values, public) if public else _of_runs(claimed, by_seed, runs)
    _means(claimed, scores)
    if not public:
        seeds = {str(run.report.seed) for run in runs}
        for seed in named_seeds(values):
            if seed not in seeds:
                raise Unchecked(f"submission.json names the seed {seed}, of which there is no run folder.")
        compared += sum(_kept_log(run, logs) for run in runs)
    spoken_of = values.get("n_seeds")
    if isinstance(spoken_of, int) and spoken_of > len(runs):
        raise Unchecked(f"submission.json speaks of {spoken_of} seeds; {len(runs)} can be seen.")
    came = f"{len(scores)} run{'s' * (len(scores) != 1)} came to"
    return Looked(compared, "claimed scores and sizes", f"val_bpb {claimed.val_bpb:.6f} is what {came}.")


def _fine(claim: Claim) -> Claim:
    return replace(
        claim,
        loss_precision=min(claim.loss_precision, COARSEST),
        bpb_precision=min(claim.bpb_precision, COARSEST),
    )


def _of_runs(claimed: Claim, by_seed: Mapping[str, Claim], runs: Sequence[Evidence]) -> tuple[list[Claim], int]:
    """pgolf's own run folders: each seed's score, and how many values were compared."""
    scores, compared = [], 1
    for run in runs:
        found, said = run.claim, by_seed.get(str(run.report.seed))
        if found.val_bpb is None or said is None or said.val_bpb is None:
            raise Broken(f"{run.name} is not in submission.json's seed_results, or has no bits per byte.")
        size = run.artifact.stat().st_size
        for what, is_said, is_found, slack in (
            ("bits per byte", said.val_bpb, found.val_bpb, said.bpb_precision + _ROUNDING),
            ("nats per token", said.val_loss, found.val_loss, said.loss_precision + _ROUNDING),
            ("bytes of artifact and code", said.total_bytes, size + run.code.stat().st_size, 0),
        ):
            if is_said is None or is_found is None:
                continue
            if not abs(is_said - is_found) <= slack:
                form = ",d" if isinstance(is_found, int) else ".8f"
                raise Broken(f"{run.name} came to {is_found:{form}} {what}; submission.json says {is_said:{form}}.")
            compared += 1
        scores.append(replace(found, bpb_precision=0.0, loss_precision=0.0))
    largest = max(run.artifact.stat().st_size + run.code.stat().st_size for run in runs)
    if claimed.total_bytes != largest:
        raise Broken(f"bytes_total is {claimed.total_bytes}; the largest artifact and the code have {largest:,}.")
    return scores, compared + 1


def _kept_log(run: Evidence, logs: Sequence[Path]) -> int:
    """1 where the log that is kept beside a run agrees with it: its log.jsonl again, or what the script printed."""
    own = (run.path / "log.jsonl").read_bytes()
    kept = [TextLog.read(log) for log in logs]
    kept = [log for log in kept if log.seed == str(run.report.seed)]
    if not kept:
        raise Unchecked(f"There is no log of {run.name} (train_seed{run.report.seed}.log) beside its folder.")
    for log in kept:
        if log.path.read_bytes() == own:
            continue
        if not log.scores and len(log.ends) < 2:
            raise Unchecked(f"{log.silence[:-1]}, and it is not the run's log.jsonl.")
        scored = replace(run.claim, bpb_precision=0.0)
        if log.finals and not any(score.shows(scored) for score in log.finals):
            raise Broken(
                f"{run.name} scored {scored.val_bpb:.8f}; the artifact's last score in {log.path.name} is "
                f"{log.finals[-1].bpb:.8f}."
            )
    return 1


def _of_logs(
    claimed: Claim, by_seed: Mapping[str, Claim], values: Mapping[str, Any], runs: Sequence[PublicRun]
) -> tuple[list[Claim], int]:
    """Public runs: each seed's score as its log has it, and how many values were compared."""
    scores: list[Claim] = []
    missing: list[str] = []
    for run in runs:
        claim = _fine(run.claimed)
        try:
            scores.append(_score(run, claim))
        except Unchecked as reason:
            missing.append(str(reason))
            if claim.val_bpb is not None:
                scores.append(claim)
    if len(runs) == 1:  # what is said of the one seed is said of the whole
        _means(claimed, [claim for claim in by_seed.values() if claim.val_bpb is not None])
    if missing:
        if len(scores) == len(runs):
            _means(claimed, scores)
        raise Unchecked(" ".join(missing))
    if len(runs) > 1 and not by_seed:
        runs, scores = _chosen(claimed, runs, scores, several=len(named_seeds(values)) > 1)
    return scores, len(scores) + sum(map(_total, runs))


def _score(run: PublicRun, claim: Claim) -> Claim:
    """The score of the artifact by the run's log: the claimed one where it has that, the last where none is claimed."""
    log = run.log
    if log is None:
        raise Unchecked(f"There is no log of {run.name} to compare submission.json with.")
    finals = log.finals
    if claim.val_bpb is None:
        if not finals:
            raise Unchecked(log.silence)
        return log.claim
    showing = [score for score in finals if score.shows(claim)]
    if showing:
        right = [score for score in showing if score.shows_loss(claim)]
        if not right:
            raise Broken(
                f"{log.path.name} has val_bpb {showing[-1].bpb:.8f} with val_loss {showing[-1].loss:.8f}; "
                f"submission.json says val_loss {claim.val_loss:.8f}."
            )
        found = _as_claim(right[-1])
        # Authors average what they print: the mean may be off by as much as each seed's claim is.
        return replace(found, bpb_precision=max(found.bpb_precision, claim.bpb_precision))
    elsewhere = [score for score in log.scores if score.shows(claim)]
    before = [score for score in elsewhere if score.moment == "before quantisation"]
    if before:
        final = (
            f"the artifact's last score there is {finals[-1].bpb:.8f}" if finals else "no line there is the artifact's"
        )
        raise Broken(
            f"val_bpb {claim.val_bpb:.8f} is in {log.path.name} the score of {before[-1].name!r}, before quantisation; "
            f"{final}."
        )
    if elsewhere and not finals:
        raise Unchecked(
            f"val_bpb {claim.val_bpb:.8f} is in {log.path.name} the score of {elsewhere[-1].name!r}, which does not "
            "say whether it is the artifact's, after quantisation."
        )
    if not finals:
        raise Unchecked(log.silence)
    nearest = min(finals, key=lambda score: abs(score.bpb - claim.val_bpb))  # type: ignore[operator]
    raise Broken(
        f"No line of {log.path.name} has val_bpb {claim.val_bpb:.8f} after quantisation; the nearest is "
        f"{nearest.bpb:.8f}."
    )


def _total(run: PublicRun) -> int:
    """1 where a total is claimed and logged. It may be claimed larger than a log has it: as the largest of the runs."""
    assert run.log is not None
    logged, said = run.log.claim.total_bytes, run.claimed.total_bytes
    if logged is None or said is None:
        return 0
    if logged > said:
        raise Broken(f"{run.log.path.name} says {logged:,} bytes in total; submission.json {said:,}.")
    return 1


def _chosen(
    claimed: Claim, runs: Sequence[PublicRun], scores: list[Claim], several: bool
) -> tuple[Sequence[PublicRun], list[Claim]]:
    """The runs that the claim is of, and their scores, where submission.json does not give each seed's.

    All of them, by whichever evaluation they have in common and has the claimed mean. If submission.json names no
    seeds (``several`` is false), the claim may be of one run, but not of one that is better than the mean.
    """
    logs = [run.log for run in runs if run.log is not None]
    by_name = [{score.evaluation: _as_claim(score) for score in log.finals} for log in logs]
    for name in reversed(by_name[-1]):
        alike = [found[name] for found in by_name if name in found]
        if len(alike) == len(runs) and _differs(claimed, alike) is None:
            return runs, alike
    for run, log in zip(runs, logs, strict=True):
        one = next((score for score in log.finals if score.shows(claimed)), None)
        if one is None or several:
            continue
        mean = fmean(found[one.evaluation].val_bpb or 0.0 for found in by_name if one.evaluation in found)
        if one.bpb < mean - _ROUNDING:
            raise Broken(
                f"val_bpb {claimed.val_bpb:.8f} is that of {log.path.name} alone; the mean of the {len(logs)} logs is "
                f"{mean:.8f}."
            )
        return [run], [_as_claim(one)]
    return runs, scores


def _as_claim(score: LoggedScore) -> Claim:
    return Claim(score.loss, score.bpb, loss_precision=score.loss_precision, bpb_precision=score.bpb_precision)


def _means(claimed: Claim, scores: Sequence[Claim]) -> None:
    """Raises Broken where the claimed bits per byte are not the mean of the runs', or the claimed loss is below it."""
    losses = [score.val_loss for score in scores if score.val_loss is not None]
    if claimed.val_loss is not None and losses and len(losses) == len(scores):
        loss = fmean(losses)
        slack = claimed.loss_precision + fmean(score.loss_precision for score in scores) + _ROUNDING
        # Some give the loss of one run beside the mean of bits per byte, by which submissions are ranked.
        if claimed.val_loss < loss - slack:
            raise Broken(f"val_loss is {claimed.val_loss:.8f}; the mean of the runs is {loss:.8f}.")
    mean = _differs(claimed, scores)
    if mean is not None:
        runs = f"the mean of the {len(scores)} seeds" if len(scores) > 1 else "the run's"
        raise Broken(f"val_bpb is {claimed.val_bpb:.8f}; {runs} is {mean:.8f}.")


def _differs(claimed: Claim, scores: Sequence[Claim]) -> float | None:
    """The mean of the runs' bits per byte, if the claim is another; None where it is the same, or nothing is known."""
    found = [score.val_bpb for score in scores if score.val_bpb is not None]
    if claimed.val_bpb is None or not found:
        return None
    mean = fmean(found)
    slack = claimed.bpb_precision + fmean(score.bpb_precision for score in scores) + _ROUNDING
    return None if abs(claimed.val_bpb - mean) <= slack else mean
