"""The rules, each a small function: to add one, write it here under `run_rule` or `folder_rule`, and nowhere else.

A rule returns what it looked at, counted, with the sentence that says what it saw: it passes if that was anything.
It raises Broken with what is wrong, or Unchecked with what is missing. What it asks for may raise too: a missing file
means unchecked, a damaged or impossible one broken.
docs/submission.md has the table for readers.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.common.files import file_sha256
from pgolf.config import Config
from pgolf.scoring.evaluation import BASES, ValidationData, plan_windows
from pgolf.submission.agreement import submission_agrees
from pgolf.submission.claims import SCORE_NAMES
from pgolf.submission.evidence import Claim, Evidence, Model, RunFolder, number
from pgolf.submission.folder import README, Folder
from pgolf.submission.logs import TextLog
from pgolf.submission.verdict import Broken, Looked, Unchecked

SAME_SCORE = 1e-4
"""How far a score may be off when it is measured again, in nats per token and in bits per byte: kernels round."""
UNSCORED_SHARE = 0.01
"""Validation targets that a method may leave out at the stream's end."""
FREE_KEYS = {"train.seed", "train.data_path", "train.tokenizer_path", "train.train_log_every", "train.checkpoint_every"}
"""In which the configurations of one submission's runs may differ."""

_PROBE_LENGTH, _SUM_LENGTH = 256, 16  # tokens
_SUM_ERROR = 1e-4  # of probabilities that are added in float64 and were computed in float32
_BYTES_ERROR, _UNKNOWN_TAIL = 1e-6, 1e-4  # relative; where it is not known which targets a method left out
_COARSEST_RATIO = 0.005  # relative: digits that leave more open than this cannot tell a wrong byte count


@dataclass(frozen=True)
class Rule:
    """A rule: its name, why there is one, and the function that judges a run's Evidence or a whole Folder."""

    name: str
    reason: str
    judge: Callable[[Any], Looked]


RUN_RULES: list[Rule] = []
"""Judged for each run."""
FOLDER_RULES: list[Rule] = []
"""Judged once."""


def run_rule(name: str, reason: str) -> Callable[[Callable[[Evidence], Looked]], Callable[[Evidence], Looked]]:
    def add(judge: Callable[[Evidence], Looked]) -> Callable[[Evidence], Looked]:
        RUN_RULES.append(Rule(name, reason, judge))
        return judge

    return add


def folder_rule(name: str, reason: str) -> Callable[[Callable[[Folder], Looked]], Callable[[Folder], Looked]]:
    def add(judge: Callable[[Folder], Looked]) -> Callable[[Folder], Looked]:
        FOLDER_RULES.append(Rule(name, reason, judge))
        return judge

    return add


# ---- Size and time


@run_rule("bytes", "The code and the artifact together may have 16,000,000 bytes.")
def code_and_artifact_fit(run: Evidence) -> Looked:
    limit, claimed = run.settings.limit_bytes, _claim(run).total_bytes
    if claimed is not None and claimed < 1:
        raise Broken(f"Code and artifact are said to have {claimed:,} bytes; they have at least 1.")
    if claimed is not None and claimed > limit:
        raise Broken(f"Code and artifact are said to have {claimed:,} bytes; the limit is {limit:,}.")
    try:
        artifact = run.artifact.stat().st_size
    except Unchecked as missing:
        said = "" if claimed is None else f" Code and artifact are said to have {claimed:,} bytes, within {limit:,}."
        raise Unchecked(f"{missing}{said}") from None
    if artifact > limit:
        raise Broken(f"The artifact alone has {artifact:,} bytes; the limit is {limit:,}, code included.")
    code = run.code.stat().st_size
    for what, path, bytes_ in (("artifact", run.artifact, artifact), ("script", run.code, code)):
        if bytes_ == 0:
            raise Unchecked(f"{path} is empty: there is no {what} whose bytes could be counted.")
    size = f"Artifact ({artifact:,} bytes) and code ({code:,}) have {artifact + code:,} bytes"
    if artifact + code > limit:
        raise Broken(f"{size}, {artifact + code - limit:,} more than the limit of {limit:,}.")
    return Looked(artifact + code, "bytes of artifact and code", f"{size} of {limit:,}.")


@run_rule("time", "No training step may start after the time limit; a GPU may finish the two it has been given.")
def steps_start_in_time(run: Evidence) -> Looked:
    limit, timeline = run.settings.limit_seconds, run.timeline
    for (step, seconds), (later_step, later) in pairwise(timeline.ends):
        if later < seconds:
            raise Broken(
                f"By {timeline.source}, step {later_step:,} ends at {later:,.1f} s, before step {step:,} at "
                f"{seconds:,.1f} s: what the run took in all is not known."
            )
    steps, seconds = timeline.ends[-1]
    if steps and seconds <= 0:
        raise Broken(f"By {timeline.source}, {steps:,} steps took {seconds:,.1f} s, which no step can.")
    took = f"{steps:,} steps in {seconds:,.1f} s by {timeline.source}"
    late = timeline.started_after(limit) if limit > 0 else 0
    if late > timeline.in_flight:
        allowed = f"only {timeline.in_flight} can be in flight then" if timeline.in_flight else "none may"
        raise Broken(f"{took}: {late:,} of them started after the limit of {limit:,.0f} s, and {allowed}.")
    if timeline.claimed is not None and steps < timeline.claimed:
        raise Unchecked(
            f"{timeline.source} ends at step {steps:,} of the {timeline.claimed:,} that the run is said to have taken: "
            "when the others ended is not known."
        )
    return Looked(
        steps, "training steps", f"{took}, of {limit:,.0f} s." if limit > 0 else f"{took}; there is no limit."
    )


@run_rule("scoring-time", "Scoring may take as long as training.")
def scoring_ends_in_time(run: Evidence) -> Looked:
    limit, seconds = run.settings.limit_seconds, run.claim.score_seconds
    if seconds is None:
        raise Unchecked("Nothing says how long scoring took.")
    if not 0 <= seconds < math.inf:
        raise Broken(f"Scoring is said to have taken {seconds} s; a finite number above 0 is expected.")
    if seconds == 0:
        raise Unchecked("Scoring is said to have taken 0 s: it was not timed, or nothing was scored.")
    if 0 < limit < seconds:
        raise Broken(f"Scoring took {seconds:,.1f} s; the limit is {limit:,.0f} s.")
    scored = run.claim.tokens
    if scored is None:
        return Looked(1, "scoring times", f"Scoring took {seconds:,.1f} s.")
    return Looked(scored, "scored tokens", f"Scoring took {seconds:,.1f} s.")


@run_rule("log", "The log is whole, and agrees with the report, the configuration and the artifact.")
def log_is_whole(run: Evidence) -> Looked:
    records, report, config, header = run.records, run.report, run.config, run.header
    steps = [record for record in records if record["step"] > 0]
    if [record["step"] for record in steps] != list(range(1, len(steps) + 1)) or not steps:
        raise Broken(f"The log does not have every step from 1 to {report.steps:,}, one after the other.")
    before = 0.0
    for record in steps:
        seconds, batch = number(record, "seconds", run.path), config.train.train_batch_tokens
        took = batch / max(number(record, "tokens_per_second", run.path), 1e-300)
        if abs(seconds - before - took) > 1e-6 * max(seconds, 1.0) or took <= 0:
            raise Broken(
                f"Step {record['step']:,} ends {seconds - before:.6g} s after the one before it by its seconds, and "
                f"{took:.6g} s by its tokens_per_second."
            )
        if number(record, "tokens", run.path) != record["step"] * batch:
            raise Broken(f"Step {record['step']:,} has {record['tokens']} tokens; expected {record['step'] * batch:,}.")
        before = seconds
    told = {
        "steps": (report.steps, len(steps), header.get("steps")),
        "tokens": (report.tokens, len(steps) * config.train.train_batch_tokens, header.get("tokens")),
        "seed": (report.seed, config.train.seed, header.get("seed")),
        "seconds": (report.seconds, before, before),
        "model": (header["model"], config.model.to_stored(), header["model"]),
        "artifact's bytes": (report.artifact_bytes, run.artifact.stat().st_size, report.artifact_bytes),
    }
    for what, values in told.items():
        if values[0] != values[1] or values[1] != values[2]:
            raise Broken(f"Report, log, configuration and artifact disagree about the {what}: {values}.")
    told_of = f"Every one of {len(steps):,} steps is there; report, configuration and artifact agree."
    return Looked(len(steps), "training steps", told_of)


# ---- What was trained on, and what was scored


@run_rule("order", "No token may be scored after it has been trained on.")
def nothing_scored_after_training(run: Evidence) -> Looked:
    config, data = run.config, run.data
    if not data.train:
        raise Unchecked(f"{data.path} holds no training shards that could be compared with the validation shards.")
    if "train" not in run.report.data:
        raise Unchecked("report.json does not say which shards were trained on; an older pgolf wrote it.")
    for train, val in _same_files(data.train, data.val):
        raise Broken(f"The training shard {train.name} has the content of the validation shard {val.name}.")
    method = config.eval.method
    scorer = SCORERS.get(method)
    if scorer is None:
        raise Unchecked(f"How the method {method} scores each token cannot be looked at.")
    length = min(config.eval_seq_len, _PROBE_LENGTH // 4)
    # Targets from here on change: inside a chunk, and inside what one window scores, whatever divides what.
    cut = max(length + length // 2 - 1, 1)
    text = np.random.default_rng(2).integers(0, config.model.vocab_size - 1, 3 * length + 1)
    other = np.where(np.arange(text.size) < cut, text, (text + 1) % (config.model.vocab_size - 1))
    before, after = (np.asarray(scorer(run.model, _document(ids, config), config, length)) for ids in (text, other))
    if not before.shape == after.shape == text.shape:
        raise Broken(f"By the method {method}, {text.size:,} targets have scores of the shape {before.shape}.")
    for target in _changes(before[:cut], after[:cut]):
        raise Broken(f"By the method {method}, the score of target {target} knows of the targets from {cut} on.")
    batch, spans, count = config.train.train_batch_tokens, config.train.grad_accum_steps, len(data.train)
    return Looked(
        cut if run.report.steps else 0,
        "scores with a changed text behind them, after training steps",
        f"By the method {method}, no score knows of a later target, and the {run.report.steps:,} training steps read "
        f"{run.report.steps * (batch + spans):,} tokens from the beginning of {count:,} training "
        f"shard{'s' * (count != 1)}, none of which is a validation shard.",
    )


@run_rule("coverage", "Every validation token is scored, as often as the method says.")
def every_token_scored(run: Evidence) -> Looked:
    validation, times = _declared(run), run.times
    expected = int(times.sum(dtype=np.int64))
    scored = run.claim.tokens
    if scored is None:
        scored = run.score.tokens
    if scored != expected:
        raise Broken(f"{scored:,} scores were given; the method and the data define {expected:,}.")
    left = int((times == 0).sum())
    if left > UNSCORED_SHARE * times.size:
        raise Broken(f"{left:,} of {times.size:,} validation targets are never scored, more than a dropped tail.")
    rest = f"all but the last {left:,}, which the method drops" if left else "each of them"
    seen = f"{scored:,} scores of {times.size:,} validation targets: {rest}, as {validation.declared_by} declares them."
    return Looked(scored, "scores", seen)


@run_rule("text-bytes", "Bits per byte are counted over the bytes of the text that the tokens decode to.")
def bytes_are_the_texts(run: Evidence) -> Looked:
    validation, claim = _declared(run), run.claim
    if validation.target_bytes is None or validation.byte_basis is None:
        raise Unchecked("There is no tokenizer to decode the validation tokens; give --tokenizer.")
    basis = BASES[validation.byte_basis]
    if claim.byte_basis not in (None, validation.byte_basis):
        raise Broken(
            f"The claimed bits per byte are over {BASES.get(claim.byte_basis or '', claim.byte_basis)}; the data "
            f"counts {basis}. The two cannot be compared."
        )
    if claim.val_loss is None or claim.val_bpb is None:
        raise Unchecked("Without both a loss and bits per byte, there is nothing to compare the text's bytes with.")
    if not (0 < claim.val_loss < math.inf and 0 < claim.val_bpb < math.inf):
        raise Broken(f"{claim.val_loss} nats per token and {claim.val_bpb} bits per byte: both must be above 0.")
    counted, scored = (int(each.sum(dtype=np.int64)) for each in (run.times * validation.target_bytes, run.times))
    if not counted:
        return Looked(0, "bytes of validation text", "")
    per_token = counted / scored
    implied = claim.val_loss / math.log(2) / claim.val_bpb
    slack = claim.loss_precision / claim.val_loss + claim.bpb_precision / claim.val_bpb
    slack += _BYTES_ERROR if claim.tokens is not None else _UNKNOWN_TAIL
    if slack > _COARSEST_RATIO:
        raise Unchecked(
            f"{claim.val_loss} nats per token and {claim.val_bpb} bits per byte have too few digits to be compared "
            "with the text's bytes."
        )
    if claim.bytes not in (None, counted) or abs(implied / per_token - 1) > slack:
        raise Broken(
            f"{claim.val_loss:.6f} nats per token and {claim.val_bpb:.6f} bits per byte mean {implied:.6f} bytes per "
            f"token; {basis} has {per_token:.6f} ({counted:,} bytes)."
        )
    seen = f"Every document's bytes are its text's, {basis}: {counted:,} of them, {per_token:.4f} per token."
    return Looked(counted, "bytes of validation text", seen)


@run_rule("documents", "No validation document may stand among the training documents.")
def no_document_trained_on(run: Evidence) -> Looked:
    duplicates = run.validation.duplicates
    if duplicates is None:
        if run.validation.bos_id < 0:
            raise Unchecked("Where documents begin is not known, as no BOS token is; give --tokenizer.")
        raise Unchecked(f"{run.data.path} holds no training shards to look validation documents up in.")
    if duplicates.found:
        raise Broken(
            f"{duplicates.found:,} of {duplicates.looked_up:,} validation documents also stand in the training shards."
        )
    looked = f"{duplicates.looked_up:,} validation documents were looked up among {duplicates.training_documents:,}"
    if not duplicates.complete:
        raise Unchecked(f"Only a sample, {looked} training documents, none found; the full audit looks all of them up.")
    if not duplicates.training_documents:
        return Looked(0, "training documents", "")
    seen = f"All {looked} training documents; none stands there."
    return Looked(duplicates.looked_up, "validation documents", seen)


# ---- What the artifact is


@run_rule("causality", "The prediction of a token may depend on no token behind it.")
def logits_are_causal(run: Evidence) -> Looked:
    model, vocab = run.model, run.model.config.vocab_size
    length = min(model.train_seq_len or _PROBE_LENGTH, _PROBE_LENGTH)
    rng = np.random.default_rng(0)
    stream = rng.integers(0, vocab, length + 1)
    logits, losses = _predictions(model, stream)
    compared = 0
    cuts = sorted({max(cut, 1) for cut in (length // 4, length // 2, length - 1)})
    for cut in cuts:  # tokens from here on are others
        other = stream.copy()
        other[cut:] = (other[cut:] + rng.integers(1, vocab, other.size - cut)) % vocab
        other_logits, other_losses = _predictions(model, other)
        # Position p reads the tokens up to p and predicts the one behind it.
        for what, one, two, end in (("logits", logits, other_logits, cut), ("loss", losses, other_losses, cut - 1)):
            compared += one[:end].size
            for position in _changes(one[:end], two[:end]):
                raise Broken(f"The {what} at position {position} changed when only tokens from {cut} on did.")
    seen = f"Logits and losses stayed, bit for bit, when later tokens changed (at {_listed(cuts)} of {length:,})."
    return Looked(compared, "logits and losses", seen)


@run_rule("normalisation", "The probabilities that are scored sum to one over the vocabulary.")
def probabilities_sum_to_one(run: Evidence) -> Looked:
    model, vocab = run.model, run.model.config.vocab_size
    length = min(model.train_seq_len or _SUM_LENGTH, _SUM_LENGTH)
    ids = np.random.default_rng(1).integers(0, vocab, length)
    targets = np.repeat(np.arange(vocab, dtype=np.int32)[:, None], length, axis=1)  # each token, at every position
    losses = np.asarray(model.window_losses(np.tile(ids.astype(np.int32), (vocab, 1)), targets, 0), dtype=np.float64)
    if losses.shape != targets.shape:
        raise Broken(f"{vocab:,} sequences of {length} targets have losses of the shape {losses.shape}.")
    sums = np.exp(-losses).sum(axis=0)
    worst = int(np.argmax(np.abs(sums - 1)))
    if not abs(sums[worst] - 1) <= _SUM_ERROR:  # NaN is none
        raise Broken(f"The probabilities of all {vocab:,} tokens at position {worst} sum to {sums[worst]:.6f}.")
    seen = f"At {length} positions the probabilities of {vocab:,} tokens sum to 1 within {abs(sums[worst] - 1):.1e}."
    return Looked(losses.size, "probabilities", seen)


@run_rule("reload", "The artifact, loaded anew, scores what is claimed.")
def artifact_scores_again(run: Evidence) -> Looked:
    claim, score = run.claim, run.score
    if None not in (claim.byte_basis, score.byte_basis) and claim.byte_basis != score.byte_basis:
        raise Unchecked(
            f"Bits per byte are claimed over {claim.byte_basis} bytes and measured over {score.byte_basis} bytes, "
            "which cannot be compared."
        )
    for what, claimed, found in (("loss", claim.val_loss, score.loss), ("bits per byte", claim.val_bpb, score.bpb)):
        if claimed is None or found is None:
            raise Unchecked(f"The {what} cannot be compared: {claimed} is claimed, {found} was measured.")
        if not abs(found - claimed) <= SAME_SCORE:
            raise Broken(f"The artifact scores {found:.6f} {what}; {claimed:.6f} is claimed.")
    seen = f"The artifact scores {score.bpb:.6f} bits per byte again, {claim.val_bpb:.6f} is claimed."
    return Looked(score.tokens, "scored tokens", seen)


# ---- The folder


@folder_rule("files", "A submission has a README, submission.json, a training log and a script that can run.")
def files_are_there(folder: Folder) -> Looked:
    values = _submission(folder)
    readme = folder.path / README
    if not readme.is_file() or not readme.read_text(encoding="utf-8", errors="replace").strip():
        raise Broken(f"There is no {README}, or it is empty.")
    for names in (("name", "run_name"), ("author", "github_id"), SCORE_NAMES):
        if all(values.get(name) is None or not str(values[name]).strip() for name in names):
            raise Broken(f"submission.json has no {' or '.join(names)}.")
    if not folder.logs:
        raise Broken("There is no training log (*.log, train*.txt).")
    for log in map(TextLog.read, folder.logs):
        if not log.characters:
            raise Broken(f"{log.path.name} is empty; a training log is expected.")
    try:
        script = folder.script
        statements = ast.parse(script.read_bytes(), filename=script.name).body
    except Unchecked as missing:
        raise Broken(str(missing)) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two of parentheses without end
        raise Broken(f"{script.name} is not a Python script: {error or type(error).__name__}.") from None
    if not statements:
        raise Broken(f"{script.name} holds no statement: there is nothing in it that can run.")
    there = [README, "submission.json", *(log.name for log in folder.logs), script.name]
    return Looked(len(there), "files", f"{_listed(there)} are there.")


@folder_rule("seeds", "The runs differ in their seeds, in nothing else, and no run stands there twice.")
def runs_differ_in_seed_alone(folder: Folder) -> Looked:
    runs = [run for run in folder.runs if isinstance(run, RunFolder)]
    if not runs:
        raise Unchecked("Without pgolf's run folders, it cannot be seen in what the runs differ.")
    for what, of in (("seed", lambda run: run.report.seed), ("artifact", lambda run: file_sha256(run.artifact))):
        seen: dict[Any, str] = {}
        for run in runs:
            value = of(run)
            if value in seen:
                raise Broken(f"{seen[value]} and {run.name} have the same {what}: they are not two runs.")
            seen[value] = run.name
    first, *others = ((run.name, dict(_flat(run.config.to_dict()))) for run in runs)
    for name, values in others:
        for key, value in values.items():
            if key not in FREE_KEYS and value != first[1][key]:
                raise Broken(f"{first[0]} has {key} = {first[1][key]!r} and {name} {value!r}.")
    if not others:
        alone = f"One run, with seed {runs[0].report.seed}: there is no other that it could be the same as."
        return Looked(1, "runs", alone)
    return Looked(len(runs), "runs", f"Seeds {_listed([run.report.seed for run in runs])}, one configuration.")


@folder_rule("claims", "submission.json says what the logs and the runs say.")
def submission_says_what_runs_say(folder: Folder) -> Looked:
    return submission_agrees(_submission(folder), folder.runs, folder.logs)


# ---- What several rules need


def _document(ids: np.ndarray[Any, Any], config: Config) -> np.ndarray[Any, Any]:
    """BOS and behind it these tokens, numbered 0 … V − 2 so that none of them is another BOS."""
    bos = max(config.model.bos_id, 0)  # any token will do where the run knew none
    return np.concatenate([[bos], ids + (ids >= bos)])


def _by_windows(model: Model, tokens: np.ndarray[Any, Any], config: Config, length: int) -> np.ndarray[Any, Any]:
    """The loss of every target of a short stream, (N,), in windows of ``length``."""
    method, stride = config.eval.method, min(config.eval.eval_stride, max(length // 2, 1))
    plan = plan_windows(method, tokens.size - 1, length, stride, "exact")
    losses = np.zeros(tokens.size - 1)
    for start, size, first in zip(plan.start, plan.length, plan.first_scored, strict=True):
        ids, targets = (tokens[None, at : at + size].astype(np.int32) for at in (start, start + 1))
        losses[start + first : start + size] = np.asarray(model.window_losses(ids, targets, int(first)))[0]
    return losses


def _by_training(model: Model, tokens: np.ndarray[Any, Any], config: Config, length: int) -> np.ndarray[Any, Any]:
    """The loss of every target of a short stream, (N,), by test-time training in chunks of ``length``."""
    from pgolf.scoring.audit import document_starts
    from pgolf.scoring.ttt import Documents, Settings, score

    documents = Documents.of(document_starts(tokens, max(config.model.bos_id, 0)), tokens.size - 1)
    settings = Settings(config.eval.ttt_lora_rank, config.eval.ttt_lora_lr, length, 2 * length, 1)
    return score(model, tokens, documents, settings)[0]  # type: ignore[arg-type]


SCORERS: dict[str, Callable[[Model, np.ndarray[Any, Any], Config, int], np.ndarray[Any, Any]]] = {
    "standard": _by_windows,
    "sliding": _by_windows,
    "ttt": _by_training,
}
"""How a method scores a short stream token by token, (N + 1,) to (N,): the function of a model, the stream, the run's
configuration, and a length that takes the place of its windows', or of its chunks'."""


def _declared(run: Evidence) -> ValidationData:
    """The validation data, where somebody declares what it holds."""
    if run.validation.declared_by is None:
        raise Unchecked(
            f"Nobody declares what {run.data.path} holds: it has no manifest.json, and the run recorded other shards. "
            "Whether the validation split is whole is not known."
        )
    return run.validation


def _claim(run: Evidence) -> Claim:
    """What is claimed; nothing, where no file claims anything."""
    try:
        return run.claim
    except Unchecked:
        return Claim()


def _submission(folder: Folder) -> dict[str, Any]:
    if folder.submission is None:
        raise Unchecked("These are runs, and no submission yet.")
    return folder.submission


def _predictions(model: Model, stream: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Logits (T, V) and losses (T,) of T + 1 tokens; raises ValueError where the model gives others."""
    ids, targets = stream[None, :-1].astype(np.int32), stream[None, 1:].astype(np.int32)
    logits, losses = np.asarray(model.logits(ids)), np.asarray(model.window_losses(ids, targets, 0))
    if logits.shape != (*ids.shape, model.config.vocab_size) or losses.shape != ids.shape:
        raise ValueError(
            f"A sequence of {ids.size:,} tokens has logits of the shape {logits.shape}, losses {losses.shape}."
        )
    return logits[0], losses[0]


def _changes(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> list[int]:
    """Where two arrays differ, by their first axis; NaN differs from everything."""
    differs = one != two
    positions: list[int] = np.flatnonzero(differs.any(axis=1) if differs.ndim > 1 else differs).tolist()
    return positions


def _same_files(ones: tuple[Path, ...], others: tuple[Path, ...]) -> Iterator[tuple[Path, Path]]:
    """Pairs of equal content; only files of equal size are read."""
    sizes = {path.stat().st_size for path in others}
    candidates = [path for path in ones if path.stat().st_size in sizes]
    wanted = {path.stat().st_size for path in candidates}
    digests = {file_sha256(path): path for path in others if path.stat().st_size in wanted}
    for path in candidates:
        other = digests.get(file_sha256(path))
        if other is not None:
            yield path, other


def _flat(tables: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for table, keys in tables.items():
        for key, value in keys.items():
            yield f"{table}.{key}", value


def _listed(values: list[Any]) -> str:
    *rest, last = map(str, values)
    return f"{', '.join(rest)} and {last}" if rest else last
