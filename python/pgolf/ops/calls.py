"""How pgolf.ops checks the arrays of a call, hands them to a backend, and on which device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgolf import _C
from pgolf.common.checks import checked_integer
from pgolf.model import FloatArray, as_array, as_tokens, resolve_device, resolve_dtype


class MixedInput(NamedTuple):
    """A block's input `m = resid_mix[0]⊙(x + skip_weight⊙skip) + resid_mix[1]⊙x0` (docs/spec.md §2.3–2.4).

    Encoder blocks have no skip. `skip` may be `x` itself.
    """

    x: Any
    """[B, T, d]"""
    x0: Any
    """[B, T, d]"""
    resid_mix: Any
    """[2, d]"""
    skip: Any = None
    """[B, T, d]"""
    skip_weight: Any = None
    """[d]"""


@dataclass(frozen=True)
class Saved:
    """What a forward operation keeps for its backward."""

    operation: str
    dtype: np.dtype[Any]
    tensors: dict[str, npt.NDArray[Any]]
    """Arguments and results by name; "saved" is what the backend itself keeps, as bytes."""
    numbers: dict[str, Any]


class Arrays:
    """The checked arrays of one call. The first array with a letter in its shape decides that letter's size."""

    def __init__(self, dtype: np.dtype[Any] | None = None, sizes: Mapping[str, int] | None = None) -> None:
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.sizes = dict(sizes or {})
        self.known_dtype = dtype

    @property
    def dtype(self) -> np.dtype[Any]:
        assert self.known_dtype is not None
        return self.known_dtype

    def native(self) -> Any:
        return operations_for(self.dtype)

    def add(self, name: str, value: Any, *shape: str | int, copy: bool = False) -> FloatArray:
        array = as_array(value, name)
        if self.known_dtype is None:
            if array.dtype not in (np.float32, np.float64):
                raise TypeError(f"{name} has dtype {array.dtype}; expected float32 or float64.")
            self.known_dtype = array.dtype
        elif array.dtype != self.known_dtype:
            raise TypeError(f"{name} has dtype {array.dtype}; expected {self.known_dtype}, the dtype of the others.")
        self._fit(name, array.shape, shape)
        self.arrays[name] = np.array(array, order="C") if copy else np.asarray(array, order="C")
        return self.arrays[name]

    def add_tokens(self, name: str, value: Any) -> None:
        tokens = as_tokens(value, name)
        self._fit(name, tokens.shape, ("B", "T"))
        vocab = self.sizes["V"]
        bad = np.argwhere((tokens < 0) | (tokens >= vocab))
        if len(bad):
            b, t = bad[0]
            raise ValueError(f"{name}[{b}, {t}] is {tokens[b, t]}; token ids run from 0 to {vocab - 1}.")
        self.arrays[name] = tokens

    def add_mixed(self, mixed: MixedInput) -> None:
        if not isinstance(mixed, MixedInput):
            raise TypeError(f"mixed is a {type(mixed).__name__}; expected an ops.MixedInput.")
        self.add("x", mixed.x, "B", "T", "d")
        self.add("x0", mixed.x0, "B", "T", "d")
        self.add("resid_mix", mixed.resid_mix, 2, "d")
        if (mixed.skip is None) != (mixed.skip_weight is None):
            raise ValueError("The mixed input has one of skip and skip_weight; expected both or neither.")
        if mixed.skip is not None:
            self.add("skip", mixed.skip, "B", "T", "d")
            self.add("skip_weight", mixed.skip_weight, "d")

    def add_adapters(self, adapters: Any, size: int) -> None:
        """Low-rank changes with `size` numbers a rank, [B, r·size]."""
        if adapters is None:
            return
        rank, rest = divmod(self.add("adapters", adapters, "B", "r·n").shape[1], size)
        if rest or rank == 0:
            raise ValueError(f"adapters has {self.sizes['r·n']} numbers a row; expected a multiple of {size}.")

    def add_head(self, x: Any, w: Any, softcap: float, first: int, adapters: Any) -> dict[str, Any]:
        self.add("x", x, "B", "T", "d")
        self.add("w", w, "V", "d")
        if not 0 < softcap < float("inf"):
            raise ValueError(f"softcap is {softcap}; expected a number above 0.")
        start = checked_integer(first, "first", 0, self.sizes["T"] - 1)
        self.sizes["T'"] = self.sizes["T"] - start
        self.add_adapters(adapters, self.sizes["d"] + self.sizes["V"])
        return {"softcap": float(softcap), "first": start}

    def at_most(self, name: str, side: str, limit: str) -> None:
        if self.sizes[side] > self.sizes[limit]:
            raise ValueError(
                f"{name} has {self.sizes[side]} positions; expected at most {self.sizes[limit]}, those that there are."
            )

    def add_list(
        self, name: str, values: Sequence[Any], like: Sequence[FloatArray] | None = None, copy: bool = False
    ) -> list[FloatArray]:
        if len(values) == 0 or (like is not None and len(values) != len(like)):
            wanted = "at least 1" if like is None else len(like)
            raise ValueError(f"{name} holds {len(values)} arrays; expected {wanted}.")
        shapes = [as_array(value, name).shape for value in values] if like is None else [w.shape for w in like]
        return [
            self.add(f"{name}[{i}]", value, *shape, copy=copy)
            for i, (value, shape) in enumerate(zip(values, shapes, strict=True))
        ]

    def empty(self, *shape: str) -> FloatArray:
        """An array to be written: it starts as NaN, so that an element that nobody writes shows."""
        return np.full([self.sizes[letter] for letter in shape], np.nan, self.dtype)

    def _fit(self, name: str, found: tuple[int, ...], shape: tuple[str | int, ...]) -> None:
        expected = [self.sizes.get(side, side) if isinstance(side, str) else side for side in shape]
        fits = len(found) == len(shape) and all(
            n >= 1 if isinstance(side, str) else n == side for n, side in zip(found, expected, strict=True)
        )
        if not fits:
            letters, values = (f"({', '.join(map(str, sides))})" for sides in (shape, expected))
            meaning = letters if letters == values else f"{letters} = {values}"
            raise ValueError(f"{name} has shape {found}; expected {meaning}, each at least 1.")
        self.sizes.update({side: n for side, n in zip(shape, found, strict=True) if isinstance(side, str)})


_place: ContextVar[tuple[int, str] | None] = ContextVar("place", default=None)


@contextmanager
def on(device: str, dtype: str | None = None) -> Iterator[None]:
    """Where and in which precision the operations of a `with` block run; without it, on the CPU in the arrays' dtype.

    Arrays stay float32 NumPy arrays; those that an operation stores in a 16-bit dtype (activations and the matrices of
    products; not vectors, gradients of parameters, logits and losses) are rounded to it on their way in.

    Args:
        device: "cpu", "cuda" or "cuda:<number>".
        dtype: "bfloat16", "float16", "float32"; None is the device's own, as `pgolf.GPT` chooses it. On the CPU a
            16-bit dtype means float32 arithmetic, rounded where a GPU would store it.

    Raises:
        DeviceError: the device cannot be used.
        ValueError: an unknown device or dtype.
    """
    place, number = resolve_device(device)
    token = _place.set((number, resolve_dtype(dtype, place)))
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def timed(repeats: int = 0) -> Iterator[Callable[[], float]]:
    """For benchmarks: yields a function that tells the seconds of the last operation on float32 arrays.

    They are those of the operation alone, without its arrays' way to the device and back. Enter it inside `on`.

    Args:
        repeats: above 0, an operation is run again so many times, and the seconds are the mean of those. What it
            returns then means nothing: some of its arrays are inputs and outputs at once.
    """
    native = operations_for(np.dtype(np.float32))
    native.repeats = checked_integer(repeats, "repeats", 0, 1_000_000)
    try:
        yield lambda: float(native.seconds)
    finally:
        native.repeats = 0


@functools.cache
def _native_on(device: int, dtype: str) -> Any:
    return _C.Ops(device, dtype)


def operations_for(dtype: np.dtype[Any]) -> Any:
    place = _place.get()
    if place is None:
        return _native_on(-1, str(dtype))
    if dtype == np.float64 and place[1] != "float64":
        raise TypeError(f"The arrays are float64; operations in {place[1]} take float32 arrays.")
    return _native_on(*place)


def forward(
    operation: str,
    call: Arrays,
    outputs: Mapping[str, tuple[str, ...]],
    others: Mapping[str, npt.NDArray[Any]] | None = None,
    /,
    **numbers: Any,
) -> Saved:
    """others: results that are no numbers of the call's dtype, as they are to be written."""
    results = {name: call.empty(*shape) for name, shape in outputs.items()} | dict(others or {})
    kept = getattr(call.native(), operation)(call.arrays, results, **numbers)
    return Saved(operation, call.dtype, {**call.arrays, **results, "saved": kept}, numbers)


class Backward:
    """One call of an operation's backward; the gradient at the tensor `name` is the native argument "d" + name."""

    def __init__(self, operation: str, saved: Saved, argument: str = "saved") -> None:
        if not isinstance(saved, Saved) or saved.operation != operation:
            found = f"ops.{saved.operation}" if isinstance(saved, Saved) else f"a {type(saved).__name__}"
            raise ValueError(f"{argument} comes from {found}; expected what ops.{operation} returned.")
        self.operation, self.saved = operation, saved
        self.inputs = dict(saved.tensors)
        self.outputs: dict[str, FloatArray] = {}

    def like(self, tensor: str, label: str, value: Any) -> FloatArray:
        """A checked copy of `value`: backwards use some inputs as scratch, and two may be one array."""
        return Arrays(self.saved.dtype).add(label, value, *self.saved.tensors[tensor].shape, copy=True)

    def start(self, tensor: str, label: str, value: Any) -> FloatArray:
        """What a gradient is added to; None: zeros."""
        return np.zeros_like(self.saved.tensors[tensor]) if value is None else self.like(tensor, label, value)

    def needs_all(self, queries: str, positions: str) -> None:
        found, expected = (self.saved.tensors[name].shape[1] for name in (queries, positions))
        if found != expected:
            raise ValueError(
                f"saved comes from a call with the queries of {found} positions; the backward needs all {expected}."
            )

    def upstream(self, **gradients: Any) -> None:
        """Gradients at results."""
        for label, value in gradients.items():
            self.inputs[label] = self.like(label.removeprefix("d"), label, value)

    def written(self, *tensors: str) -> None:
        """These tensors' gradients, where present, are overwritten."""
        for name in tensors:
            if name in self.saved.tensors:
                self.outputs["d" + name] = np.full_like(self.saved.tensors[name], np.nan)

    def added(self, add_to: Mapping[str, Any] | None, *tensors: str) -> None:
        """These tensors' gradients, where present, are added to what add_to holds."""
        present = [name for name in tensors if name in self.saved.tensors]
        given = dict(add_to or {})
        for name in given:
            if name not in present:
                raise ValueError(f"add_to holds {name!r}; expected names from: {', '.join(present)}.")
        for name in present:
            self.outputs["d" + name] = self.start(name, f"add_to[{name!r}]", given.get(name))

    def run(self, *fields: str, **numbers: float) -> list[Any]:
        """The gradients of these tensors, None where absent. numbers: the backward's own."""
        native = operations_for(self.saved.dtype)
        getattr(native, self.operation + "_backward")(self.inputs, self.outputs, **self.saved.numbers, **numbers)
        return [self.outputs.get("d" + name) for name in fields]
