"""What this machine can run, why not the rest, and the command that would mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pgolf import __version__
from pgolf.common import machine

if TYPE_CHECKING:
    from pgolf._C import CudaStatus

# A run of the base recipe keeps two checkpoints of some 310 MB and writes a third one beside them.
_RUN_BYTES = 1_000_000_000

_OPTIONAL = {
    "matplotlib": ("pictures of losses", "pip install 'pgolf[plot]'"),
    "huggingface-hub": ("pgolf data download", "pip install 'pgolf[data]'"),
    "torch": (".pt and .ptz files, and the tests", "pip install 'pgolf[torch]'"),
    "safetensors": (".safetensors files", "pip install 'pgolf[safetensors]'"),
}
_NEEDED = ("numpy", "rich", "sentencepiece", "tomli-w", "typer", "zstandard")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    status: "ok"; "limited", where something cannot be done or is slower than it could be; "broken", where pgolf cannot
    work at all. found: what is there. mend: the command that would mend it; None where there is nothing to mend, or no
    command would.
    """

    name: str
    status: Literal["ok", "limited", "broken"]
    found: str
    mend: str | None = None


def examine(folder: Path) -> list[Check]:
    """Everything, in the order of a report. ``folder`` is where runs would go; nothing is written there."""
    return [
        Check("pgolf", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        _packages(),
        *_native(),
        _memory(),
        _gpu(),
        _limit(),
        *(_optional(name, *what) for name, what in _OPTIONAL.items()),
        _disk(folder),
    ]


def _packages() -> Check:
    versions = {name: _version(name) for name in _NEEDED}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Check("packages", "broken", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _native() -> Iterator[Check]:
    """The compiled core: the processor's instruction set, threads."""
    try:
        from pgolf import _C
    except ImportError as error:
        yield Check("native core", "broken", f"it cannot be loaded: {error}", "pip install --force-reinstall pgolf")
        return
    yield _instruction_set(_C.cpu_isa)
    yield _threads(_C.get_num_threads)


def _instruction_set(cpu_isa: Callable[[], str]) -> Check:
    name = machine.processor()
    try:
        isa = cpu_isa()
    except ValueError as error:
        return Check("processor", "broken", str(error), "unset PGOLF_CPU_ISA")
    if os.environ.get("PGOLF_CPU_ISA"):
        return Check("processor", "limited", f"{name}; {isa}, as PGOLF_CPU_ISA says", "unset PGOLF_CPU_ISA")
    if isa == "plain":
        return Check("processor", "limited", f"{name}; plain code, as it has neither avx512 nor avx2")
    return Check("processor", "ok", f"{name}; {isa}")


def _threads(get_num_threads: Callable[[], int]) -> Check:
    cores = machine.usable_cores()
    try:
        threads = get_num_threads()
    except ValueError as error:
        return Check("threads", "broken", str(error), "unset PGOLF_NUM_THREADS")
    found = f"{threads:,} on {cores:,} cores"
    if threads == cores:
        return Check("threads", "ok", found)
    if threads > cores:
        return Check("threads", "limited", f"{found}: they wait for each other", f"export PGOLF_NUM_THREADS={cores}")
    return Check("threads", "limited", f"{found}, as PGOLF_NUM_THREADS says", "unset PGOLF_NUM_THREADS")


def _memory() -> Check:
    memory = machine.usable_memory()
    if memory is None:
        return Check("memory", "ok", f"not known on {platform.system()}")
    free, total = memory
    found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    try:
        needed = {name: training_bytes(name) for name in ("base", "tiny")}
    except (ImportError, ValueError):  # of a native core that does not work, another check tells
        return Check("memory", "ok", found)
    found += f"; the recipe base needs {needed['base'] / 1e9:.1f} GB or more, tiny {needed['tiny'] / 1e9:.2f} GB"
    if free >= needed["base"]:
        return Check("memory", "ok", found)
    return Check("memory", "limited", found, "pgolf train --recipe tiny")


def training_bytes(recipe: str) -> int:
    """What training a recipe takes at least: weights, gradients, moments, average, a micro-batch of one sequence."""
    from pgolf import _C
    from pgolf.config import Config
    from pgolf.model import GPT

    config = Config.from_recipe(recipe)
    model = GPT(config.model, seed=None, device="cpu")
    train = config.train
    rule = (train.muon_backend_steps, train.muon_coefficients, train.muon_row_normalize)
    optimizer = _C.Optimizer(model._native, *rule)
    model._native.prepare_training(1, train.train_seq_len)
    # Indented rows share the memory of the row above them.
    planned = sum(size for what, size in model._native.memory_table() if not what.startswith(" "))
    return planned + optimizer.bytes() + 4 * model.num_parameters


def _gpu() -> Check:
    try:
        from pgolf import _C
    except ImportError:  # of which another check tells
        return Check("GPU", "limited", "not known without the native core")
    return _cuda(_C.cuda_status())


def _cuda(status: CudaStatus) -> Check:
    """What the CUDA backend found, or what is missing and the command that brings it."""
    if status.usable:
        path, version = status.cublaslt
        parts = [
            *(gpu.problem or f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB" for gpu in status.devices),
            f"driver for CUDA {status.driver // 1000}.{status.driver % 1000 // 10}",
            f"cuBLASLt {version // 10000}.{version // 100 % 100}.{version % 100}, {path}",
        ]
        return Check("GPU", "ok", "; ".join(part.removesuffix(".") for part in parts))
    if status.missing == "backend" and not machine.kernel_file("/proc/driver/nvidia/version"):
        found = "no NVIDIA driver is installed, and this build of pgolf has no CUDA backend: training runs on the CPU"
        return Check("GPU", "limited", found)
    found = f"{status.problem.removesuffix('.')}: training runs on the CPU"
    return Check("GPU", "limited", found, _mend_cuda(status.missing))


def _mend_cuda(missing: str) -> str | None:
    settings = {"working backend": "PGOLF_CUDA_LIBRARY", "GPU": "CUDA_VISIBLE_DEVICES", "cuBLASLt": "PGOLF_CUBLASLT"}
    setting = settings.get(missing)
    if setting is not None and os.environ.get(setting):
        return f"unset {setting}"
    # Compiled here: a wheel's code is for the GPUs that it was made for.
    install = "pip install --force-reinstall --no-deps --no-binary pgolf pgolf"
    compiler = "" if shutil.which("nvcc") else "PGOLF_NVCC=wheels "
    commands = {
        "backend": f"{compiler}PGOLF_CUDA=on {install}",
        "working backend": f"{compiler}PGOLF_CUDA=on {install}",
        "code for GPU": f"{compiler}PGOLF_CUDA_ARCHITECTURES=native {install}",
        "cuBLASLt": "pip install 'pgolf[cuda]'",
    }
    return commands.get(missing)


def _limit() -> Check:
    """What steps are compared with, on the device that a run would take."""
    try:
        from pgolf import _C
        from pgolf.model import best_device
        from pgolf.system import speed

        limit = speed.known_limit(best_device(_C.cuda_status()))
    except (ImportError, ValueError):  # of a native core that does not work, another check tells
        return Check("limit", "limited", "not known without the native core")
    if limit is None:
        return Check("limit", "ok", "not measured yet: the first run does it, or pgolf doctor --measure")
    return Check("limit", "ok", f"{limit}, measured {limit.date[:10]}")


def _optional(name: str, use: str, mend: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, "limited", f"not installed; for {use}", mend)
    return Check(name, "ok", f"{version}; for {use}")


def _disk(folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "limited", f"{folder} cannot be written to", 'cd "$HOME"')
    if usage.free < _RUN_BYTES:
        found += f"; the checkpoints of the recipe base take {_RUN_BYTES / 1e9:.0f} GB"
        return Check("disk", "limited", found, "pgolf train --run-dir FOLDER, on another disk")
    return Check("disk", "ok", found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
