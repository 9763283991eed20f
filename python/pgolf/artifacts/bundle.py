"""The public scripts' quantised bundles, .ptz: a torch file of integers, scales and how they are meant, compressed.

docs/formats.md describes them. They hold what an artifact holds, tensor by tensor, so that integers and scales pass
from one to the other as they are.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import zstandard

from pgolf.artifacts.container import MAX_CONTENT_BYTES, EncodedTensor, compress
from pgolf.artifacts.torch_file import read_torch, write_torch
from pgolf.common.errors import FormatError
from pgolf.config.encoding import ENCODINGS

BUNDLE_ENDING = ".ptz"
"""A file whose name ends so is written as a bundle."""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

STATE_KEYS = ("state_dict", "model_state_dict", "model")
"""Under which training scripts keep a model's state beside their optimizer's and their step."""

_MAX_WINDOW_BYTES = 1 << 27  # level 22's
_CHUNK_BYTES = 1 << 20
_CLEAN_INT8 = "int8_clean_per_row_v1"
Tensors = dict[str, EncodedTensor]


def pack_bundle(tensors: Mapping[str, EncodedTensor]) -> bytes:
    """The bytes of a .ptz file, equal for equal tensors and equal versions of zstandard and PyTorch.

    fp16 and fp32 tensors are "passthrough" and "passthrough_ctrl", the two words that every script knows.

    Raises:
        ValueError: more than 1 GiB.
        ModuleNotFoundError: PyTorch is not installed.
    """
    weights: dict[str, npt.NDArray[Any]] = {}
    meanings: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.scale is None:
            weights[name] = tensor.values
            meanings[name] = "passthrough" if tensor.encoding == "fp16" else "passthrough_ctrl"
        else:
            weights[f"{name}.q"], weights[f"{name}.scale"] = tensor.values, tensor.scale
            # A pickle tells equal texts apart that are two objects; interned ones make equal bytes.
            meanings[name] = {"type": sys.intern(tensor.encoding)}
    content = write_torch({"w": weights, "m": meanings})
    if len(content) > MAX_CONTENT_BYTES:
        raise ValueError(f"The bundle takes {len(content):,} bytes; at most {MAX_CONTENT_BYTES:,} were expected.")
    return compress(content)


def read_bundle(path: Path) -> tuple[Tensors, bool]:
    """The tensors of a torch file, compressed or not, and whether they have been quantised.

    A file holds one of: a state dict; a dictionary with one under a key of STATE_KEYS; ``{"w", "m"}``, the bundle of
    the 10-layer scripts; or the first scripts' ``int8_clean_per_row_v1``. Tensors of both halves of a bundle come in
    the order of ``m``.

    Returns:
        float16 values as fp16, wider ones as fp32, integers with one fp16 scale a row as they are. What is quantised in
        another way (one scale for the tensor) is dequantised, fp32.

    Raises:
        FormatError: a damaged or hostile file, or one that holds something else; the message names it.
        ModuleNotFoundError: PyTorch is not installed.
    """
    name = str(path)
    with path.open("rb") as file:
        compressed = is_compressed(file.read(len(ZSTD_MAGIC)))
        file.seek(0)
        value = read_torch(_decompressed(file, name) if compressed else file, name)
    if not isinstance(value, dict):
        _fail(name, f"it holds a {type(value).__name__}; a dictionary of tensors was expected")
    if value.keys() >= {"w", "m"} and isinstance(value["w"], dict) and isinstance(value["m"], dict):
        return _of_bundle(name, value["w"], value["m"]), True
    if "__quant_format__" in value:
        return _of_clean_int8(name, value), True
    return {str(key): _as_stored(name, key, item) for key, item in _state_dict(name, value).items()}, False


def is_compressed(start: bytes) -> bool:
    """Whether a file that begins so is a zstd frame or a zlib stream."""
    if start.startswith(ZSTD_MAGIC):
        return True
    return len(start) >= 2 and start[0] & 15 == 8 and start[0] >> 4 <= 7 and int.from_bytes(start[:2], "big") % 31 == 0


def _decompressed(file: BinaryIO, name: str) -> BinaryIO:
    content = io.BytesIO()
    pieces = _zstd_pieces if file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC else _zlib_pieces
    file.seek(0)
    try:
        for piece in pieces(file):
            if content.tell() + len(piece) > MAX_CONTENT_BYTES:
                _fail(name, f"it decompresses to more than {MAX_CONTENT_BYTES:,} bytes, the most that is read")
            content.write(piece)
    except (zstandard.ZstdError, zlib.error, EOFError) as error:
        _fail(name, f"it is damaged after {content.tell():,} decompressed bytes ({error})")
    content.seek(0)
    return content


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    with decoder.stream_reader(file, read_across_frames=False, closefd=False) as reader:
        while piece := reader.read(_CHUNK_BYTES):
            yield piece


def _zlib_pieces(file: BinaryIO) -> Iterator[bytes]:
    decoder = zlib.decompressobj()
    rest = b""
    while not decoder.eof:
        rest = rest or file.read(_CHUNK_BYTES)
        if not rest:
            raise EOFError("the file is truncated")
        yield decoder.decompress(rest, _CHUNK_BYTES)
        rest = decoder.unconsumed_tail


def _of_bundle(name: str, weights: dict[str, Any], meanings: dict[str, Any]) -> Tensors:
    tensors: Tensors = {}
    unused = set(weights)
    for key, meaning in meanings.items():
        plain = isinstance(meaning, str) and meaning.startswith("passthrough")
        parts = [key] if plain else [f"{key}.q", f"{key}.scale"]
        if any(part not in weights for part in parts):
            _fail(name, f'its "m" says that {key} is {meaning!r}, but its "w" has no {" and ".join(parts)}')
        unused.difference_update(parts)
        if plain:
            tensors[key] = _as_stored(name, key, weights[key])
        else:
            encoding = meaning.get("type") if isinstance(meaning, dict) else None
            tensors[key] = _quantised(name, key, weights[parts[0]], weights[parts[1]], encoding)
    if unused:
        _fail(name, f'its "m" does not say what {", ".join(sorted(map(str, unused)))} of "w" means')
    return tensors


def _of_clean_int8(name: str, value: dict[str, Any]) -> Tensors:
    parts = [value.get(key) for key in ("quantized", "scales", "passthrough")]
    if value["__quant_format__"] != _CLEAN_INT8 or not all(isinstance(part, dict) for part in parts):
        _fail(name, f"its __quant_format__ is {value['__quant_format__']!r}; {_CLEAN_INT8!r}, whole, was expected")
    quantised, scales, plain = (dict(part or {}) for part in parts)
    if quantised.keys() != scales.keys():
        _fail(name, "its quantized tensors and its scales have different names")
    tensors = {key: _quantised(name, key, q, scales[key], "int8") for key, q in quantised.items()}
    return {**tensors, **{key: _as_stored(name, key, item) for key, item in plain.items()}}


def _state_dict(name: str, value: dict[Any, Any]) -> dict[Any, Any]:
    """The state dict in a dictionary: under a key of STATE_KEYS, else the dictionary itself."""
    inner = {key: _state_dict(name, value[key]) for key in STATE_KEYS if isinstance(value.get(key), dict)}
    found = [key for key, state in inner.items() if any(isinstance(item, np.ndarray) for item in state.values())]
    if len(found) > 1:
        _fail(name, f"it holds tensors under {' and '.join(map(repr, found))}; a state dict under one key was expected")
    return inner[found[0]] if found else value


def _as_stored(name: str, key: Any, value: Any) -> EncodedTensor:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = f"tensor of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        known = f" (a state dict may stand under {', '.join(map(repr, STATE_KEYS))})" if isinstance(value, dict) else ""
        _fail(name, f"{key!r} is a {kind}; a floating-point tensor was expected{known}")
    if value.dtype == np.float16:
        return EncodedTensor("fp16", value)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes an infinity, refused where it is decoded
        return EncodedTensor("fp32", value.astype(np.float32))


def _quantised(name: str, key: str, q: Any, scale: Any, encoding: Any) -> EncodedTensor:
    arrays = isinstance(q, np.ndarray) and isinstance(scale, np.ndarray)
    if not arrays or q.dtype != np.int8 or scale.dtype.kind != "f" or scale.shape not in ((), q.shape[:1]):
        found = f"{q.dtype} of shape {q.shape} and {scale.dtype} of {scale.shape}" if arrays else "no two tensors"
        _fail(name, f"{key!r} has as integers and scales {found}; int8 and one scale, or one a row, were expected")
    if q.ndim == 2 and scale.ndim == 1 and scale.dtype == np.float16:
        return EncodedTensor(encoding if _fits(q, encoding) else "int8", q, scale)
    factors = scale.astype(np.float32).reshape(scale.shape + (1,) * (q.ndim - scale.ndim))
    with np.errstate(all="ignore"):  # NaN and infinity are refused where they are decoded
        return EncodedTensor("fp32", np.asarray(q.astype(np.float32) * factors, dtype=np.float32))


def _fits(q: npt.NDArray[np.int8], encoding: Any) -> bool:
    """Whether ``encoding`` is one of pgolf's integer encodings that holds these integers."""
    if encoding not in ENCODINGS or not encoding.startswith("int"):
        return False
    half = 1 << (int(encoding[3:]) - 1)
    return bool(((q >= -half) & (q < half)).all())


def _fail(name: str, sentence: str) -> NoReturn:
    raise FormatError(f"{name}: {sentence[:1000]}.")
