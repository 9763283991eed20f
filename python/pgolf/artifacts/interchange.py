"""Models moving in and out: any file with weights is read, state dicts are written (docs/formats.md).

Which format a file has is told by its first bytes, never by its name; what is written, by the name's ending. Tensors
have the names of docs/spec.md §1, which are the public scripts': nothing is renamed or transposed on the way.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgolf.artifacts import artifact
from pgolf.artifacts.artifact import ExportReport, check_shapes, decode_tensors, export_with, read_artifact
from pgolf.artifacts.bundle import Tensors, is_compressed, read_bundle
from pgolf.artifacts.container import MAGIC, MAX_CONTENT_BYTES, MAX_HEADER_BYTES, EncodedTensor, unpack
from pgolf.artifacts.quantize import Float32Array
from pgolf.artifacts.torch_file import write_torch
from pgolf.common.errors import FormatError
from pgolf.common.files import atomic_write
from pgolf.common.types import StrPath
from pgolf.config import Config, ExportConfig, ModelConfig, recipes
from pgolf.model import GPT, FloatArray, as_array
from pgolf.runs import checkpoint
from pgolf.runs.run_folder import weights_file

Kind = Literal["artifact", "checkpoint", "torch", "safetensors", "bundle"]
Settings = str | Path | Config | ModelConfig | None

_ZIP_MAGIC = b"PK\x03\x04"
_CHECKPOINT_ENTRY = b"header.npy"  # the first in the archive
_ZIP_NAME = slice(30, 30 + len(_CHECKPOINT_ENTRY))  # where a zip file has its first entry's name
_PICKLE = b"\x80"  # how a pickle that is in no zip file begins
STATE_DICT_ENDINGS = (".pt", ".safetensors")
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)+")  # around the whole model
_COMPILED_PART = re.compile(r"(?<=\.)_orig_mod\.")
_FLOATS: dict[str, np.dtype[np.floating[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
}


def load(path: StrPath, device: str | None = None, dtype: str | None = None, config: Settings = None) -> GPT:
    """The model in a file or a run folder, ready to score.

    Artifacts, checkpoints and the .safetensors files of `save_state_dict` say everything about their model. Of any
    other file, a state dict (.pt, .safetensors) or a quantised bundle (.ptz) of the public scripts, the shapes tell
    the sizes; what no shape tells (softcap, RoPE, BOS) comes from ``config``.

    Args:
        path: the file; its first bytes tell its format. Of a run folder, its artifact, else its newest checkpoint.
        device: as for GPT; None: the best there is.
        dtype: as for GPT; None: bfloat16 on GPUs, float32 on CPUs.
        config: a recipe's name, the path of a .toml file, a Config or a ModelConfig; None: base, which has the values
            that all public scripts have. Weights that such a script trained want ``rope_tables = "bf16"``.

    Returns:
        A GPT with the file's weights. Its ``train_seq_len`` is the file's, else that of ``config`` where it has one;
        its ``provenance`` an artifact's or a checkpoint's.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no weights.
        FormatError: the file is damaged or hostile, or its tensors are not those of a model of docs/spec.md §1.
        ValueError: an unknown recipe, device or dtype.
        DeviceError: the device cannot be used.
        ModuleNotFoundError: the format needs PyTorch or safetensors, which is not installed.
    """
    path = weights_file(path)
    kind = kind_of_weights(path)
    if kind == "artifact":
        return artifact.load(path, device, dtype)
    if kind == "checkpoint":
        return checkpoint.load_model(Path(path), device=device, dtype=dtype)
    contents = read_contents(Path(path), kind)
    arrays = decode_tensors(path, contents.tensors)
    model_config, train_seq_len = contents.model, contents.train_seq_len
    if model_config is None:
        rest, train_seq_len = _settings(config)
        try:
            model_config = infer_config({name: w.shape for name, w in arrays.items()}, rest)
        except ValueError as error:
            raise FormatError(f"{path}: {error}") from None
    try:
        check_shapes(model_config, arrays)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    model = GPT(model_config, seed=None, device=device, dtype=dtype)
    model.load_state_dict(arrays)
    model.train_seq_len = train_seq_len
    return model


def load_state_dict(path: StrPath) -> dict[str, Float32Array]:
    """The weights in a file by their names: of any model, whether pgolf has such a one or not.

    Args:
        path: an artifact, a checkpoint (averaged, where it holds an average), a .pt, .safetensors or .ptz file, or a
            run folder, as for `load`.

    Returns:
        Owned float32 arrays; quantised ones are dequantised, 16-bit ones widened.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no weights.
        FormatError: the file is damaged or hostile; a tensor is no floating-point one or holds NaN or infinity.
        ModuleNotFoundError: the format needs PyTorch or safetensors, which is not installed.
    """
    path = weights_file(path)
    kind = kind_of_weights(path)
    if kind == "artifact":
        return read_artifact(path)[1]
    if kind == "checkpoint":
        arrays, values = checkpoint.load(Path(path))
        return checkpoint.final_weights(Path(path), arrays, values)
    return decode_tensors(path, read_contents(Path(path), kind).tensors)


def save_state_dict(model: GPT | Mapping[str, Any], path: StrPath) -> None:
    """Write weights, unquantised, as a state dict of the public scripts: ``model.load_state_dict(torch.load(path))``.

    The same bytes for the same weights and package versions. A .safetensors file also says, in its metadata, which
    model it is, so that `load` needs no configuration.

    Args:
        model: a GPT, whose weights are written as they are, or floating-point arrays by name.
        path: the file, replaced where it exists; its ending says the format: .pt or .safetensors.

    Raises:
        ValueError: another ending.
        FileNotFoundError: there is no folder for the file.
        TypeError: an array that is no floating-point one.
        ModuleNotFoundError: .pt needs PyTorch, .safetensors the package safetensors.
    """
    target = Path(path)
    if target.suffix not in STATE_DICT_ENDINGS:
        raise ValueError(
            f"{target}: the name of a state dict ends with {' or '.join(STATE_DICT_ENDINGS)}; "
            "pgolf.export writes quantised .pgolf and .ptz files."
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} for the state dict {target.name}.")
    state = model.state_dict() if isinstance(model, GPT) else {name: as_array(w, name) for name, w in model.items()}
    for name, w in state.items():
        if w.dtype.kind != "f":
            raise TypeError(f"{name} has dtype {w.dtype}; a floating-point array was expected.")
    if target.suffix == ".pt":
        data = write_torch(state)
    else:
        metadata = {"format": "pt"}
        if isinstance(model, GPT):
            said = {"model": model.config.to_stored(), "train_seq_len": model.train_seq_len}
            metadata["pgolf"] = json.dumps(said, sort_keys=True)
        plain = {name: np.array(w, order="C") for name, w in state.items()}
        data = _safetensors(target, ".numpy").save(plain, metadata=metadata)
    with atomic_write(target) as file:
        file.write(data)


def convert(source: StrPath, target: StrPath, config: Settings = None, code: StrPath | None = None) -> ExportReport:
    """Put a quantised model into the other container, every integer and scale as it is.

    Args:
        source: an artifact, a run folder with one, or a .ptz bundle.
        target: the file, replaced where it exists; a .ptz bundle where its name ends so, else an artifact.
        config: for a bundle, as for `load`.
        code: the script whose bytes count beside the file's.

    Returns:
        The report of an export, against 16,000,000 bytes; its errors are 0, for nothing is rounded.

    Raises: as `load` and `pgolf.export`; ValueError where the source is not quantised.
    """
    source = weights_file(source)
    kind = kind_of_weights(source)
    if kind == "artifact":
        stored = unpack(source)[1]
    elif kind in ("torch", "bundle") and (contents := read_contents(Path(source), kind)).quantised:
        stored = contents.tensors
    else:
        raise ValueError(f"{source}: its weights are not quantised; pgolf.export quantises the weights of a model.")
    model = load(source, device="cpu", config=config)
    return export_with(model, target, ExportConfig(), code, stored)


def kind_of_weights(path: StrPath) -> Kind:
    """Which kind of file with weights this is, by its first bytes; what is none of the others counts as an artifact.

    Raises FileNotFoundError where there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path} with weights.")
    with open(path, "rb") as file:
        start = file.read(_ZIP_NAME.stop)
    if start.startswith(_ZIP_MAGIC):
        return "checkpoint" if start[_ZIP_NAME] == _CHECKPOINT_ENTRY else "torch"
    # The length of a safetensors header comes before its brace; it may begin as a zlib stream does.
    if not start.startswith(MAGIC) and start[5:9] == b"\0\0\0{":
        return "safetensors"
    if is_compressed(start):
        return "bundle"
    return "torch" if start.startswith(_PICKLE) else "artifact"


@dataclass(frozen=True)
class Contents:
    """A file's tensors as they are stored, whether they are quantised, and what it says of its model; None: nothing."""

    tensors: Tensors
    quantised: bool = False
    model: ModelConfig | None = None
    train_seq_len: int | None = None


def read_contents(path: Path, kind: Kind) -> Contents:
    """What a torch file, a bundle or a safetensors file holds; raises as `load_state_dict`."""
    contents = _read_safetensors(path) if kind == "safetensors" else Contents(*read_bundle(path))
    return replace(contents, tensors=_unwrapped(path, contents.tensors))


def infer_config(shapes: Mapping[str, tuple[int, ...]], rest: ModelConfig) -> ModelConfig:
    """The configuration of a state dict: sizes by its shapes, everything else as in ``rest``.

    V and d come from tok_emb, L from the blocks' numbers, H from q_gain, K from c_k, F from fc, n and e from the bigram
    table, and the head is tied where there is no lm_head.

    Raises ValueError where a tensor that tells a size is missing, its shape is impossible, or the sizes do not go
    together.
    """

    def shape(name: str, rank: int, tells: str) -> tuple[int, ...]:
        if name not in shapes:
            names = ", ".join(list(shapes)[:8])
            raise ValueError(f"it has no tensor {name}, which tells {tells} (docs/spec.md §1); it has {names} …")
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(f"the tensor {name} has the shape {shapes[name]}; {rank} dimensions were expected.")
        return shapes[name]

    vocab, dim = shape("tok_emb.weight", 2, "vocabulary and width")
    (heads,) = shape("blocks.0.attn.q_gain", 1, "the number of heads")
    key_width = shape("blocks.0.attn.c_k.weight", 2, "the number of key/value heads")[0]
    hidden = shape("blocks.0.mlp.fc.weight", 2, "the MLP's width")[0]
    blocks = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    if key_width * heads % dim:
        raise ValueError(
            f"blocks.0.attn.c_k.weight has {key_width} rows; "
            f"a multiple of the heads' width, {dim} / {heads}, was expected."
        )
    found: dict[str, Any] = {
        "vocab_size": vocab,
        "model_dim": dim,
        "num_layers": len(blocks),
        "num_heads": heads,
        "num_kv_heads": key_width * heads // dim,
        "mlp_mult": _multiple(hidden, dim, rest.mlp_mult),
        "tie_embeddings": "lm_head.weight" not in shapes,
        "bigram_vocab_size": 0,
    }
    if "bigram.embed.weight" in shapes:
        found["bigram_vocab_size"], found["bigram_dim"] = shape("bigram.embed.weight", 2, "the bigram table")
    config = replace(rest, **found)
    config.validate()
    return config


# ---- Reading


def _unwrapped(path: Path, tensors: Tensors) -> Tensors:
    """Without what PyTorch's wrappers for compilation and several GPUs put before all names, or inside some.

    Raises FormatError where some names have a prefix and some have none, and where two names become one.
    """
    wrapped = [name for name in tensors if _WRAPPERS.match(name)]
    if wrapped and len(wrapped) < len(tensors):
        bare = next(name for name in tensors if not _WRAPPERS.match(name))
        prefix = _WRAPPERS.match(wrapped[0])
        assert prefix is not None
        raise FormatError(
            f"{path}: its tensor {wrapped[0]!r} has the prefix {prefix[0]!r}, its tensor {bare!r} has none; a prefix "
            "of all names or of none was expected."
        )
    unwrapped: Tensors = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = _COMPILED_PART.sub("", _WRAPPERS.sub("", name, count=1) if wrapped else name)
        if short in unwrapped:
            raise FormatError(
                f"{path}: its tensors {origins[short]!r} and {name!r} are both {short!r} without PyTorch's prefixes; "
                "one of them was expected."
            )
        unwrapped[short], origins[short] = tensor, name
    return unwrapped


def _read_safetensors(path: Path) -> Contents:
    library = _safetensors(path)
    size = path.stat().st_size
    if size > MAX_CONTENT_BYTES:
        raise FormatError(f"{path}: the file has {size:,} bytes; at most {MAX_CONTENT_BYTES:,} were expected.")
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: the header claims {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} were expected."
        )
    try:
        entries = library.deserialize(data)
    except library.SafetensorError as error:
        raise FormatError(f"{path}: this is not a whole safetensors file ({error}).") from None
    tensors = {name: EncodedTensor(*_safetensor(path, name, **entry)) for name, entry in entries}
    said = json.loads(data[8 : 8 + header_bytes]).get("__metadata__", {}).get("pgolf")
    if said is None:
        return Contents(tensors)
    try:
        values = json.loads(said)
        model, length = ModelConfig.from_dict(values["model"]), values["train_seq_len"]
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"train_seq_len is {length!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{path}: its metadata 'pgolf' is not what save_state_dict writes ({error}).") from None
    return Contents(tensors, model=model, train_seq_len=length)


def _safetensor(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> tuple[str, FloatArray]:
    """Encoding and values of an entry."""
    if dtype == "BF16":  # the upper half of a float32
        halves = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return "fp32", halves.view(np.float32).reshape(shape)
    if dtype not in _FLOATS:
        raise FormatError(f"{path}: the tensor {name!r} is of {dtype}; F64, F32, F16 or BF16 was expected.")
    values = np.frombuffer(data, _FLOATS[dtype]).reshape(shape)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes an infinity, refused where it is decoded
        return ("fp16", values) if dtype == "F16" else ("fp32", values.astype(np.float32))


def _safetensors(path: Path, module: str = "") -> Any:
    try:
        return importlib.import_module(f"safetensors{module}")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: this format needs the package safetensors; install it with: pip install 'pgolf[safetensors]'"
        ) from None


def _settings(config: Settings) -> tuple[ModelConfig, int | None]:
    """The [model] table of what `load` was given, and the training length that goes with it."""
    if config is None:
        return ModelConfig(), None
    if isinstance(config, ModelConfig):
        return config, None
    if not isinstance(config, Config):
        known = isinstance(config, str) and (config in recipes() or not config.endswith(".toml"))
        config = Config.from_recipe(str(config)) if known else Config.from_toml(config)
    return config.model, config.train.train_seq_len


def _multiple(hidden: int, dim: int, given: float) -> float:
    """mlp_mult with floor(mlp_mult · dim) = hidden: the given one, where it is such a one."""
    if math.floor(given * dim) == hidden:
        return given
    nearest = hidden / dim
    return nearest if math.floor(nearest * dim) == hidden else math.nextafter(nearest, math.inf)
