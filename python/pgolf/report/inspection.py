"""What is in a run folder or a file with weights. Files are only read: nothing in them is ever executed."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pgolf.common.errors import FormatError
from pgolf.common.threads import get_num_threads
from pgolf.common.types import Progress, StrPath
from pgolf.config import Config, ExportConfig, ModelConfig
from pgolf.data.inspection import DataReport, inspect_data
from pgolf.data.shard_file import MAGIC as SHARD_MAGIC
from pgolf.runs.records import Curves, read_records, read_report

if TYPE_CHECKING:
    from pgolf.artifacts.container import EncodedTensor
    from pgolf.runs.records import Report

Kind = Literal["run", "artifact", "checkpoint", "weights", "data"]
_CHECKPOINT_NUMBERS = ("version", "step", "position", "snapshots")


def kind_of(path: Path) -> Kind:
    """What lies at a path, by its files or its first bytes; a shard is "data" too, "weights" the community's files.

    Raises FileNotFoundError where nothing is there, FormatError where it is nothing of pgolf's.
    """
    from pgolf.artifacts.container import MAGIC as ARTIFACT_MAGIC
    from pgolf.artifacts.interchange import kind_of_weights

    if path.is_dir():
        if (path / "config.toml").is_file():
            return "run"
        if any(path.glob("*_train_*.bin")) or any(path.glob("*_val_*.bin")):
            return "data"
        raise FormatError(
            f"{path}: this folder holds neither a run's config.toml nor *_train_*.bin or *_val_*.bin shards."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file or folder; a run folder, an artifact, a checkpoint or data is expected."
        )
    with path.open("rb") as file:
        start = file.read(8)
    if start == ARTIFACT_MAGIC:
        return "artifact"
    if start.startswith(SHARD_MAGIC.to_bytes(4, "little")):
        return "data"
    kind = kind_of_weights(path)
    if kind == "artifact":  # what it calls everything that it does not know
        raise FormatError(
            f"{path}: the file begins with {start!r}; an artifact begins with {ARTIFACT_MAGIC!r}, a checkpoint with "
            f"b'PK', a token shard with the number {SHARD_MAGIC}."
        )
    return "checkpoint" if kind == "checkpoint" else "weights"


def inspect(
    path: StrPath, progress: Progress | None = None
) -> ArtifactSummary | WeightsSummary | CheckpointSummary | RunSummary | DataReport:
    """What a file or folder of pgolf's holds; nothing in it is executed.

    Args:
        path: a run folder, an artifact, a checkpoint, a file of weights, or shards: one, or a folder of them.
        progress: called as progress(what, done, total) while an artifact is looked at.

    Raises:
        FileNotFoundError: there is nothing of that name.
        FormatError: it is damaged, or nothing that pgolf reads.
    """
    found = Path(path)
    kind = kind_of(found)
    if kind == "data":
        return inspect_data(found)
    if kind == "artifact":
        return inspect_artifact(found, progress)
    if kind == "weights":
        return inspect_weights(found)
    return inspect_run(found) if kind == "run" else inspect_checkpoint(found)


# ---- Artifacts


@dataclass(frozen=True)
class TensorSummary:
    """A tensor as it is stored.

    raw_bytes: its payload as plain values. compressed_bytes: its stream; in an artifact of version 1, that payload
    alone as a zstd frame of level 22. entropy: of its integers, each for itself, in bits per weight: what a coder
    without context could reach; None for fp16 and fp32.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    raw_bytes: int
    compressed_bytes: int
    entropy: float | None

    @property
    def weights(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    @property
    def stored_bits(self) -> float:
        """Compressed bits per weight, scales included."""
        return 8 * self.compressed_bytes / max(self.weights, 1)


@dataclass(frozen=True)
class ArtifactSummary:
    """An artifact; sizes in bytes.

    steps, tokens, seed: of the training; None for a model that no Trainer trained. pgolf, zstd: the versions that wrote
    it. limit_bytes: of the challenge, for artifact and code together. version: of the container's format. scoring: how
    its run scores it. tokenizer, validation, byte_basis: what the score is of (docs/spec.md §4); None: not recorded.
    """

    path: Path
    bytes: int
    limit_bytes: int
    version: int
    model: ModelConfig
    train_seq_len: int | None
    steps: int | None
    tokens: int | None
    seed: int | None
    pgolf: str
    zstd: str
    tensors: tuple[TensorSummary, ...]
    scoring: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    byte_basis: str | None = None

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def shared_bytes(self) -> int:
        """Preamble, header and checksums; of version 1, less what compressing the tensors together saves."""
        return self.bytes - sum(tensor.compressed_bytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Every field and property, with JSON's types."""
        tensors = [{**asdict(t), "weights": t.weights, "stored_bits": t.stored_bits} for t in self.tensors]
        derived = {"weights": self.weights, "shared_bytes": self.shared_bytes}
        return {**asdict(self), **derived, "path": str(self.path), "model": self.model.to_dict(), "tensors": tensors}


def inspect_artifact(path: Path, progress: Progress | None = None) -> ArtifactSummary:
    """Read an artifact and encode each tensor again, which takes seconds for one of 16 MB.

    Raises FileNotFoundError where there is no such file, FormatError where it is damaged or does not load.
    """
    from pgolf.artifacts.artifact import load
    from pgolf.artifacts.container import unpack, version_of

    model = load(path, device="cpu")  # what cannot be loaded is no artifact
    header, encoded = unpack(path)
    version = version_of(path)
    report = progress or (lambda what, done, total: None)
    tensors = []
    # Both release the GIL; zstd's level 22 takes tens of megabytes a thread.
    with ThreadPoolExecutor(min(get_num_threads(), 8)) as pool:
        for tensor in pool.map(partial(_summarise, version), encoded, encoded.values()):
            tensors.append(tensor)
            report("compress each tensor", len(tensors), len(encoded))
    return ArtifactSummary(
        path=path,
        bytes=path.stat().st_size,
        limit_bytes=ExportConfig().limit_bytes,
        version=version,
        model=model.config,
        **{name: header[name] for name in ("train_seq_len", "steps", "tokens", "seed", "pgolf", "zstd")},
        tensors=tuple(tensors),
        scoring=header.get("scoring"),
        tokenizer=header.get("tokenizer"),
        validation=header.get("validation"),
        byte_basis=header.get("byte_basis"),
    )


def entropy_bits(values: npt.NDArray[np.int8]) -> float:
    """The order-0 entropy of integers (any shape, int8), in bits per integer; 0 where there is none."""
    counts = np.bincount(values.ravel().astype(np.int64) + 128, minlength=256)
    shares = counts[counts > 0] / max(values.size, 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0


def _summarise(version: int, name: str, tensor: EncodedTensor) -> TensorSummary:
    from pgolf.artifacts.container import compress, encode_stream

    payload = tensor.payload()
    return TensorSummary(
        name=name,
        encoding=tensor.encoding,
        shape=tensor.values.shape,
        raw_bytes=len(payload),
        compressed_bytes=len(compress(payload) if version == 1 else encode_stream(tensor)),
        entropy=None if tensor.scale is None else entropy_bits(tensor.values),
    )


# ---- The community's files


@dataclass(frozen=True)
class WeightsSummary:
    """A state dict or a bundle (docs/formats.md): (name, encoding, shape) of every tensor, bfloat16 read as fp32.

    quantised: whether it is a bundle. model: by its own word or its shapes; None, with the reason why, where pgolf has
    no such model.
    """

    path: Path
    bytes: int
    format: str
    quantised: bool
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    model: ModelConfig | None
    why_not: str | None

    def to_dict(self) -> dict[str, Any]:
        """Every field, with JSON's types."""
        model = None if self.model is None else self.model.to_dict()
        return {**asdict(self), "path": str(self.path), "tensors": list(self.tensors), "model": model}


def inspect_weights(path: Path) -> WeightsSummary:
    """Read a .pt, .safetensors or .ptz file, whatever model's it is.

    Raises FileNotFoundError where there is no such file, FormatError where it is damaged or hostile,
    ModuleNotFoundError where its format's package is missing.
    """
    from pgolf.artifacts.artifact import check_shapes
    from pgolf.artifacts.interchange import infer_config, kind_of_weights, read_contents

    kind = kind_of_weights(path)
    contents = read_contents(path, kind)
    arrays = {name: tensor.values for name, tensor in contents.tensors.items()}
    model, why_not = contents.model, None
    try:
        model = model or infer_config({name: w.shape for name, w in arrays.items()}, ModelConfig())
        check_shapes(model, arrays)
    except ValueError as error:
        model, why_not = None, str(error)
    return WeightsSummary(
        path=path,
        bytes=path.stat().st_size,
        format=kind,
        quantised=contents.quantised,
        tensors=tuple((name, tensor.encoding, tensor.values.shape) for name, tensor in contents.tensors.items()),
        model=model,
        why_not=why_not,
    )


# ---- Checkpoints


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint: where its run stood, and what it holds for going on.

    seconds: training time. position: in the training data, in tokens. snapshots: weights in the running mean.
    config: {table: {key: value}} of the run. data_tokens, data_shards: of its training data.
    groups: (what, tensors, bytes) of the arrays: weights, moments, averages.
    """

    path: Path
    bytes: int
    version: int
    step: int
    seconds: float
    position: int
    snapshots: int
    dtype: str
    model: ModelConfig
    config: dict[str, dict[str, Any]]
    data_tokens: int
    data_shards: int
    groups: tuple[tuple[str, int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Every field, with JSON's types."""
        return {**asdict(self), "path": str(self.path), "model": self.model.to_dict(), "groups": list(self.groups)}


def inspect_checkpoint(path: Path) -> CheckpointSummary:
    """Read a checkpoint.

    Raises FileNotFoundError where there is none, FormatError for one that is torn, foreign or of another version.
    """
    from pgolf.runs import checkpoint

    arrays, values = checkpoint.load(path)
    sizes: dict[str, list[int]] = {}
    for name, array in arrays.items():
        sizes.setdefault(name.partition(".")[0], []).append(array.nbytes)
    try:
        numbers = {name: values[name] for name in _CHECKPOINT_NUMBERS}
        numbers |= {f"data_{name}": values["data"][name] for name in ("tokens", "shards")}
        for name, value in numbers.items():
            if type(value) is not int:
                raise ValueError(f"{name} is {value!r}")
        return CheckpointSummary(
            path=path,
            bytes=path.stat().st_size,
            seconds=_finite(values["seconds"]),
            dtype=str(values["dtype"]),
            model=ModelConfig.from_dict(values["config"]["model"]),
            config=values["config"],
            groups=tuple((what, len(nbytes), sum(nbytes)) for what, nbytes in sizes.items()),
            **numbers,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: the checkpoint's values are not those that pgolf writes ({error}).") from None


def checkpoint_step(path: Path) -> int:
    """The finished steps that a run's checkpoint has in its name, step-NNNNNNNN.npz."""
    return int(path.stem.rpartition("-")[2])


# ---- Run folders


@dataclass(frozen=True)
class RunSummary:
    """A run folder.

    step, tokens, seconds: of the last record in the log; 0 where there is none. share_of_limit, memory_mib, device: of
    the same, None where it does not tell. curves: None before the first loss.
    checkpoint: the newest, if there is one. report: of the finished run; None before. artifact_bytes: None before there
    is one.
    """

    path: Path
    config: Config
    step: int
    tokens: int
    seconds: float
    share_of_limit: float | None
    memory_mib: float | None
    device: str | None
    curves: Curves | None
    checkpoint: Path | None
    report: Report | None
    artifact_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Every field, with JSON's types; of the curves the last losses."""
        return {
            "path": str(self.path),
            "config": self.config.to_dict(),
            "finished": self.report is not None,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "share_of_limit": self.share_of_limit,
            "memory_mib": self.memory_mib,
            "device": self.device,
            **({} if self.curves is None else self.curves.last_losses),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "report": None if self.report is None else self.report.to_dict(),
            "artifact_bytes": self.artifact_bytes,
        }


def inspect_run(path: Path) -> RunSummary:
    """Read a run folder, whether its run is finished, at work or was stopped.

    Raises FileNotFoundError where it holds no config.toml, FormatError for a file in it that is not what it should be.
    """
    from pgolf.runs.checkpoint import newest

    if not (path / "config.toml").is_file():
        raise FileNotFoundError(f"{path}: this folder is not a run folder, as it holds no config.toml.")
    log, artifact = path / "log.jsonl", path / "model.pgolf"
    records = read_records(log) if log.is_file() else []
    last = records[-1] if records else {"step": 0}
    try:
        tokens, seconds = int(last.get("tokens", 0)), _finite(last.get("seconds", 0))
        share, memory = (
            None if last.get(name) is None else _finite(last[name]) for name in ("share_of_limit", "memory_mib")
        )
    except (TypeError, ValueError, OverflowError):
        names = "tokens, seconds, share_of_limit or memory_mib"
        raise FormatError(f"{log}: in the last record {names} is not a number.") from None
    device = last.get("device")
    try:
        curves = Curves.of(records)
    except ValueError:  # there is no loss yet
        curves = None
    return RunSummary(
        path=path,
        config=Config.from_toml(path / "config.toml"),
        step=int(last["step"]),
        tokens=tokens,
        seconds=seconds,
        share_of_limit=share,
        memory_mib=memory,
        device=device if isinstance(device, str) else None,
        curves=curves,
        checkpoint=newest(path / "checkpoint"),
        report=read_report(path / "report.json"),
        artifact_bytes=artifact.stat().st_size if artifact.is_file() else None,
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number
