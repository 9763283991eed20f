"""Bare float32 matrix products: what the libraries take for them, with nothing around."""

from __future__ import annotations

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
    """The library that pgolf links, on its own threads; batches are shared among as many callers."""

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

    def seconds(self, product: Product) -> float:
        rng = np.random.default_rng(0)
        a_shape, b_shape = product.operand_shapes()
        operands = min(product.count, _OPERANDS)
        a = rng.standard_normal((operands, *a_shape), dtype=np.float32)
        b = a if product.symmetric else rng.standard_normal((operands, *b_shape), dtype=np.float32)
        c = np.zeros((self.threads, product.m, product.n), dtype=np.float32)
        alone = product.count == 1
        self.set_threads(self.threads if alone else 1)

        def run(thread: int) -> None:
            call = self._call(product)
            for i in range(thread, product.count, self.threads):
                call(a[i % operands].ctypes.data, b[i % operands].ctypes.data, c[thread].ctypes.data)

        if alone:
            return _median_seconds(lambda: run(0))
        return _median_seconds(lambda: list(self.pool.map(run, range(self.threads))))

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

    def seconds(self, product: Product) -> float:
        a_shape, b_shape = product.operand_shapes()
        batch = (product.count,) if product.count > 1 else ()
        a, b = self.torch.randn(*batch, *a_shape), self.torch.randn(*batch, *b_shape)
        out = self.torch.empty(*batch, product.m, product.n)
        a = a.mT if product.transpose_a else a
        b = b.mT if product.transpose_b else b
        with self.torch.inference_mode():
            return _median_seconds(lambda: self.torch.matmul(a, b, out=out))


def total_seconds(library: OpenBLAS | Torch, products: list[Product]) -> float:
    return math.fsum(library.seconds(product) for product in products)
