"""pgolf's native core: model, optimizer, quantiser and single operations.

The package's Python side checks and converts arguments before it calls; these are not public.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

# float32 or float64, as the model's dtype says.
_Floats = npt.NDArray[np.floating[Any]]
_Arrays = Mapping[str, npt.NDArray[Any]]

@final
class Model:
    def __init__(self, config: dict[str, Any], seed: int | None, device: int, dtype: str) -> None:
        """Weights drawn from the seed; None leaves them zero. ``device`` −1 is the CPU; ``dtype`` as `pgolf.GPT`."""

    def description(self) -> str: ...
    def read(self, name: str, /) -> _Floats: ...
    def read_grad(self, name: str, /) -> _Floats: ...
    def write(self, name: str, values: _Floats, /) -> None: ...
    def logits(self, ids: npt.NDArray[np.int32], first: int) -> _Floats:
        """(B, T) token ids -> (B, T - first, V): the logits of positions first … T - 1."""

    def losses(self, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.int32], first: int) -> _Floats:
        """(B, T) twice -> (B, T - first): the cross-entropies of positions first … T - 1, in nats."""

    def losses_later(self, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.int32], first: int) -> int:
        """`losses` without waiting for a GPU; returns a ticket for `wait_losses`. At most a MiB of losses."""

    def wait_losses(self, ticket: int, batch_seqs: int, count: int) -> _Floats: ...
    def set_qat_clips(self, clips: dict[str, int]) -> None:
        """The largest integer of the matrices that steps with late QAT fake-quantise; before the first such step."""

    looping: bool
    """Whether the layers run with their loops."""

    def begin_step(self, qat: bool) -> None: ...
    def micro_step(self, ids: npt.NDArray[np.int32], targets: npt.NDArray[np.int32], loss_scale: float) -> None:
        """Adds loss_scale times the gradients of the summed loss; does not wait for a GPU."""

    def end_step(self) -> None: ...
    def loss_sum(self) -> float:
        """The losses of the step's micro-batches so far, in nats."""

    def loss_scale(self) -> float:
        """What gradients are multiplied by: 1 but for float16."""

    def training_bytes(self, batch_seqs: int, seq_len: int) -> int:
        """The arena that a micro-batch needs."""

    def memory_limit(self) -> int:
        """Bytes that the device may be asked for in all; 0: no limit is known."""

    def peak_memory(self) -> int:
        """The most bytes that the device has had allocated at once for this model; 0: it does not count."""

    @property
    def step_allocations(self) -> int:
        """Native allocations made by the current step's calls so far."""

    def prepare_training(self, batch_seqs: int, seq_len: int) -> None: ...
    def memory_table(self) -> list[tuple[str, int]]:
        """(what, bytes) of everything in memory."""

@final
class DocumentAdapters:
    """Low-rank adapters for ``rows`` documents at once; windows are (length, first scored position). docs/spec.md §5"""

    def __init__(
        self,
        model: Model,
        rows: int,
        rank: int,
        windows: Sequence[tuple[int, int]],
        seed: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None: ...
    def begin(self, documents: npt.NDArray[np.int32]) -> None:
        """(rows,): the document that each row starts on, -1 where it goes on."""

    def window(
        self,
        ids: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
        scored: npt.NDArray[np.int32],
        steps: npt.NDArray[np.int32],
        first: int,
    ) -> int:
        """Scores (rows, T) and then trains the rows with steps >= 1 on the positions scored[:, 0] … scored[:, 1] - 1.

        Returns a ticket for `Model.wait_losses` of (rows, T - first) losses.
        """

    def read(self, index: int, gradients: bool) -> _Floats:
        """(rows, size): the adapters of block ``index``, or of the head after all blocks, or their last gradients."""

    def bytes(self) -> int: ...
    @property
    def allocations(self) -> int:
        """Native allocations of the last window."""

@final
class Decoder:
    """A text that grows: keys and values of what was read are kept. ``positions`` are made room for, and doubled."""

    def __init__(self, model: Model, positions: int) -> None: ...
    def read(self, ids: npt.NDArray[np.int32]) -> _Floats:
        """Reads (n,) more token ids, n >= 1; (V,): the logits after the last. The weights must not have changed."""

    @property
    def length(self) -> int:
        """Tokens read."""

    @property
    def room(self) -> int:
        """Tokens that fit before more memory is taken."""

@final
class Optimizer:
    def __init__(
        self, model: Model, ns_steps: int, polynomials: Sequence[Sequence[float]], normalize_rows: bool
    ) -> None: ...
    def step(self, settings: dict[str, Any]) -> int:
        """Applies the gradients in the model; returns a ticket for `wait`."""

    def wait(self, ticket: int) -> tuple[float, float, bool, int, int]:
        """Waits for a step: (sum of losses, gradient norm, whether all was finite, values that float16 cut off,
        overflows in a row at the least loss scale)."""

    def go_on(self) -> None:
        """After a step that was not finite: later ones change weights again."""

    def warm_up(
        self, batches: Sequence[int], seq_len: int, loss_scale: float, qat: bool, looping: bool, averaging: bool
    ) -> None:
        """Runs and records without effect what a step of micro-batches of these sizes runs; makes room for averages."""

    @property
    def counts(self) -> tuple[int, float, int]:
        """Adam's steps, the loss scale, and the steps since it last changed; below 0: the overflows in a row at its
        least."""

    @counts.setter
    def counts(self, counts: tuple[int, float, int], /) -> None: ...
    @property
    def snapshots(self) -> int: ...
    @snapshots.setter
    def snapshots(self, n: int, /) -> None: ...
    def add_snapshot(self) -> None: ...
    def use_snapshot_mean(self) -> None: ...
    def start_ema(self) -> None: ...
    def update_ema(self, decay: float) -> None: ...
    def use_ema(self) -> None: ...
    def state_names(self) -> list[str]: ...
    def read(self, name: str, /) -> _Floats: ...
    def write(self, name: str, values: _Floats, /) -> None: ...
    def bytes(self) -> int: ...

@final
class Ops:
    """The backend's operations on arrays named as in csrc/bindings/ops.cpp. Forward operations return what their
    backward operations take as the array ``saved``.
    """

    def __init__(self, device: int, dtype: str) -> None: ...
    @property
    def repeats(self) -> int:
        """Times that every operation is run again, whose mean is ``seconds``; what it returns then means nothing."""

    @repeats.setter
    def repeats(self, count: int, /) -> None: ...
    @property
    def seconds(self) -> float:
        """Of the last operation alone, without its arrays' way to the device and back."""

    def description(self) -> str: ...
    def product(self, inputs: _Arrays, outputs: _Arrays, /) -> None: ...
    def product_rate(self, m: int, n: int, k: int, values: npt.NDArray[np.float32], seconds: float) -> float:
        """FLOP/s of an (m, k) by (n, k) product, filled with the values over and over; the median over so long."""

    def embed(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def embed_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def qkv(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def qkv_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def heads_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def attention(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def attention_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def project_residual(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def project_residual_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def finish_projection(self, inputs: _Arrays, outputs: _Arrays, clip: int, factor: float, /) -> None: ...
    def mlp_up(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def mlp_up_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def attention_sublayer(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def attention_sublayer_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def mlp_sublayer(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def mlp_sublayer_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def mlp_down_factor(self) -> float: ...
    def head_logits(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def head_loss(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> npt.NDArray[np.uint8]: ...
    def head_loss_backward(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def grad_norm(self, grads: Sequence[_Floats], /, **numbers: float) -> tuple[float, float, bool]:
        """(norm, clipping factor, whether all are finite)."""

    def adam(
        self,
        w: Sequence[_Floats],
        grads: Sequence[_Floats],
        m: Sequence[_Floats],
        v: Sequence[_Floats],
        /,
        **numbers: float,
    ) -> None: ...
    def adapters_begin(
        self, inputs: _Arrays, outputs: _Arrays, seed: int, a_size: int, bound: float, names: Sequence[str], /
    ) -> None: ...
    def adapters_step(self, inputs: _Arrays, outputs: _Arrays, /, **numbers: float) -> None: ...
    def muon(
        self,
        w: Sequence[_Floats],
        grads: Sequence[_Floats],
        momenta: Sequence[_Floats],
        ns_steps: int,
        /,
        **numbers: float,
    ) -> None: ...
    def newton_schulz(
        self, u: _Floats, out: _Floats, steps: int, polynomials: Sequence[Sequence[float]], /
    ) -> None: ...
    def working_copy(self, inputs: _Arrays, outputs: _Arrays, clip: int, factor: float, /) -> None: ...
    def quantize_rows(
        self, w: _Floats, clip: int, q: npt.NDArray[np.int8], scale: npt.NDArray[np.uint16], /
    ) -> None: ...
    def dequantize_rows(self, q: npt.NDArray[np.int8], scale: npt.NDArray[np.uint16], w: _Floats, /) -> None: ...
    def sum(self, x: _Floats, /) -> float: ...
    def axpby(self, a: float, x: _Floats, b: float, y: _Floats, /) -> None: ...

def parameter_table(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter that a configuration implies."""

def newton_schulz(u: _Floats, steps: int, polynomials: Sequence[Sequence[float]]) -> _Floats: ...
def quantize_rows_amax(w: npt.NDArray[np.float32], clip: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]:
    """(rows, columns) -> integers of that shape and (rows,) fp16 scales as bit patterns."""

def quantize_rows_quantile_floor(w: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]: ...
def quantize_rows_rms(
    w: npt.NDArray[np.float32], steps: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]: ...
def dequantize_rows(q: npt.NDArray[np.int8], scale: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]: ...
def encode_integers(q: npt.NDArray[np.int8], scale: npt.NDArray[np.uint16]) -> bytes:
    """(rows, columns) and (rows,) fp16 bit patterns -> their stream in an artifact."""

def decode_integers(stream: bytes, rows: int, columns: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint16]]: ...
def encode_floats(bits: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]) -> bytes:
    """(rows, columns) bit patterns of fp16 or fp32 -> their stream in an artifact."""

def decode_halves(stream: bytes, rows: int, columns: int) -> npt.NDArray[np.uint16]: ...
def decode_singles(stream: bytes, rows: int, columns: int) -> npt.NDArray[np.uint32]: ...
def prune(w: npt.NDArray[np.float32], p: float) -> None:
    """Prunes w in place."""

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]: ...
def run_tasks(count: int, function: Callable[[int], object]) -> None:
    """function(i) for i in range(count), each on some thread of the pool."""

def set_num_threads(count: int) -> None: ...
def get_num_threads() -> int: ...
def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: avx512, avx2 or plain."""

def cpu_product(
    kind: str,
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    c: npt.NDArray[Any],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    from_c: bool = False,
    alpha: float = 1.0,
) -> None:
    """One product of the CPU's kernels on this thread, for tests and benchmarks: c = (c +) op(a)·op(b).

    a, b, c: matrices of one dtype, float32 or float64, with contiguous rows. kind: "chain"; "packed", b packed before;
    "blocks", c += alpha·op(a)·op(b) in blocks of 512 of the depth; "packed blocks", b of every block packed before;
    "symmetric", a·aᵀ with b = a.
    """

def cpu_multiply_adds(steps: int) -> float:
    """Multiply-adds on registers alone, the processor's limit for products; returns the FLOPs that they were."""

def allocation_count() -> int:
    """Native allocations since the library was loaded."""

@final
class CudaDevice:
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]: ...
    @property
    def memory(self) -> int:
        """Bytes."""

    @property
    def problem(self) -> str:
        """Why pgolf cannot use it; empty where it can."""

@final
class CudaStatus:
    @property
    def usable(self) -> bool:
        """Whether a model can live on GPU 0."""

    @property
    def missing(self) -> str:
        """What lacks for that; empty: nothing.

        "backend", "working backend", "driver", "newer driver", "GPU", "newer GPU", "code for GPU" or "cuBLASLt".
        """

    @property
    def problem(self) -> str:
        """The same as a sentence."""

    @property
    def library(self) -> str:
        """The path of the CUDA backend; empty where there is none, and so is all that follows."""

    @property
    def compiled_for(self) -> str:
        """Architectures, separated by commas."""

    @property
    def runtime(self) -> int:
        """The CUDA that the backend was compiled with, 1000 * major + 10 * minor."""

    @property
    def driver(self) -> int:
        """The newest CUDA that the driver supports; 0: there is no driver."""

    @property
    def devices(self) -> list[CudaDevice]: ...
    @property
    def cublaslt(self) -> tuple[str, int]:
        """(path, 10000 * major + 100 * minor + patch); looked for only where GPU 0 can be used."""

def cuda_status() -> CudaStatus: ...
def cuda_dtype(device: int) -> str:
    """ "bfloat16", or "float16" on GPUs that have none; DeviceError where the GPU cannot be used."""

def open_cublaslt() -> tuple[str, int]:
    """Its path and version; DeviceError where there is none that can be used."""

def build_stamp() -> str:
    """The version and a hash of the native sources; a CUDA backend of another stamp is refused."""
