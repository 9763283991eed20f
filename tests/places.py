"""Where operations and models run in tests: the CPU, rounding to 16 bits where a GPU stores them, and the GPU.

On a machine without a GPU the tests that need one do not exist: nothing is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pgolf import _C
from pgolf.common.errors import DeviceError


@dataclass(frozen=True)
class Place:
    device: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.device} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def description(self) -> str:
        """What the backend says of itself."""
        return str(_C.Ops(0 if self.device == "cuda" else -1, self.dtype).description())

    @property
    def ulp(self) -> float:
        """The distance between neighbours at 1."""
        return float(torch.finfo(self.torch_dtype).eps)

    def round(self, x: np.ndarray) -> np.ndarray:
        """The nearest numbers of the storage dtype, as float64."""
        return torch.tensor(x, dtype=torch.float64).to(torch.float32).to(self.torch_dtype).double().numpy()


GPU = bool(_C.cuda_status().usable)


def _has(dtype: str) -> bool:
    """bfloat16 needs compute capability 8.0, in the GPU and in the code that PGOLF_CUDA_PATH allows."""
    try:
        _C.Ops(0, dtype)
    except DeviceError:
        return False
    return True


GPU_DTYPES = [dtype for dtype in ("float32", "bfloat16", "float16") if GPU and _has(dtype)]
GPU_PLACES = [Place("cuda", dtype) for dtype in GPU_DTYPES]
ROUNDING_PLACES = [Place("cpu", "bfloat16"), Place("cpu", "float16")]
"""What a GPU of that dtype computes, up to the order of its sums."""
