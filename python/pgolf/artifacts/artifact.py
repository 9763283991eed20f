"""From a model to an artifact and back: export, size report, load (docs/spec.md §4)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from pgolf import __version__
from pgolf.artifacts.bundle import BUNDLE_ENDING, pack_bundle
from pgolf.artifacts.container import EncodedTensor, encode_streams, pack, unpack
from pgolf.artifacts.quantize import Float32Array, dequantize_rows, encode_plan, prune_weights, quantize_rows
from pgolf.common.errors import FormatError, NonFiniteError
from pgolf.common.files import atomic_write
from pgolf.config import Config, ExportConfig, ModelConfig
from pgolf.config.encoding import Encoding
from pgolf.data.declared import ARTIFACT, Record
from pgolf.model import GPT, parameter_shapes

_PROVENANCE = ("steps", "tokens", "seed")
_HEADER = {"model", "train_seq_len", *_PROVENANCE, "pgolf", "zstd"}
_OPTIONAL = ("scoring", "tokenizer", "validation", "byte_basis", "requires")
"""What a header may hold beside: absent ones are null, and unknown ones are ignored unless `requires` lists them."""


@dataclass(frozen=True)
class TensorReport:
    """How one tensor was stored.

    encoding: the policy's. raw_bytes: its payload as plain values. compressed_bytes: its stream in the artifact.
    relative_error: ‖loaded − w‖ / ‖w‖, 0 where both are 0; max_error: max |loaded − w|; w is the weight before pruning.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    raw_bytes: int
    compressed_bytes: int
    relative_error: float
    max_error: float


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, against the limit; sizes in bytes.

    bytes: the artifact's size. code_bytes: the script's, None where none was named.
    shared_bytes: the artifact less the tensors' compressed_bytes: preamble, header and checksums.
    """

    path: str
    bytes: int
    code_bytes: int | None
    limit_bytes: int
    tensors: tuple[TensorReport, ...]
    pgolf: str
    zstd: str

    @property
    def total_bytes(self) -> int | None:
        """Artifact and code together; None where the code's size is unknown."""
        return None if self.code_bytes is None else self.bytes + self.code_bytes

    @property
    def margin(self) -> int:
        """Bytes left below the limit; where the code's size is unknown, the bytes left for the code."""
        return self.limit_bytes - self.bytes - (self.code_bytes or 0)

    @property
    def fits(self) -> bool:
        """Whether what is known of artifact and code stays within the limit."""
        return self.margin >= 0

    @property
    def shared_bytes(self) -> int:
        return self.bytes - sum(tensor.compressed_bytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Every field and property, with JSON's types."""
        derived = {name: getattr(self, name) for name in ("total_bytes", "margin", "fits", "shared_bytes")}
        tensors = [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors]
        return {**asdict(self), **derived, "tensors": tensors}


def export(
    model: GPT,
    path: str | os.PathLike[str],
    policy: str | Sequence[tuple[str, str]] = "base",
    prune: float | None = None,
    small_numel: int | None = None,
    code: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Write a model as an artifact: pruned, quantised, compressed, and never half (docs/spec.md §4).

    The model is not changed. Equal weights, header values and zstd version give equal bytes. A path that ends with .ptz
    becomes a bundle of the public scripts in place of an artifact (docs/formats.md); that needs PyTorch.

    Args:
        model: the model; its configuration, training length and provenance go into the header.
        path: the file, replaced where it exists.
        policy: a recipe's name, or ordered (pattern, encoding) pairs.
        prune: the share of every large matrix that becomes zero; None: the named recipe's, 0 for a list of pairs.
        small_numel: tensors of at most so many elements are fp16; None: the named recipe's, 8,192 for a list of pairs.
        code: the script whose bytes count beside the artifact's.

    Returns:
        The sizes, against the recipe's limit (16,000,000 bytes for a list of pairs), and each tensor's errors.

    Raises:
        ValueError: an impossible policy, prune or small_numel, or a tensor that its encoding cannot hold; it is named.
        FileNotFoundError: there is no such script, or no folder for the artifact.
        NonFiniteError: a tensor holds NaN or infinity; it is named.
        ModuleNotFoundError: a .ptz file is to be written, and PyTorch is not installed.
    """
    return export_with(model, path, _settings(policy, prune, small_numel), code)


def export_with(
    model: GPT,
    path: str | os.PathLike[str],
    settings: ExportConfig,
    code: str | os.PathLike[str] | None = None,
    stored: Mapping[str, EncodedTensor] | None = None,
) -> ExportReport:
    """:func:`export` with every setting of the ``[export]`` table, as a run has them.

    stored: the model's tensors, encoded before: written as they are, whatever policy and pruning the settings name.
    """
    settings.validate()
    code_bytes = None if code is None else script_bytes(code)
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} for the artifact {target.name}.")
    state = finite_state(model)
    if stored is None:
        plan, encoded = encode_state(state, settings)
    else:
        encoded = {name: stored[name] for name in state}
        plan = {name: tensor.encoding for name, tensor in encoded.items()}
    header, streams = header_of(model), encode_streams(encoded)
    data = pack_bundle(encoded) if target.suffix == BUNDLE_ENDING else pack(header, encoded, streams)
    tensors = tuple(_report(name, w, plan[name], encoded[name], len(streams[name])) for name, w in state.items())
    with atomic_write(target) as file:
        file.write(data)
    return ExportReport(str(target), len(data), code_bytes, settings.limit_bytes, tensors, __version__, header["zstd"])


def load(path: str | os.PathLike[str], device: str | None = None, dtype: str | None = None) -> GPT:
    """The model in an artifact, ready to score.

    Args:
        path: a file that :func:`export` wrote.
        device: as for GPT; None: the best there is.
        dtype: as for GPT; None: bfloat16 on GPUs, float32 on CPUs.

    Returns:
        A GPT with the artifact's weights, its ``train_seq_len`` and its ``provenance``.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is damaged, or its tensors are not those of its own model configuration.
        DeviceError: the device cannot be used.
    """
    header, arrays = read_artifact(path)
    try:
        config = ModelConfig.from_dict(header["model"])
        check_shapes(config, arrays)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    model = GPT(config, seed=None, device=device, dtype=dtype)
    model.load_state_dict(arrays)
    model.train_seq_len = header["train_seq_len"]
    provenance = {key: header[key] for key in _PROVENANCE}
    model.provenance = None if provenance["steps"] is None else provenance
    model.scoring = header["scoring"]
    model.record = record_of(path, header)
    return model


def record_of(path: str | os.PathLike[str], header: Mapping[str, Any]) -> Record | None:
    """What an artifact's header records of data and tokenizer; None where it is of a version that recorded nothing."""
    record = Record.of(ARTIFACT, str(path), header)
    return record if record.tokenizer or record.validation else None


def read_artifact(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Float32Array]]:
    """An artifact's header and its tensors, dequantised to float32, without building the model.

    The header's keys: model (the whole ``[model]`` table), train_seq_len, steps, tokens and seed (None for a model
    that no Trainer trained), pgolf and zstd (versions); and, None where the file does not have them: scoring (how its
    run scores it), tokenizer, validation and byte_basis (a ``pgolf.data.declared.Record``), requires. Keys of later
    versions are left out, unless requires lists one: such a file is refused.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is damaged, its header is not an artifact's, or a tensor holds NaN or infinity.
    """
    header, tensors = unpack(path)
    if not header.keys() >= _HEADER:
        raise FormatError(f"{path}: the header has the keys {_listed(header)}; {_listed(_HEADER)} were expected.")
    _check_requires(path, header.get("requires"))
    header = {name: header.get(name) for name in (*sorted(_HEADER), *_OPTIONAL)}
    provenance = [header[key] for key in _PROVENANCE]
    if provenance != [None] * len(provenance) and not all(_is_count(value) for value in provenance):
        raise FormatError(
            f"{path}: steps, tokens and seed are {provenance}; "
            "three non-negative integers or three nulls were expected."
        )
    length = header["train_seq_len"]
    if length is not None and not (_is_count(length) and length > 0):
        raise FormatError(f"{path}: train_seq_len is {length!r}; a positive integer or null was expected.")
    _check_scoring(path, header["scoring"])
    record_of(path, header)
    return header, decode_tensors(path, tensors)


def _check_requires(path: str | os.PathLike[str], requires: Any) -> None:
    """Raises FormatError where a header requires its readers to know a key that this version does not."""
    if requires is None:
        return
    if not isinstance(requires, list) or not all(isinstance(name, str) for name in requires):
        raise FormatError(f"{path}: requires is {requires!r:.100}; a list of the header's keys was expected.")
    unknown = [name for name in requires if name not in _HEADER and name not in _OPTIONAL]
    if unknown:
        raise FormatError(
            f"{path}: the artifact can only be read by a version that knows {_listed(unknown)}; this is pgolf "
            f"{__version__}. Install a newer one."
        )


def _check_scoring(path: str | os.PathLike[str], scoring: Any) -> None:
    """Raises FormatError for a header's scoring that no evaluation could follow."""
    if scoring is None:
        return
    kinds: dict[str, type | tuple[type, ...]] = {"method": str, "tail": str, "ttt_lora_lr": (int, float)}
    if not isinstance(scoring, dict) or "method" not in scoring:
        raise FormatError(f"{path}: scoring is {scoring!r:.100}; an object with a method, or null, was expected.")
    for name, value in scoring.items():
        if isinstance(value, bool) or not isinstance(value, kinds.get(name, int)):
            raise FormatError(f"{path}: scoring's {name} is {value!r:.100}; another type was expected.")


def decode_tensors(path: str | os.PathLike[str], tensors: Mapping[str, EncodedTensor]) -> dict[str, Float32Array]:
    """What the tensors of a file stand for; raises FormatError, with the file and the tensor, for NaN or infinity."""
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = decode_tensor(tensor)
        except ValueError as error:
            raise FormatError(f"{path}: the tensor {name!r}: {error}") from None
    return arrays


def finite_state(model: GPT) -> dict[str, Float32Array]:
    """A model's weights as float32; raises NonFiniteError, naming the tensor, where they are not finite."""
    with np.errstate(over="ignore"):  # a float64 weight beyond float32 becomes an infinity, refused below
        state = {name: w.astype(np.float32) for name, w in model.state_dict().items()}
    for name, w in state.items():
        if not np.isfinite(w).all():
            raise NonFiniteError(f"The tensor {name} holds NaN or infinity; only finite weights can be exported.")
    return state


def header_of(model: GPT) -> dict[str, Any]:
    """An artifact's header, less its tensors."""
    provenance = model.provenance or dict.fromkeys(_PROVENANCE)
    record: Record | None = getattr(model, "record", None)  # a stand-in for a GPT need not have one
    optional = {"scoring": getattr(model, "scoring", None), **({} if record is None else record.to_dict())}
    return {
        "model": model.config.to_stored(),
        "train_seq_len": model.train_seq_len,
        **{key: provenance[key] for key in _PROVENANCE},
        **{name: value for name, value in optional.items() if value is not None},
        "pgolf": __version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
    }


def encode_state(
    state: Mapping[str, Float32Array], settings: ExportConfig
) -> tuple[dict[str, str], dict[str, EncodedTensor]]:
    """Prune and encode a whole state dict of finite float32 arrays as ``settings`` say, in the order of ``state``.

    Returns each tensor's encoding as the policy says it, and the tensors.

    Raises ValueError for a tensor that its encoding cannot hold, and for what ``encode_plan`` refuses.
    """
    shapes = {name: w.shape for name, w in state.items()}
    plan = encode_plan(shapes, settings.policy, settings.small_numel, settings.control_patterns)
    encoded = {}
    for name, w in state.items():
        try:
            encoded[name] = encode_tensor(prune_weights(w, settings.prune), plan[name])
        except ValueError as error:
            raise ValueError(f"The tensor {name} cannot be stored as {plan[name]}: {error}") from None
    return plan, encoded


def encode_tensor(w: Float32Array, encoding: str) -> EncodedTensor:
    """A finite float32 array as a policy's ``encoding`` stores it; the integer encodings take matrices."""
    asked = Encoding.parse(encoding)
    if asked.is_integer:
        return EncodedTensor(asked.stored, *quantize_rows(w, **_row_quantizer(asked)))
    if encoding == "fp32":
        return EncodedTensor(encoding, w)
    with np.errstate(over="ignore"):
        halves = w.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"the largest magnitude is {np.abs(w).max():g}, and fp16 ends at 65504.")
    return EncodedTensor(encoding, halves)


def _row_quantizer(encoding: Encoding) -> dict[str, Any]:
    """The arguments of quantize_rows."""
    if encoding.steps is not None:
        return {"bits": 8, "method": "rms", "steps": encoding.steps}
    if encoding.stored == "int8":
        return {"bits": 8, "method": "quantile_floor"}
    return {"bits": int(encoding.stored.removeprefix("int"))}


def decode_tensor(tensor: EncodedTensor) -> Float32Array:
    """The float32 array that a stored tensor stands for; raises ValueError where it would hold NaN or infinity."""
    if tensor.scale is not None:
        return dequantize_rows(tensor.values, tensor.scale)
    if not np.isfinite(tensor.values).all():
        raise ValueError("it holds NaN or infinity; finite values were expected.")
    return tensor.values.astype(np.float32)


def _settings(policy: str | Sequence[tuple[str, str]], prune: float | None, small_numel: int | None) -> ExportConfig:
    if isinstance(policy, str):
        settings = Config.from_recipe(policy).export
    else:
        settings = ExportConfig(policy=list(policy), prune=0.0, small_numel=8192)
    if prune is not None:
        settings.prune = prune
    if small_numel is not None:
        settings.small_numel = small_numel
    return settings


def script_bytes(code: str | os.PathLike[str]) -> int:
    """The size of a script; raises FileNotFoundError where there is none."""
    script = Path(code)
    if not script.is_file():
        raise FileNotFoundError(f"There is no script {script} whose bytes could be counted.")
    return script.stat().st_size


def _report(name: str, w: Float32Array, encoding: str, tensor: EncodedTensor, compressed_bytes: int) -> TensorReport:
    wanted = w.astype(np.float64)
    error = decode_tensor(tensor) - wanted
    error_norm = float(np.linalg.norm(error))
    return TensorReport(
        name=name,
        encoding=encoding,
        shape=w.shape,
        raw_bytes=len(tensor.payload()),
        compressed_bytes=compressed_bytes,
        relative_error=error_norm / float(np.linalg.norm(wanted)) if error_norm else 0.0,
        max_error=float(np.abs(error).max(initial=0.0)),
    )


def _listed(names: Iterable[str]) -> str:
    text = ", ".join(sorted(names))
    return text if len(text) <= 500 else f"{text[:500]} …"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def check_shapes(config: ModelConfig, arrays: Mapping[str, Float32Array]) -> None:
    """Raises ValueError unless the tensors are those of the configuration; nothing of the model's size is made."""
    # A layer has tensors of its own: more layers than tensors need no list of what is missing.
    if config.num_layers > len(arrays):
        raise ValueError(f"the model has {config.num_layers:,} layers, but the file only {len(arrays):,} tensors.")
    expected = parameter_shapes(config)
    for word, names in (("lacks", expected.keys() - arrays.keys()), ("has", arrays.keys() - expected.keys())):
        if names:
            raise ValueError(f"the file {word} {_listed(names)}, against its model configuration.")
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"the tensor {name} has the shape {arrays[name].shape}; its model configuration expects {shape}."
            )
