"""The budget, solved: how finely each matrix is stored, so that the artifact fits and the loss rises least.

Quantising tensor t to the step Δ adds noise of energy E ~ Δ² and costs bytes B ~ −log Δ. The loss it adds is close to
a·E, and the losses of tensors add up. So: a is measured for every tensor, by the loss with its quantisation error added
and subtracted (the mean has no first-order term); E and B are taken from real encodings at a few steps; and
minimising Σ a·E + λ·Σ B is a choice for each tensor alone. λ is what makes the sizes fit. What comes out is encoded
and measured as a whole: sizes are exact, and the loss is that of text the sensitivities have not seen.

Steps are those of ``rms:k`` (docs/spec.md §4). Pruning and clips are not searched: with entropy-coded integers a larger
step takes fewer bytes for the same error than either (docs/performance.md has the numbers).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgolf.artifacts.artifact import (
    ExportReport,
    decode_tensor,
    encode_state,
    encode_tensor,
    export_with,
    finite_state,
    header_of,
    script_bytes,
)
from pgolf.artifacts.container import encode_stream, encode_streams, pack
from pgolf.artifacts.quantize import Float32Array, encode_plan
from pgolf.common.threads import on_threads
from pgolf.common.types import StrPath
from pgolf.config import Config, ExportConfig
from pgolf.model import GPT
from pgolf.scoring.windows import check_positive

if TYPE_CHECKING:
    from pgolf.data.tokenizer import Tokenizer

Progress = Callable[[str, int, int], object]
"""Called as progress(what, done, total)."""

ANCHORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""The k of rms:k at which sizes and errors are taken; between them, bytes and log error are linear in log k."""
PROBE = 2.0
"""The k whose errors are added and subtracted: large enough to be seen, small enough to be quadratic."""
FRONTIER = (0.8, 0.9, 0.95, 0.98, 1.0, 1.05)
"""Sizes that are solved beside the one that is asked for, as shares of what the recipe's policy takes."""
_GRID = np.linspace(0, math.log2(ANCHORS[-1]), 161)  # of log2 k, 32 to the octave
_BATCH_TOKENS = 65_536


@dataclass(frozen=True)
class Point:
    """A policy, its size and what it costs.

    bytes: of the artifact. loss: nats per token; bpb: bits per byte of the same tokens, None without a tokenizer.
    predicted: the loss that the sensitivities promise; None for the recipe's policy, whose steps they do not know.
    """

    name: str
    bytes: int
    loss: float
    bpb: float | None
    predicted: float | None


@dataclass(frozen=True)
class FitReport:
    """What ``fit`` found.

    export: the artifact that was written. policy: its (tensor, encoding) pairs, then the recipe's. margin: bytes asked
    to be left. exact_loss, exact_bpb: of the weights before quantisation. recipe: the recipe's own policy and pruning.
    chosen: what was written. frontier: other sizes, ascending, named by their share of the recipe's bytes.
    sensitivity: nats for each squared error, by tensor. tokens: on which losses were measured; as many others gave the
    sensitivities. seconds: wall time.
    """

    export: ExportReport
    policy: tuple[tuple[str, str], ...]
    margin: int
    exact_loss: float
    exact_bpb: float | None
    recipe: Point
    chosen: Point
    frontier: tuple[Point, ...]
    sensitivity: dict[str, float]
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Every field, with JSON's types."""
        return {**asdict(self), "export": self.export.to_dict()}


def fit(
    model: GPT,
    path: StrPath,
    data: StrPath | npt.ArrayLike,
    tokenizer: StrPath | Tokenizer | None = None,
    *,
    limit_bytes: int = 16_000_000,
    code: StrPath | None = None,
    margin: int = 1000,
    policy: str | ExportConfig = "base",
    tokens: int = 16_384,
    seq_len: int | None = None,
    progress: Progress | None = None,
) -> FitReport:
    """Write the artifact whose loss is least among those of at most ``limit_bytes`` with the code.

    Takes about 2·(matrices) + 10 evaluations of ``tokens`` tokens, and three minutes of one core for 25 million
    weights. The model is not changed; it computes on its own device.

    Args:
        model: the model, which may be on any device.
        path: the artifact, replaced where it exists.
        data: a folder with ``*_train_*.bin`` shards, one shard, or a 1-D integer array: text that is not validation.
        tokenizer: a SentencePiece ``.model`` or a Tokenizer; None takes the data folder's. Without one, bpb is None.
        limit_bytes: for artifact and code together.
        code: the script whose bytes count.
        margin: bytes to leave below the limit.
        policy: the recipe (or its ``[export]`` table) that the result is compared with, and whose small and control
            tensors keep their encodings.
        tokens: how many give the sensitivities, and as many others the losses.
        seq_len: of the windows; None is the model's training length.

    Raises:
        ValueError: impossible arguments, too little data, or a limit below what the coarsest encodings take.
        TypeError: tokens or seq_len is not an integer.
        FileNotFoundError, FormatError, NonFiniteError: as ``export`` and ``evaluate``.
    """
    began = time.perf_counter()
    show = progress or (lambda what, done, total: None)
    settings = Config.from_recipe(policy).export if isinstance(policy, str) else policy
    settings.validate()
    if margin < 0:
        raise ValueError(f"margin is {margin}; expected at least 0.")
    length = model.train_seq_len if seq_len is None else seq_len
    if length is None:
        raise ValueError("seq_len is None and the model has no training length to take; give seq_len.")
    check_positive(tokens=tokens, seq_len=length)
    code_bytes = 0 if code is None else script_bytes(code)
    room = limit_bytes - code_bytes - margin
    if room < 1:
        raise ValueError(
            f"limit_bytes is {limit_bytes:,}; the code takes {code_bytes:,} and the margin {margin:,}, and nothing is "
            "left for the artifact."
        )
    state = finite_state(model)
    free = _free(state, settings)
    if not free:
        raise ValueError("No matrix is left to the policy: every tensor is small or a control tensor.")
    calibration, check = _read_texts(data, tokenizer, model, tokens, length)
    loss = _Loss(GPT(model.config, seed=None, device=model.device, dtype=model.dtype), state)
    exact = loss.of(check)
    header = header_of(model)
    _, recipe_tensors = encode_state(state, settings)
    streams = encode_streams(recipe_tensors)
    recipe_bytes = len(pack(header, recipe_tensors, streams))
    sensitivity = _sensitivities(loss, calibration, state, free, show)
    solver = _Solver(_curves(state, free, show), sensitivity, recipe_bytes - sum(len(streams[name]) for name in free))

    def measure(name: str, plan: Mapping[str, str]) -> Point:
        """A whole policy, encoded and decoded; the recipe's own where the plan is empty."""
        show("measure the frontier", len(points), len(FRONTIER) + 2)
        tensors = recipe_tensors | {key: encode_tensor(state[key], encoding) for key, encoding in plan.items()}
        decoded = {key: decode_tensor(tensor) for key, tensor in tensors.items()}
        added = sum(sensitivity[key] * _squared_error(decoded[key], state[key]) for key in free)
        found = loss.of(check, decoded)
        size = len(pack(header, tensors)) if plan else recipe_bytes
        points.append(Point(name, size, found, check.bpb(found), exact + added if plan else None))
        return points[-1]

    def size_of(plan: Mapping[str, str]) -> int:
        return len(pack(header, recipe_tensors | {key: encode_tensor(state[key], plan[key]) for key in plan}))

    points: list[Point] = []
    plan = _largest_that_fits(solver, room, size_of)
    recipe, chosen = measure("recipe", {}), measure("chosen", plan)
    for share in FRONTIER:
        measure(f"{share:.0%}", solver.solve(share * recipe_bytes))
    show("measure the frontier", len(points), len(points))
    pairs = [*plan.items(), *settings.policy]
    written = replace(settings, policy=pairs, prune=0.0, limit_bytes=limit_bytes)
    return FitReport(
        export=export_with(model, path, written, code),
        policy=tuple(pairs),
        margin=margin,
        exact_loss=exact,
        exact_bpb=check.bpb(exact),
        recipe=recipe,
        chosen=chosen,
        frontier=tuple(sorted(points[2:], key=lambda point: point.bytes)),
        sensitivity=sensitivity,
        tokens=check.targets.size,
        seconds=time.perf_counter() - began,
    )


# ---- Text and losses


@dataclass(frozen=True)
class _Text:
    """Windows of text: ids and targets (W, T); bytes, that the targets stand for, None without a tokenizer."""

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    bytes: int | None

    def bpb(self, loss: float) -> float | None:
        return None if self.bytes is None else loss * self.targets.size / math.log(2) / self.bytes


def _read_texts(
    data: StrPath | npt.ArrayLike, tokenizer: StrPath | Tokenizer | None, model: GPT, tokens: int, length: int
) -> tuple[_Text, _Text]:
    """Two texts of the same size, whose windows alternate and are spread over the data."""
    from pgolf.data.folder import find_data, load_tokens
    from pgolf.data.shards import ShardSet
    from pgolf.data.tokenizer import Tokenizer

    vocab_size = model.config.vocab_size
    read: Callable[[int, int], npt.NDArray[Any]]
    if isinstance(data, (str, os.PathLike)) and os.path.isdir(data):
        folder = find_data(data, splits=("train",))
        tokenizer = folder.tokenizer if tokenizer is None else tokenizer
        stream = ShardSet(folder.train, vocab_size)
        size, read = len(stream), stream.read
    else:
        array = load_tokens(data, split="train", vocab_size=vocab_size)
        size, read = array.size, lambda start, count: array[start : start + count]
    windows = 2 * -(-tokens // length)
    if size < windows * (length + 1):
        raise ValueError(
            f"The data has {size:,} tokens; {windows:,} windows of {length + 1:,} are needed. "
            "Ask for fewer tokens or a smaller seq_len."
        )
    starts = [index * (size - length - 1) // (windows - 1) for index in range(windows)]
    rows = np.stack([read(start, length + 1) for start in starts]).astype(np.int32)
    opened = Tokenizer(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer

    def text(part: npt.NDArray[np.int32]) -> _Text:
        ids, targets = np.ascontiguousarray(part[:, :-1]), np.ascontiguousarray(part[:, 1:])
        return _Text(ids, targets, int(opened.target_bytes(ids, targets).sum()) if opened is not None else None)

    return text(rows[::2]), text(rows[1::2])


class _Loss:
    """The mean loss of a text by the weights of a state, some of which are replaced."""

    def __init__(self, model: GPT, state: Mapping[str, Float32Array]) -> None:
        self._model, self._state = model, dict(state)

    def of(self, text: _Text, replaced: Mapping[str, npt.NDArray[Any]] | None = None) -> float:
        self._model.load_state_dict({**self._state, **(replaced or {})})
        step = max(1, _BATCH_TOKENS // text.ids.shape[1])
        parts = [
            self._model.token_losses(text.ids[at : at + step], text.targets[at : at + step]).astype(np.float64)
            for at in range(0, len(text.ids), step)
        ]
        return float(np.concatenate(parts).mean())


# ---- Sizes, errors, sensitivities


def _free(state: Mapping[str, Float32Array], settings: ExportConfig) -> list[str]:
    """The matrices whose encoding a policy decides: neither small nor a control tensor."""
    shapes = {name: w.shape for name, w in state.items() if w.ndim == 2}
    plan = encode_plan(shapes, [("*", "int8")], settings.small_numel, settings.control_patterns)
    return [name for name, encoding in plan.items() if encoding == "int8"]


def _rms(steps: float) -> str:
    return f"rms:{steps:.3g}"


def _encoded_size(w: Float32Array, encoding: str) -> tuple[float, float]:
    """(bytes, squared error) of one encoding; both infinite, so that nothing chooses it, where fp16 does not hold w."""
    if encoding == "fp16" and np.abs(w).max() > np.finfo(np.float16).max:
        return math.inf, math.inf
    tensor = encode_tensor(w, encoding)
    return len(encode_stream(tensor)), _squared_error(decode_tensor(tensor), w)


def _squared_error(found: Float32Array, w: Float32Array) -> float:
    return float(np.sum((found.astype(np.float64) - w) ** 2))


def _curves(
    state: Mapping[str, Float32Array], free: Sequence[str], show: Progress
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """By tensor, bytes and squared error on the grid of log2 k, and last those of fp16."""
    work = [(name, encoding) for name in free for encoding in (*map(_rms, ANCHORS), "fp16")]
    show("encode at a few steps", 0, 1)
    found = on_threads(lambda pair: _encoded_size(state[pair[0]], pair[1]), work)
    show("encode at a few steps", 1, 1)
    curves = {}
    anchors = np.log2(ANCHORS)
    for index, name in enumerate(free):
        sizes = np.array(found[index * (len(ANCHORS) + 1) : (index + 1) * (len(ANCHORS) + 1)], np.float64)
        errors = np.maximum(sizes[:-1, 1], 1e-30)
        curves[name] = (
            np.append(np.interp(_GRID, anchors, sizes[:-1, 0]), sizes[-1, 0]),
            np.append(np.exp(np.interp(_GRID, anchors, np.log(errors))), sizes[-1, 1]),
        )
    return curves


def _sensitivities(
    loss: _Loss, text: _Text, state: Mapping[str, Float32Array], free: Sequence[str], show: Progress
) -> dict[str, float]:
    """Nats for each squared error of each tensor, at least a twentieth of the median loss of a probe."""
    at_rest = loss.of(text)
    rises, energies = [], []
    for index, name in enumerate(free):
        show("measure sensitivities", index, len(free))
        w = state[name]
        error = decode_tensor(encode_tensor(w, _rms(PROBE))) - w
        rises.append((loss.of(text, {name: w + error}) + loss.of(text, {name: w - error})) / 2 - at_rest)
        energies.append(float(np.sum(error.astype(np.float64) ** 2)))
    show("measure sensitivities", len(free), len(free))
    least = max(float(np.median(np.maximum(rises, 0))) / 20, 1e-9)
    return {
        name: max(rise, least) / max(energy, 1e-30) for name, rise, energy in zip(free, rises, energies, strict=True)
    }


class _Solver:
    """The plan of least predicted loss for a number of bytes."""

    def __init__(
        self,
        curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
        sensitivity: Mapping[str, float],
        overhead: int,
    ) -> None:
        self._names = list(curves)
        self._bytes = np.stack([curves[name][0] for name in self._names])
        self._losses = np.stack([sensitivity[name] * curves[name][1] for name in self._names])
        self._overhead = overhead

    def solve(self, total: float) -> dict[str, str]:
        """The encoding of every free matrix, for an artifact of about `total` bytes, the finest or the coarsest."""
        low, high = -60.0, 20.0  # log2 of nats per byte: fp16 for all, and the coarsest for all
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._size(self._choose(middle)) <= total else (middle, high)
        return {
            name: "fp16" if at == _GRID.size else _rms(2 ** _GRID[at])
            for name, at in zip(self._names, self._choose(high), strict=True)
        }

    def _choose(self, log_price: float) -> npt.NDArray[np.intp]:
        choice: npt.NDArray[np.intp] = np.argmin(self._losses + 2.0**log_price * self._bytes, axis=1)
        return choice

    def _size(self, choice: npt.NDArray[np.intp]) -> float:
        return self._overhead + float(self._bytes[np.arange(len(choice)), choice].sum())


def _largest_that_fits(solver: _Solver, budget: int, size_of: Callable[[Mapping[str, str]], int]) -> dict[str, str]:
    """The plan for `budget` bytes, whose real size is at most that.

    Raises ValueError where the coarsest encodings take more.
    """
    best: dict[str, str] = {}
    target, best_size, size = float(budget), -1, 0
    for _ in range(6):
        plan = solver.solve(target)
        size = size_of(plan)
        if best_size < size <= budget:
            best, best_size = plan, size
        elif size <= budget:
            break
        target += 0.9 * (budget - size) if size <= budget else 1.05 * (budget - size)
    if not best:
        raise ValueError(f"The coarsest encodings take {size:,} bytes; {budget:,} are left for the artifact.")
    return best
