"""GPT, the model as Python sees it: a thin face over the native one (docs/spec.md §1–2)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pgolf import _C
from pgolf.common.machine import shows_nvidia_gpu
from pgolf.config import ModelConfig, read_polynomials
from pgolf.data.declared import Record

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int32]

# Tokens that one native call takes at most when the caller's batch is larger: bounds memory, and the time until
# Ctrl-C is noticed. A GPU is filled by more.
_CALL_TOKENS = 16_384
_GPU_CALL_TOKENS = 65_536
_READ_BYTES = 2**20  # of losses that can be read while the GPU goes on
_FIRST_ROOM = 1024  # new tokens whose keys and values a generation has room for at first: it may be stopped early


class GPT:
    """A U-Net transformer with bigram embedding and smear gate, its weights on one device.

    Args:
        config: the [model] table.
        seed: 0 … 2⁶⁴ − 1; with a tensor's name it determines every initial weight. None leaves them zero, for a state
            dict that replaces them.
        device: "cpu", "cuda", "cuda:<number>"; None is the best there is, and where a GPU is there but cannot be used,
            a warning says why it is the CPU.
        dtype: of activations and of what products read: "bfloat16", "float16", "float32", on CPUs also (to check
            gradients) "float64". Weights themselves, gradients and losses are float32 (float64). None and "auto" are
            bfloat16 on GPUs (float16 where the GPU has no bfloat16), float32 on CPUs. A 16-bit dtype on the CPU is
            float32 arithmetic rounded to it where a GPU would store it: what a GPU's results are compared with.

    Raises:
        ValueError: an impossible configuration, seed or dtype; on a GPU also a head width that its attention lacks.
        DeviceError: a device that cannot be used.
    """

    def __init__(
        self, config: ModelConfig, seed: int | None = 0, *, device: str | None = None, dtype: str | None = None
    ) -> None:
        config = dataclasses.replace(config)
        config.validate()
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be from 0 to 2**64 - 1.")
        if config.smear_reset_at_bos and config.bos_id < 0:
            raise ValueError(
                "model.smear_reset_at_bos is true, but no BOS token is known: set model.bos_id. (A run takes it from "
                "its tokenizer.)"
            )
        self.config = config
        self.device, number = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        """The dtype of activations."""
        self._weight_dtype = "float64" if self.dtype == "float64" else "float32"
        self.train_seq_len: int | None = None
        """The sequence length it was trained at, in tokens; set by Trainer and load."""
        self.provenance: dict[str, int] | None = None
        """Steps, tokens and seed of the training; set by Trainer and load."""
        self.scoring: dict[str, Any] | None = None
        """How its run scores it: method, seq_len, stride, tail or the ttt_ keys; set by Trainer and load."""
        self.record: Record | None = None
        """What its run has recorded of validation data and tokenizer; set by Trainer and load."""
        self._native = _C.Model(_native_config(config), seed, number, self.dtype)
        self._shapes = parameter_shapes(config)
        self._training = threading.Lock()

    @property
    def num_parameters(self) -> int:
        """The number of weights."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    @property
    def looping(self) -> bool:
        """Whether the layers run with their loops (docs/spec.md §2.3); False for a model that has none.

        A model that has any starts with them on. Texts whose keys and values are kept cannot go on past a change.
        """
        return bool(self._native.looping)

    @looping.setter
    def looping(self, on: bool) -> None:
        self._native.looping = bool(on)

    @property
    def description(self) -> str:
        """Device, instruction set, dtype and threads, as reports name them."""
        return str(self._native.description())

    @property
    def device_name(self) -> str:
        """The GPU's name, or the CPU's instruction set: "NVIDIA H200", "cpu avx512"."""
        return self.description.split(", ")[0].removeprefix("cuda ")

    def memory_table(self) -> list[tuple[str, float]]:
        """What lies in memory now, as (what, MiB); indented rows share their arena's memory over time."""
        return [(what, size / 2**20) for what, size in self._native.memory_table()]

    def state_dict(self) -> dict[str, FloatArray]:
        """Copies of all weights by their community names, float32 (float64 for a float64 model); docs/spec.md §1."""
        return {name: self._native.read(name) for name in self._shapes}

    def load_state_dict(self, arrays: Mapping[str, Any]) -> None:
        """Replaces all weights. Nothing changes unless everything fits.

        Args:
            arrays: exactly this model's names; floating-point arrays (NumPy, or anything with DLPack) of its shapes.

        Raises:
            ValueError: tensors that are missing, extra, misshapen or not finite in the model's dtype, each named.
            TypeError: a value that is not a floating-point array, named; or no mapping at all.
        """
        if not isinstance(arrays, Mapping):
            raise TypeError(f"The state dict is a {type(arrays).__name__}; expected a mapping of names to arrays.")
        missing = [name for name in self._shapes if name not in arrays]
        extra = [name for name in arrays if name not in self._shapes]
        if missing or extra:
            parts = []
            if missing:
                parts.append(f"missing: {', '.join(missing)}")
            if extra:
                parts.append("extra: " + ", ".join(_with_suggestion(name, self._shapes) for name in extra))
            raise ValueError(f"The state dict does not fit this model; {'; '.join(parts)}.")
        ready = {name: self._parameter(name, arrays[name]) for name in self._shapes}
        for name, values in ready.items():
            self._native.write(name, values)

    def _parameter(self, name: str, value: Any) -> FloatArray:
        array = as_array(value, name)
        if array.dtype.kind != "f":
            raise TypeError(f"{name} has dtype {array.dtype}; expected a floating-point array.")
        if array.shape != self._shapes[name]:
            raise ValueError(f"{name} has shape {array.shape}; expected {self._shapes[name]}.")
        with np.errstate(over="ignore"):  # a float64 value beyond float32 becomes an infinity, refused below
            ready: FloatArray = np.ascontiguousarray(array, dtype=self._weight_dtype).reshape(array.shape)
        bad = np.count_nonzero(~np.isfinite(ready))
        if bad:
            raise ValueError(
                f"{name} holds {bad} values that are NaN or infinite in {self._weight_dtype}; expected none."
            )
        return ready

    def logits(self, ids: Any) -> FloatArray:
        """The logits after the softcap.

        Args:
            ids: (B, T) token ids of any integer dtype.

        Returns:
            (B, T, V), float32.

        Raises:
            ValueError: an empty batch, or an id outside 0 … V − 1, named.
            TypeError: ids that are not integers.
        """
        tokens = as_tokens(ids, "ids")
        return self._in_parts(tokens.shape, lambda part: self._native.logits(tokens[part], 0))

    def token_losses(self, ids: Any, targets: Any) -> FloatArray:
        """The cross-entropy of every token, in nats.

        Args:
            ids, targets: (B, T) token ids of any integer dtype.

        Returns:
            (B, T), float32.

        Raises:
            ValueError: an empty batch, different shapes, or an id outside 0 … V − 1, named.
            TypeError: ids that are not integers.
        """
        return self.window_losses(ids, targets, 0)

    def window_losses(self, ids: Any, targets: Any, first: int) -> FloatArray:
        """Like `token_losses`, but only for positions first … T − 1: returns (B, T − first), float32.

        Of the positions before, the last block makes only keys and values and the head nothing: for sliding evaluation.
        """
        tokens, goals = _token_pair(ids, targets)
        return self._in_parts(tokens.shape, lambda part: self._native.losses(tokens[part], goals[part], first))

    def window_losses_later(self, ids: Any, targets: Any, first: int) -> Callable[[], FloatArray]:
        """`window_losses` without waiting for a GPU: call the result to have them. At most two may be under way."""
        tokens, goals = _token_pair(ids, targets)
        batch, count = tokens.shape[0], tokens.shape[1] - first
        if self.device == "cpu" or len(self._parts(tokens.shape)) > 1 or 4 * batch * count > _READ_BYTES:
            losses = self.window_losses(tokens, goals, first)
            return lambda: losses
        ticket = self._native.losses_later(tokens, goals, first)
        return lambda: self._native.wait_losses(ticket, batch, count)

    def loss(self, ids: Any, targets: Any) -> float:
        """The mean of `token_losses`, summed in float64."""
        return float(np.mean(self.token_losses(ids, targets), dtype=np.float64))

    def loss_and_grads(self, ids: Any, targets: Any) -> tuple[float, dict[str, FloatArray]]:
        """The mean loss and its gradient by every weight, unclipped.

        Args:
            ids, targets: (B, T) token ids of any integer dtype.

        Returns:
            The loss in nats, and arrays by name, shaped as the weights, float32.

        Raises: as `token_losses`.
        """
        tokens, goals = _token_pair(ids, targets)
        with self._training:
            self._native.begin_step(False)
            for part in self._parts(tokens.shape):
                self._native.micro_step(tokens[part], goals[part], 1.0 / tokens.size)
            self._native.end_step()
            gradients = {name: self._native.read_grad(name) for name in self._shapes}
            scale = self._native.loss_scale()
            if scale != 1:
                gradients = {name: gradient / np.float32(scale) for name, gradient in gradients.items()}
            return self._native.loss_sum() / tokens.size, gradients

    def generate(
        self,
        ids: Any,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Collection[int] | None = None,
        seed: int = 0,
        first: Collection[int] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Continues a text by sampling, one token at a time; see `pgolf.model.sampling.sample` for the arguments.

        The keys and values of the tokens so far are kept until the end, 2·virtual_layers·num_kv_heads·head_dim numbers
        of the model's dtype a token, so that each new token is one pass over one position. Nothing limits the length:
        positions go on counting beyond those the model was trained at.

        Args:
            ids: (T,) or (1, T) token ids, T ≥ 1.

        Returns:
            The new ids, (n,) with n ≤ max_new_tokens.

        Raises:
            RuntimeError: the weights were changed, by training or load_state_dict, while the text was being generated.
            DeviceError: the device has no memory left for the keys and values.
        """
        from pgolf.model.sampling import sample

        prompt = as_array(ids, "ids")
        start = as_tokens(prompt[None] if prompt.ndim == 1 else prompt, "ids")
        if len(start) > 1:
            raise ValueError(f"ids has shape {start.shape}; expected (T,) or (1, T), one text to continue.")

        decoder: _C.Decoder | None = None

        def last_logits(context: npt.NDArray[Any]) -> FloatArray:
            nonlocal decoder
            if decoder is None:  # now that sample has checked max_new_tokens; the last new token is not read
                decoder = _C.Decoder(self._native, len(context) + min(max_new_tokens - 1, _FIRST_ROOM))
            return decoder.read(np.ascontiguousarray(context[decoder.length :], dtype=np.int32))

        return sample(last_logits, start[0], max_new_tokens, temperature, top_k, top_p, stop, seed, first)

    def _in_parts(self, shape: tuple[int, ...], call: Callable[[slice], FloatArray]) -> FloatArray:
        parts = self._parts(shape)
        return call(parts[0]) if len(parts) == 1 else np.concatenate([call(part) for part in parts])

    def _parts(self, shape: tuple[int, ...]) -> list[slice]:
        """Cuts B sequences of T tokens into native calls."""
        batch, length = shape
        step = max(1, (_CALL_TOKENS if self.device == "cpu" else _GPU_CALL_TOKENS) // length)
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]

    def __repr__(self) -> str:
        c = self.config
        return (
            f"GPT({self.num_parameters:,} parameters, {c.num_layers} layers × {c.model_dim}, "
            f"vocabulary {c.vocab_size}, {self.dtype} on {self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "device": self.device,
            "dtype": self.dtype,
            "train_seq_len": self.train_seq_len,
            "provenance": self.provenance,
            "scoring": self.scoring,
            "record": self.record,
            "weights": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"], None, device=state["device"], dtype=state["dtype"])  # type: ignore[misc]
        self.load_state_dict(state["weights"])
        self.train_seq_len, self.provenance = state["train_seq_len"], state["provenance"]
        self.scoring, self.record = state.get("scoring"), state.get("record")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight that a configuration implies, in state-dict order (docs/spec.md §1)."""
    return dict(_C.parameter_table(_native_config(config)))


def newton_schulz(u: Any, steps: int = 5, coefficients: Sequence[Sequence[float]] | None = None) -> FloatArray:
    """Muon's orthogonalisation: moves the singular values of u towards 1 (docs/spec.md §3, NS5).

    Args:
        u: (rows, cols) floating-point array; float64 is computed in float64, anything else in float32.
        steps: iterations, at least 1.
        coefficients: (a, b, c) of each iteration, the last also of those after it, at most 8; None: Keller Jordan's.

    Returns:
        A new array of u's shape.

    Raises:
        ValueError: not a matrix, empty, not finite, or steps < 1.
        TypeError: not floating point.
    """
    array = as_array(u, "u")
    if array.dtype.kind != "f":
        raise TypeError(f"u has dtype {array.dtype}; expected a floating-point array.")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"u has shape {array.shape}; expected a matrix with at least one element.")
    if not np.isfinite(array).all():
        raise ValueError("u holds NaN or infinite values; expected finite numbers.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    dtype = np.float64 if array.dtype == np.float64 else np.float32
    return _C.newton_schulz(np.ascontiguousarray(array, dtype=dtype), steps, polynomials(coefficients))


def polynomials(coefficients: Sequence[Sequence[float]] | None) -> list[tuple[float, float, float]]:
    """Checked Newton-Schulz coefficients; None: Keller Jordan's."""
    try:
        return read_polynomials("keller_jordan" if coefficients is None else list(coefficients))
    except ValueError as error:
        raise ValueError(f"coefficients = {coefficients!r}: {error}.") from None


def as_array(value: Any, name: str) -> npt.NDArray[Any]:
    """A NumPy view of an array, or of anything that speaks DLPack or the buffer protocol; a copy only of lists."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):  # a PyTorch tensor that requires gradients refuses to be exported
        value = value.detach()
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError) as error:
            raise TypeError(f"{name} cannot be read as an array in CPU memory: {error}.") from error
    try:
        return np.asarray(value)
    except ValueError as error:  # a list of unequal lists
        raise ValueError(f"{name} is not an array ({error}).") from None


def as_tokens(ids: Any, name: str) -> IntArray:
    """(B, T) token ids as contiguous int32; the native code checks their range."""
    array = as_array(ids, name)
    if array.dtype.kind not in "iu" and array.size:  # an empty list has no dtype of its own
        raise TypeError(f"{name} has dtype {array.dtype}; token ids are integers.")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (B, T) with B and T at least 1.")
    if array.dtype.itemsize > 4 or array.dtype == np.uint32:
        limits = np.iinfo(np.int32)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"{name} holds {array.max() if array.max() > limits.max else array.min()}, no token id.")
    return np.ascontiguousarray(array, dtype=np.int32)


def _token_pair(ids: Any, targets: Any) -> tuple[IntArray, IntArray]:
    tokens, goals = as_tokens(ids, "ids"), as_tokens(targets, "targets")
    if tokens.shape != goals.shape:
        raise ValueError(f"targets has shape {goals.shape}; expected the shape of ids, {tokens.shape}.")
    return tokens, goals


def _with_suggestion(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"{name} (did you mean {close[0]}?)" if close else str(name)


def _native_config(config: ModelConfig) -> dict[str, Any]:
    fields = config.to_dict()
    fields["mlp_hidden"] = config.mlp_hidden
    fields["rope_tables_bf16"] = config.rope_tables == "bf16"
    return fields


def resolve_device(device: str | None) -> tuple[str, int]:
    """The name of a device and its number for the native code, −1 for the CPU; None is the best there is.

    A warning, once in a process, says why None is the CPU on a machine with a GPU.
    """
    if device is None:
        status = _C.cuda_status()
        device = best_device(status)
        if device == "cpu" and _gpu_is_there(status):
            _warn_of_cpu(status.problem)
    if device == "cpu":
        return device, -1
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or device.endswith(":"):
        raise ValueError(f"The device is {device!r}; expected 'cpu', 'cuda' or 'cuda:<number>'.")
    return device, int(number or 0)


def best_device(status: _C.CudaStatus) -> str:
    """The device of a model for which none is named."""
    return "cuda" if status.usable else "cpu"


def _gpu_is_there(status: _C.CudaStatus) -> bool:
    """Whether a GPU that cannot be used is meant to be: this build has a backend for it, and no one hides it."""
    if status.missing == "backend":
        return False
    if status.missing == "GPU" and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return False
    return bool(status.devices) or status.missing == "newer driver" or shows_nvidia_gpu()


@functools.cache
def _warn_of_cpu(problem: str) -> None:
    warnings.warn(
        f"The CPU is used, although this machine has an NVIDIA GPU: {problem} The device 'cpu', where it is named, is "
        "used without this warning.",
        stacklevel=4,  # where pgolf.GPT is called
    )


def resolve_dtype(dtype: str | None, device: str) -> str:
    """The dtype of weights and activations: None and "auto" are bfloat16 on GPUs, float32 on CPUs."""
    if dtype in (None, "auto"):
        return "float32" if device == "cpu" else _C.cuda_dtype(resolve_device(device)[1])
    known = ("bfloat16", "float16", "float32", "float64")
    if dtype not in known:
        raise ValueError(f"The dtype is {dtype!r}; expected one of {', '.join(map(repr, known))}.")
    if dtype == "float64" and device != "cpu":
        raise ValueError("The dtype is 'float64', which only the CPU has; a GPU has 'bfloat16', 'float16', 'float32'.")
    return str(dtype)
