"""Bare float32 matrix products: what pgolf and the libraries take for them, with nothing around.

    python benchmarks/products.py                 # 12 rounds: about a minute
    PGOLF_CPU_ISA=avx2 OPENBLAS_CORETYPE=Haswell MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/products.py

compares them on one thread for the shapes of a training step, beside the rate of multiply-adds on registers alone:
samples are taken in turns, on a machine that is otherwise idle. cpu_breakdown.py and cpu_workers.py use the libraries
on all threads.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_REPEATS = 9
_SECONDS = 0.2  # at least, after which the median is taken
_OPERANDS = 8  # of a batch of products, so many have operands of their own
_ROW_MAJOR, _PLAIN, _TRANSPOSED, _LOWER = 101, 111, 112, 122


@dataclass(frozen=True)
class Product:
    """C[m, n] = op(A)[m, k]·op(B)[k, n], `count` of them.

    symmetric: B is A itself, transposed, so that half the work need not be done.
    """

    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    count: int = 1
    symmetric: bool = False

    @property
    def flops(self) -> float:
        """Of all of C, also where it is symmetric."""
        return 2.0 * self.m * self.n * self.k * self.count

    def operand_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        a = (self.k, self.m) if self.transpose_a else (self.m, self.k)
        b = (self.n, self.k) if self.transpose_b else (self.k, self.n)
        return a, b


def _median_seconds(function: Callable[[], object]) -> float:
    function()
    samples: list[float] = []
    started = time.perf_counter()
    while len(samples) < _REPEATS or time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        function()
        samples.append(time.perf_counter() - before)
    return statistics.median(samples)


class OpenBLAS:
    """The wheel that SciPy uses, on its own threads; batches are shared among as many callers."""

    def __init__(self, threads: int) -> None:
        import scipy_openblas32

        folder = Path(scipy_openblas32.get_lib_dir())
        (path,) = [file for file in folder.iterdir() if file.name.startswith("libscipy_openblas.")]
        library = ctypes.CDLL(str(path))
        self.gemm, self.syrk = library.scipy_cblas_sgemm, library.scipy_cblas_ssyrk
        for function in (self.gemm, self.syrk):
            function.restype = None
        self.set_threads = library.scipy_openblas_set_num_threads
        config = library.scipy_openblas_get_config
        config.restype = ctypes.c_char_p
        self.description = config().decode().strip()
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def prepare(self, product: Product) -> Callable[[], object]:
        rng = np.random.default_rng(0)
        a_shape, b_shape = product.operand_shapes()
        operands = min(product.count, _OPERANDS)
        a = rng.standard_normal((operands, *a_shape), dtype=np.float32)
        b = a if product.symmetric else rng.standard_normal((operands, *b_shape), dtype=np.float32)
        c = np.zeros((self.threads, product.m, product.n), dtype=np.float32)
        alone = product.count == 1
        self.set_threads(self.threads if alone else 1)
        call = self._call(product)

        def run(thread: int) -> None:
            for i in range(thread, product.count, self.threads):
                call(a[i % operands].ctypes.data, b[i % operands].ctypes.data, c[thread].ctypes.data)

        if alone:
            return lambda: run(0)
        return lambda: list(self.pool.map(run, range(self.threads)))

    def _call(self, p: Product) -> Callable[[int, int, int], None]:
        (_, lda), (_, ldb) = p.operand_shapes()
        ta, tb = (_TRANSPOSED if t else _PLAIN for t in (p.transpose_a, p.transpose_b))
        one, zero, pointer = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_void_p

        def symmetric(a: int, b: int, c: int) -> None:
            self.syrk(_ROW_MAJOR, _LOWER, ta, p.n, p.k, one, pointer(a), lda, zero, pointer(c), p.n)

        def general(a: int, b: int, c: int) -> None:
            self.gemm(_ROW_MAJOR, ta, tb, p.m, p.n, p.k, one, pointer(a), lda, pointer(b), ldb, zero, pointer(c), p.n)

        return symmetric if p.symmetric else general


class Torch:
    """PyTorch's products; it has none for symmetric results."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch: Any = torch

    def prepare(self, product: Product) -> Callable[[], object]:
        a_shape, b_shape = product.operand_shapes()
        batch = (product.count,) if product.count > 1 else ()
        a, b = self.torch.randn(*batch, *a_shape), self.torch.randn(*batch, *b_shape)
        out = self.torch.empty(*batch, product.m, product.n)
        a = a.mT if product.transpose_a else a
        b = b.mT if product.transpose_b else b
        return lambda: self.torch.matmul(a, b, out=out)


class Pgolf:
    """The kernels of csrc/cpu/gemm.h on the calling thread, as the model calls them.

    Sums over tokens (a transposed A) go in blocks of 512, a symmetric result is computed once. What more than 128 rows
    share is packed first, as operations do, and that is part of the time.
    """

    def prepare(self, product: Product) -> Callable[[], None]:
        from pgolf import _C

        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in product.operand_shapes())
        c = np.zeros((product.m, product.n), dtype=np.float32)
        if product.symmetric:
            return lambda: _C.cpu_product("symmetric", a, a, c, transpose_b=True)
        if product.transpose_a:
            return lambda: _C.cpu_product("packed blocks", a, b, c, transpose_a=True)
        kind = "packed" if product.m > 128 else "chain"
        return lambda: _C.cpu_product(kind, a, b, c, transpose_b=product.transpose_b)


def seconds(library: OpenBLAS | Torch, product: Product) -> float:
    """The median of a product, or of a batch of them."""
    return _median_seconds(library.prepare(product))


def total_seconds(library: OpenBLAS | Torch, products: list[Product]) -> float:
    return math.fsum(seconds(library, product) for product in products)


# What the operations of a step multiply, base (d 512, 4,096 tokens) and tiny (d 128, 8,192 tokens): every side but one
# thread's share of it is whole.
SHAPES = {
    "base, attention in and out": Product(4096, 512, 512, transpose_b=True),
    "base, MLP up": Product(4096, 1536, 512, transpose_b=True),
    "base, MLP down": Product(4096, 512, 1536, transpose_b=True),
    "base, backward of up": Product(4096, 512, 1536),
    "base, backward of down": Product(4096, 1536, 512),
    "base, head": Product(4096, 1024, 512, transpose_b=True),
    "base, weight gradient": Product(512, 512, 4096, transpose_a=True),
    "base, weight gradient of up": Product(1536, 512, 4096, transpose_a=True),
    "base, weight gradient of down": Product(512, 1536, 4096, transpose_a=True),
    "tiny, attention in and out": Product(8192, 128, 128, transpose_b=True),
    "tiny, MLP up": Product(8192, 384, 128, transpose_b=True),
    "tiny, backward of up": Product(8192, 128, 384),
    "tiny, weight gradient": Product(128, 128, 8192, transpose_a=True),
    "tiny, weight gradient of up": Product(384, 128, 8192, transpose_a=True),
    "Newton–Schulz, X·Xᵀ": Product(512, 512, 1536, transpose_b=True, symmetric=True),
    "Newton–Schulz, P·X": Product(512, 1536, 512),
    "attention, q·kᵀ": Product(64, 512, 64, transpose_b=True),
    "attention, p·v": Product(64, 64, 512),
    "few rows": Product(128, 512, 512, transpose_b=True),
}
GOAL_RATIO, GOAL_SHARE, GOAL_SIDE = 0.95, 0.85, 128  # of the better library; of the peak, where no side is shorter


def measure(libraries: dict[str, OpenBLAS | Torch | Pgolf], product: Product, rounds: int) -> dict[str, Any]:
    """GFLOP/s of each, medians; medians of every round's ratio to the better library and share of the peak."""
    calls = [library.prepare(product) for library in libraries.values()]
    rounds_of = []
    for _ in range(1 + rounds):
        samples = [product.flops / _seconds(call) / 1e9 for call in calls]
        rounds_of.append([*samples, _peak()])
    rates = np.array(rounds_of)[1:]
    own, others, peak = rates[:, 0], rates[:, 1:-1], rates[:, -1]
    done = 0.5 * (1 + 1 / product.n) if product.symmetric else 1.0  # of the product's FLOPs
    return {
        "gflops": dict(zip([*libraries, "peak"], np.median(rates, axis=0).tolist(), strict=True)),
        "ratio": float(np.median(own / others.max(axis=1))),
        "share_of_peak": float(np.median(done * own / peak)),
    }


def main() -> None:
    import common

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="samples of each, taken in turns (default: 12)")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/products/DATE-COMMIT.json")
    parser.add_argument("--quick", action="store_true", help="a smoke run of one round; writes nothing without --out")
    args = parser.parse_args()
    from pgolf import _C

    libraries: dict[str, OpenBLAS | Torch | Pgolf] = {"pgolf": Pgolf(), "OpenBLAS": OpenBLAS(1), "MKL": Torch(1)}
    result: dict[str, Any] = {
        "date": common.now(),
        **common.git_state(),
        "machine": common.cpu_machine(),
        "instruction_set": _C.cpu_isa(),
        "openblas": libraries["OpenBLAS"].description,
        "rounds": 1 if args.quick else args.rounds,
        "products": {},
    }
    print(f"{_C.cpu_isa()}; {libraries['OpenBLAS'].description}")
    print("| GFLOP/s on one thread | m × n × k | pgolf | OpenBLAS | MKL | to the better | of the peak |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, product in SHAPES.items():
        found = result["products"][name] = measure(libraries, product, result["rounds"])
        cells = " | ".join(f"{found['gflops'][library]:.0f}" for library in libraries)
        print(
            f"| {name} | {product.m} × {product.n} × {product.k} | {cells} | {found['ratio']:.2f} | "
            f"{found['share_of_peak']:.0%} |",
            flush=True,
        )
    short = [
        name
        for name, found in result["products"].items()
        if found["ratio"] < GOAL_RATIO
        or (min(SHAPES[name].m, SHAPES[name].n, SHAPES[name].k) >= GOAL_SIDE and found["share_of_peak"] < GOAL_SHARE)
    ]
    print(f"below {GOAL_RATIO} of the better library or {GOAL_SHARE:.0%} of the peak: {', '.join(short) or 'none'}")
    common.write_result(result, "products", args.out, args.quick)


def _seconds(call: Callable[[], object]) -> float:
    """One sample: as many calls as take a few milliseconds, as a clock of a busy machine is no finer."""
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < 0.02:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls


def _peak() -> float:
    """GFLOP/s of multiply-adds on registers alone."""
    from pgolf import _C

    began = time.perf_counter()
    return _C.cpu_multiply_adds(1_000_000) / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    main()
