"""Bare float32 matrix products: what pgolf and the libraries take for them, with nothing around.

python benchmarks/products.py [--rounds 12]

compares them on one thread for the shapes of a training step: every library's samples are taken in turns, and the
medians are printed in GFLOP/s. cpu_breakdown.py and cpu_workers.py use the libraries on all threads.
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

    Sums over tokens (a transposed A) go in blocks of 512, a symmetric result is computed once, a transposed B is packed
    before, which is part of the time.
    """

    def prepare(self, product: Product) -> Callable[[], None]:
        from pgolf import _C

        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in product.operand_shapes())
        c = np.zeros((product.m, product.n), dtype=np.float32)
        if product.symmetric:
            return lambda: _C.cpu_product("symmetric", a, a, c, transpose_b=True)
        if product.transpose_a:
            return lambda: _C.cpu_product("blocks", a, b, c, transpose_a=True)
        kind = "packed" if product.transpose_b else "chain"
        return lambda: _C.cpu_product(kind, a, b, c, transpose_b=product.transpose_b)


def seconds(library: OpenBLAS | Torch, product: Product) -> float:
    """The median of a product, or of a batch of them."""
    return _median_seconds(library.prepare(product))


def total_seconds(library: OpenBLAS | Torch, products: list[Product]) -> float:
    return math.fsum(seconds(library, product) for product in products)


# A training step of base and of narrower models: what a chunk of 128 rows multiplies, weight gradients as tasks see
# them, Newton-Schulz.
SHAPES = {
    "forward, 128 rows": Product(128, 512, 512, transpose_b=True),
    "forward, 128 rows, MLP": Product(128, 1536, 512, transpose_b=True),
    "backward, 128 rows, MLP": Product(128, 512, 1536),
    "forward, 4,096 rows": Product(4096, 512, 512, transpose_b=True),
    "weight gradient, 4,096 tokens": Product(128, 512, 4096, transpose_a=True),
    "weight gradient, 8,192 tokens, d 128": Product(128, 128, 8192, transpose_a=True),
    "Newton-Schulz, X·Xᵀ": Product(512, 512, 1536, transpose_b=True, symmetric=True),
    "Newton-Schulz, P·X": Product(512, 1536, 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="samples of each, taken in turns (default: 12)")
    rounds = parser.parse_args().rounds
    from pgolf import _C

    libraries = {f"pgolf, {_C.cpu_isa()}": Pgolf(), "OpenBLAS": OpenBLAS(1), "torch": Torch(1)}
    print(libraries["OpenBLAS"].description)  # type: ignore[union-attr]
    print(f"| GFLOP/s on one thread | m × n × k | {' | '.join(libraries)} | pgolf / the better |")
    print("| --- | --- |" + " ---: |" * (len(libraries) + 1))
    for name, product in SHAPES.items():
        calls = [library.prepare(product) for library in libraries.values()]
        samples = np.array([[_seconds(call) for call in calls] for _ in range(1 + rounds)])[1:]
        rates = product.flops / np.median(samples, axis=0) / 1e9
        cells = " | ".join(f"{rate:.0f}" for rate in rates)
        shape = f"{product.m} × {product.n} × {product.k}"
        print(f"| {name} | {shape} | {cells} | {rates[0] / rates[1:].max():.2f} |")


def _seconds(call: Callable[[], object]) -> float:
    """One sample: as many calls as take a few milliseconds, as a clock of a busy machine is no finer."""
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < 0.02:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls


if __name__ == "__main__":
    main()
