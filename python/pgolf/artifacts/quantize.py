"""Row quantisation, magnitude pruning and encoding policies (docs/spec.md §4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from pgolf import _C
from pgolf.common.checks import checked_integer
from pgolf.config.encoding import Encoding
from pgolf.model import as_array

Float32Array = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]
Float16Array = npt.NDArray[np.float16]

METHODS = ("amax", "quantile_floor", "rms")
PRUNED_ABOVE = 65_536
"""Only 2-D tensors with more elements than this are pruned."""


def quantize_rows(
    w: Any, bits: int = 6, clip: int | None = None, method: str = "amax", steps: float | None = None
) -> tuple[Int8Array, Float16Array]:
    """Quantise each row of a matrix to signed integers with one fp16 scale.

    ``"amax"``: σ = fp16(max(max|row| / clip, 1e-12)), at least 2⁻¹⁴, and q = clamp(round(w / σ), −clip − 1, clip).
    ``"quantile_floor"``, the int8 of the public submissions (openai/parameter-golf #180): t = the 99.99984 % quantile
    of |row|, σ = max(t / 127, 1 / 127) in float32, q = clamp(round(clamp(w, ±t) / σ), ±127); fp16(σ) is returned.
    ``"rms"``, one step for all rows that have room for it: s = the root mean square of w, in float64; σ =
    fp16(max(s / steps, max|row| / 127)), at least 2⁻¹⁴, and q = clamp(round(w / σ), ±127).
    Float32 arithmetic, true division, round half to even (docs/spec.md §4).

    Args:
        w: (rows, columns), at least one column; float32, or another floating dtype, which is rounded to float32 first.
        bits: 2 … 8; the methods other than ``"amax"`` take 8 alone.
        clip: the largest integer, 1 … 2^(bits−1) − 1; None is 2^(bits−1) − 1, and all that the other methods take.
        method: ``"amax"``, ``"quantile_floor"`` or ``"rms"``.
        steps: for ``"rms"`` alone, positive: the steps to a root mean square.

    Returns:
        q, (rows, columns) int8, and scale, (rows,) float16.

    Raises:
        TypeError: w is not floating, or bits or clip is not an integer.
        ValueError: a wrong shape, bits, clip, method or steps; a row that holds NaN or infinity or needs a scale beyond
            fp16.
    """
    matrix = _matrix(w, "w")
    if not np.issubdtype(matrix.dtype, np.floating):
        raise TypeError(f"w has dtype {matrix.dtype}; a floating dtype was expected.")
    if matrix.shape[1] == 0:
        raise ValueError(f"w has shape {matrix.shape}; at least one column was expected.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; one of {', '.join(METHODS)} was expected.")
    largest = (1 << (checked_integer(bits, "bits", 2, 8) - 1)) - 1
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes an infinity, which the kernel refuses by row
        rows = np.require(matrix, np.float32, ["C", "A"])
    if (steps is not None) != (method == "rms"):
        raise ValueError(f"method is {method!r} with steps={steps}; 'rms' needs steps, and no other method takes them.")
    if method == "amax":
        limit = largest if clip is None else checked_integer(clip, "clip", 1, largest)
        q, scale = _C.quantize_rows_amax(rows, limit)
    elif bits != 8 or clip is not None:
        raise ValueError(f"method is {method!r} with bits={bits}, clip={clip}; bits=8 and clip=None were expected.")
    elif steps is not None:
        if not 0 < steps < inf:
            raise ValueError(f"steps is {steps}; a positive number was expected.")
        q, scale = _C.quantize_rows_rms(rows, steps)
    else:
        q, scale = _C.quantize_rows_quantile_floor(rows)
    return q, scale.view(np.float16)


def dequantize_rows(q: Any, scale: Any) -> Float32Array:
    """The float32 matrix q · scale[:, None], the inverse of :func:`quantize_rows` up to rounding.

    Args:
        q: (rows, columns) int8.
        scale: (rows,) float16, finite.

    Returns:
        (rows, columns) float32.

    Raises:
        TypeError: q is not int8 or scale is not float16.
        ValueError: the shapes do not fit together, or a row's scale is NaN or infinite.
    """
    integers, scales = _matrix(q, "q"), as_array(scale, "scale")
    if integers.dtype != np.int8:
        raise TypeError(f"q has dtype {integers.dtype}; int8 was expected.")
    if scales.dtype != np.float16:
        raise TypeError(f"scale has dtype {scales.dtype}; float16 was expected.")
    if scales.shape != integers.shape[:1]:
        raise ValueError(f"scale has shape {scales.shape}; {integers.shape[:1]}, one for each row of q, was expected.")
    return _C.dequantize_rows(np.require(integers, None, ["C"]), np.require(scales, None, ["C", "A"]).view(np.uint16))


def prune_weights(w: Float32Array, fraction: float) -> Float32Array:
    """Zero the entries of w whose magnitude is strictly below the ``fraction``-quantile of the magnitudes.

    Tensors that are not 2-D or have at most 65,536 elements are left as they are, as the public script does
    (openai/parameter-golf #180).

    Args:
        w: float32, finite, any shape.
        fraction: 0 … 1; 0 prunes nothing.

    Returns:
        A pruned copy, or w itself where nothing is pruned.
    """
    if fraction == 0 or w.ndim != 2 or w.size <= PRUNED_ABOVE:
        return w
    pruned = np.array(w, np.float32, order="C")
    _C.prune(pruned, fraction)
    return pruned


FIXED_GRID = (("*.mlp.*", "int5"), ("*.attn.*", "int6"))
"""The policy by which late QAT trains where `train.qat_grid` is "fixed"."""


def qat_clips(shapes: Mapping[str, tuple[int, ...]], policy: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The largest integer of each matrix that late QAT trains on the grid of its export (docs/spec.md §3).

    Those are the matrices `*.mlp.*` and `*.attn.*` to which the policy's first int5 or int6 rule that matches applies,
    whatever float rules come before it: a matrix that is kept as fp16 trains as its like do. Others are left alone.

    Args:
        shapes: shape by tensor name.
        policy: ordered (pattern, encoding) pairs.

    Returns:
        15 (int5) or 31 (int6) by name.
    """
    clips = {"int5": 15, "int6": 31}
    grids = [(pattern, encoding) for pattern, encoding in policy if encoding not in ("fp16", "fp32")]
    found = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not any(fnmatchcase(name, kind) for kind in ("*.mlp.*", "*.attn.*")):
            continue
        encoding = next((encoding for pattern, encoding in grids if fnmatchcase(name, pattern)), None)
        if encoding in clips:
            found[name] = clips[encoding]
    return found


def encode_plan(
    shapes: Mapping[str, tuple[int, ...]],
    policy: Sequence[tuple[str, str]],
    small_numel: int,
    control_patterns: Sequence[str],
) -> dict[str, str]:
    """Decide how each tensor is stored (docs/spec.md §4).

    Tensors of at most ``small_numel`` elements are fp16; larger control tensors are fp32; every other one takes the
    encoding of the first pair of ``policy`` whose pattern matches its whole name (fnmatch, case-sensitive).

    Args:
        shapes: shape by tensor name.
        policy: ordered (pattern, encoding) pairs, as ``ExportConfig`` checks them.
        small_numel: elements.
        control_patterns: a pattern with a wildcard (* ? [) marks the control tensors whose whole name it matches, any
            other those whose name contains it.

    Returns:
        Encoding by tensor name, in the order of ``shapes``.

    Raises:
        ValueError: a tensor that no pattern matches, or an integer encoding for a tensor that is not 2-D.
    """

    def is_control(name: str) -> bool:
        return any(
            fnmatchcase(name, pattern) if any(mark in pattern for mark in "*?[") else pattern in name
            for pattern in control_patterns
        )

    def encoding_of(name: str, shape: tuple[int, ...]) -> str:
        if prod(shape) <= small_numel:
            return "fp16"
        if is_control(name):
            return "fp32"
        for pattern, encoding in policy:
            if fnmatchcase(name, pattern):
                if Encoding.parse(encoding).is_integer and len(shape) != 2:
                    raise ValueError(
                        f"The policy's pattern {pattern!r} gives the tensor {name} of shape {shape} "
                        f"the encoding {encoding}, which is for 2-D tensors; fp16 or fp32 was expected."
                    )
                return encoding
        raise ValueError(f"No pattern of the policy matches the tensor {name}; end the policy with ('*', encoding).")

    return {name: encoding_of(name, shape) for name, shape in shapes.items()}


def _matrix(value: Any, name: str) -> npt.NDArray[Any]:
    array = as_array(value, name)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; a matrix (rows, columns) was expected.")
    return array
