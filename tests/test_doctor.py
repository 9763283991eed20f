"""`pgolf doctor`: what is found, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pgolf
from pgolf import _C
from pgolf.common import machine
from pgolf.system import doctor
from pgolf.system.doctor import Check, examine
from pgolf.training.trainer import Trainer
from tests.runs import pgolf_, tiny

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGOLF_CPU_ISA", "PGOLF_NUM_THREADS", "PGOLF_CUDA_LIBRARY", "PGOLF_CUBLASLT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The kernel's files, by their paths, in place of this machine's."""
    files = {"/proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   8000000 kB\n"}
    monkeypatch.setattr(machine, "kernel_file", lambda path: files.get(path, ""))
    return files


def raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def found(checks: list[Check], name: str) -> Check:
    (check,) = (check for check in checks if check.name == name)
    return check


# The whole


def test_this_machine(tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    checks = examine(tmp_path)
    assert set(tmp_path.iterdir()) == before
    names = [check.name for check in checks]
    assert names == [
        "pgolf", "packages", "processor", "threads", "memory", "GPU", "limit", "matplotlib",
        "huggingface-hub", "torch", "safetensors", "disk",
    ]  # fmt: skip
    assert not [check for check in checks if check.status == "broken"]
    assert found(checks, "pgolf").found.startswith(f"{pgolf.__version__}, Python {sys.version.split()[0]}")
    assert _C.cpu_isa() in found(checks, "processor").found
    assert found(checks, "threads").found.startswith(f"{pgolf.get_num_threads()} on ")
    assert "GB free; the recipe base needs" in found(checks, "memory").found
    assert found(checks, "GPU").status == ("ok" if _C.cuda_status().usable else "limited")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = pgolf_("doctor", "--json")
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert value["works"] is True and value["checks"][0]["name"] == "pgolf"
    shown = pgolf_("doctor")
    assert shown.exit_code == 0
    lines = [line for line in shown.stdout.splitlines() if not line.startswith("to mend ")]
    for line, check in zip(lines, value["checks"], strict=True):
        assert line.split()[:2] == [check["status"], check["name"]]


def test_the_command_prints_what_mends_and_fails_where_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        Check("a", "ok", "well"),
        Check("bb", "limited", "slow", "pip install 'x[y]'"),
        Check("c", "broken", "no"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda folder: checks)
    result = pgolf_("doctor")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "ok       a   well",
        "limited  bb  slow",
        "to mend      pip install 'x[y]'",
        "broken   c   no",
    ]
    result = pgolf_("doctor", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["works"] is False


# Packages


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = doctor._version
    missing = {"zstandard", "typer", "matplotlib", "huggingface-hub", "torch", "safetensors"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in missing else there(name))
    checks = examine(tmp_path)
    assert found(checks, "packages") == Check(
        "packages", "broken", "missing: typer, zstandard", "pip install typer zstandard"
    )
    assert found(checks, "matplotlib").mend == "pip install 'pgolf[plot]'"
    assert found(checks, "huggingface-hub").mend == "pip install 'pgolf[data]'"
    assert found(checks, "torch").mend == "pip install 'pgolf[torch]'"
    assert found(checks, "safetensors").mend == "pip install 'pgolf[safetensors]'"
    optional = ("matplotlib", "huggingface-hub", "torch", "safetensors")
    assert {found(checks, name).status for name in optional} == {"limited"}


def test_needed_packages_are_those_of_the_metadata() -> None:
    """The ones that every Python needs, and the optional ones by the extras that bring them."""
    import importlib.metadata

    requirements = importlib.metadata.requires("pgolf") or []
    needed = {line.split(">")[0].split("<")[0].strip() for line in requirements if ";" not in line}
    assert needed == set(doctor._NEEDED)
    extras = {"plot": "matplotlib", "data": "huggingface-hub", "torch": "torch", "safetensors": "safetensors"}
    for extra, name in extras.items():
        assert any(line.startswith(name) and f'"{extra}"' in line.replace("'", '"') for line in requirements)
        assert f"pgolf[{extra}]" in shlex.split(doctor._OPTIONAL[name][1])


def test_a_core_that_cannot_be_loaded() -> None:
    program = """
import sys
sys.modules["pgolf._C"] = None
from pgolf.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program, "doctor"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert "broken   native core      it cannot be loaded: " in done.stdout
    assert "pip install --force-reinstall pgolf" in done.stdout
    assert "memory" in done.stdout and "needs" not in done.stdout


# Processor and threads


def test_the_processor(kernel: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel["/proc/cpuinfo"] = "processor\t: 0\nmodel name\t: Fast: 9000\nflags\t: avx2\n\nprocessor\t: 1\n"
    assert doctor._instruction_set(lambda: "avx2") == Check("processor", "ok", "Fast: 9000; avx2")
    plain = doctor._instruction_set(lambda: "plain")
    assert (plain.status, plain.mend) == ("limited", None) and "neither avx512 nor avx2" in plain.found
    monkeypatch.setenv("PGOLF_CPU_ISA", "plain")
    asked = doctor._instruction_set(lambda: "plain")
    assert (asked.status, asked.mend) == ("limited", "unset PGOLF_CPU_ISA") and "as PGOLF_CPU_ISA says" in asked.found
    broken = doctor._instruction_set(raising(ValueError('PGOLF_CPU_ISA is "sse".')))
    assert broken == Check("processor", "broken", 'PGOLF_CPU_ISA is "sse".', "unset PGOLF_CPU_ISA")


def test_threads(kernel: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert doctor._threads(lambda: 8) == Check("threads", "ok", "8 on 8 cores")
    assert doctor._threads(lambda: 3).mend == "unset PGOLF_NUM_THREADS"
    assert doctor._threads(lambda: 9).mend == "export PGOLF_NUM_THREADS=8"
    broken = doctor._threads(raising(ValueError("It must be a number.")))
    assert broken == Check("threads", "broken", "It must be a number.", "unset PGOLF_NUM_THREADS")
    for limit, cores in (("max 100000\n", 8), ("150000 100000\n", 2), ("9000000 100000\n", 8), ("50000 100000\n", 1)):
        kernel["/sys/fs/cgroup/cpu.max"] = limit
        assert machine.usable_cores() == cores


@pytest.mark.parametrize(
    ("counts", "cores"),
    [
        ({"process_cpu_count": lambda: 3, "cpu_count": lambda: 12}, 3),
        ({"cpu_count": lambda: 12}, 12),
        ({"cpu_count": lambda: None}, 1),
    ],
)
def test_cores_and_memory_on_macos_and_windows(
    counts: dict[str, Any], cores: int, kernel: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    for name, function in counts.items():
        monkeypatch.setattr(os, name, function, raising=False)
    kernel.clear()
    assert machine.usable_cores() == cores
    assert doctor._threads(lambda: cores).status == "ok"
    assert machine.usable_memory() is None
    assert doctor._memory() == Check("memory", "ok", f"not known on {platform.system()}")


@pytest.mark.parametrize("name", ["PGOLF_CPU_ISA", "PGOLF_NUM_THREADS"])
def test_an_environment_that_says_nonsense(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pgolf", "doctor"], capture_output=True, text=True, env={**os.environ, name: "many"}
    )
    assert done.returncode == 1 and done.stderr == "", done.stderr
    assert f'{name} is "many"' in done.stdout and f"unset {name}" in done.stdout


# Memory, GPU and disk


def test_memory(kernel: dict[str, str]) -> None:
    assert machine.usable_memory() == (8_192_000_000, 16_384_000_000)
    check = doctor._memory()
    assert check.status == "ok" and check.found.startswith("8.2 of 16.4 GB free; the recipe base needs ")
    kernel["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.usable_memory() == (8_192_000_000, 16_384_000_000)
    kernel["/sys/fs/cgroup/memory.max"] = "500000000\n"
    check = doctor._memory()
    assert check.found.startswith("0.5 of 0.5 GB free; ")
    assert (check.status, check.mend) == ("limited", "pgolf train --recipe tiny")


def test_the_memory_of_training_is_what_training_takes(small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(micro_batch_seqs=1, swa_start_frac=1.0, warmdown_iters=6)
    monkeypatch.setattr("pgolf.config.keys.Config.from_recipe", lambda name: config)
    trainer = Trainer(config, small_corpus)
    list(trainer)
    assert trainer.snapshots
    rows = {what.partition(",")[0]: size * 2**20 for what, size in trainer.memory_table()}
    arena = rows["training arena"]
    taken = rows["weights"] + rows["gradients"] + rows["optimizer"]
    # What the optimizer computes in is made by its first step: a small part of a model of any size.
    assert doctor.training_bytes("tiny") - arena == pytest.approx(taken, rel=0.1)


def cuda(missing: str = "", problem: str = "", **fields: Any) -> Any:
    status = {"devices": [], "driver": 0, "cublaslt": ("", 0), "usable": not missing}
    return SimpleNamespace(missing=missing, problem=problem, **{**status, **fields})


def gpu(name: str, memory: int, problem: str = "") -> Any:
    return SimpleNamespace(name=name, memory=memory, problem=problem)


def test_gpus() -> None:
    devices = [gpu("NVIDIA H100 80GB HBM3", 80 * 2**30), gpu("Tesla P4", 2**33, "GPU 1 (Tesla P4, …) is too old; …")]
    status = cuda(devices=devices, driver=13020, cublaslt=("/lib/libcublasLt.so.13", 131000))
    assert doctor._cuda(status) == Check(
        "GPU",
        "ok",
        "NVIDIA H100 80GB HBM3, 80 GiB; GPU 1 (Tesla P4, …) is too old; …; driver for CUDA 13.2; "
        "cuBLASLt 13.10.0, /lib/libcublasLt.so.13",
    )


COMPILE = "pip install --force-reinstall --no-deps --no-binary pgolf pgolf"


@pytest.mark.parametrize(
    ("missing", "mend"),
    [
        ("backend", f"PGOLF_CUDA=on {COMPILE}"),
        ("working backend", f"PGOLF_CUDA=on {COMPILE}"),
        ("driver", None),
        ("newer driver", None),
        ("GPU", None),
        ("newer GPU", None),
        ("code for GPU", f"PGOLF_CUDA_ARCHITECTURES=native {COMPILE}"),
        ("cuBLASLt", "pip install 'pgolf[cuda]'"),
    ],
)
def test_what_a_gpu_lacks(
    missing: str, mend: str | None, kernel: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel["/proc/driver/nvidia/version"] = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\n"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    status = cuda(missing, "This and that.")
    assert doctor._cuda(status) == Check("GPU", "limited", "This and that: training runs on the CPU", mend)
    monkeypatch.setattr("shutil.which", lambda program: None)
    wheels = f"PGOLF_NVCC=wheels {mend}" if mend and "force-reinstall" in mend else mend
    assert doctor._cuda(status).mend == wheels
    for name in ("PGOLF_CUDA_LIBRARY", "CUDA_VISIBLE_DEVICES", "PGOLF_CUBLASLT"):
        monkeypatch.setenv(name, "x")
    settings = {"working backend": "PGOLF_CUDA_LIBRARY", "GPU": "CUDA_VISIBLE_DEVICES", "cuBLASLt": "PGOLF_CUBLASLT"}
    assert doctor._cuda(status).mend == (f"unset {settings[missing]}" if missing in settings else wheels)


def test_neither_a_driver_nor_the_backend(kernel: dict[str, str]) -> None:
    check = doctor._cuda(cuda("backend", "This build of pgolf has no CUDA backend: …"))
    assert check.found == (
        "no NVIDIA driver is installed, and this build of pgolf has no CUDA backend: training runs on the CPU"
    )
    assert (check.status, check.mend) == ("limited", None)


def test_no_core_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pgolf, "_C")
    monkeypatch.setitem(sys.modules, "pgolf._C", None)
    assert doctor._gpu() == Check("GPU", "limited", "not known without the native core")


def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(10**10, 0, 5 * 10**9))
    assert doctor._disk(tmp_path) == Check("disk", "ok", f"5.0 of 10.0 GB free in {tmp_path}")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(10**10, 0, 10**8))
    check = doctor._disk(tmp_path)
    assert check.status == "limited" and "the checkpoints of the recipe base take 1 GB" in check.found
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    assert doctor._disk(tmp_path).mend == 'cd "$HOME"'
