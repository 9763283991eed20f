"""`make wheel`: which wheels are refused, and which glibc the libraries in them are linked with."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from pgolf import _C

ROOT = Path(__file__).parent.parent
MODULE = "pgolf/_C.cpython-311-x86_64-linux-gnu.so"
BACKEND = "pgolf/libpgolf_cuda.so"
ARCHITECTURES = ["75-real", "90a-real", "80-virtual"]


def load(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


fragments = load("dev/fragments.py")
wheel = load("dev/wheel.py")
older_glibc = load("cmake/older_glibc.py")


@pytest.fixture
def good() -> wheel.Wheel:
    info = "pgolf-1.0.dist-info"
    names = [MODULE, BACKEND, "pgolf/__init__.py", f"{info}/RECORD"]
    names += [f"{info}/licenses/{name}" for name in wheel.LICENSES]
    return wheel.Wheel(
        name="pgolf-1.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        size=20_000_000,
        files={name: (2, 1) for name in names},
        damaged=(),
        libraries={
            MODULE: wheel.Library(("libm.so.6",), ()),
            BACKEND: wheel.Library(("libc.so.6", "libgcc_s.so.1"), ()),
        },
        code={"sm_75": 13, "sm_90a": 13, "sm_80 (PTX)": 13},
    )


def without(value: dict, *names: str) -> dict:  # type: ignore[type-arg]
    return {name: what for name, what in value.items() if name not in names}


def test_a_good_wheel_has_no_defects(good: wheel.Wheel) -> None:
    assert wheel.defects(good, ARCHITECTURES) == []


def test_a_good_wheel_without_cuda_has_no_defects(good: wheel.Wheel) -> None:
    plain = dataclasses.replace(
        good, files=without(good.files, BACKEND), libraries=without(good.libraries, BACKEND), code={}
    )
    assert wheel.defects(plain, None) == []
    assert wheel.defects(good, None) == [f"{BACKEND} is in it, although PGOLF_CUDA is off."]
    (missing,) = wheel.defects(plain, ARCHITECTURES)
    assert f"{BACKEND} is not in it" in missing and "PGOLF_CUDA=off" in missing


@pytest.mark.parametrize("size", [60_000_001, 400_000_000])
def test_a_large_wheel_is_refused(good: wheel.Wheel, size: int) -> None:
    (defect,) = wheel.defects(dataclasses.replace(good, size=size), ARCHITECTURES)
    assert f"{size:,} bytes, more than 60,000,000" in defect


@pytest.mark.parametrize(
    "name",
    [
        "pgolf-1.0-cp311-cp311-linux_x86_64.whl",
        "pgolf-1.0-py3-none-manylinux_2_28_x86_64.whl",
        "pgolf-1.0-cp311-cp311-manylinux_2_28_aarch64.whl",
    ],
)
def test_a_wheel_for_this_machine_alone_is_refused(good: wheel.Wheel, name: str) -> None:
    (defect,) = wheel.defects(dataclasses.replace(good, name=name), ARCHITECTURES)
    assert name in defect and "manylinux" in defect


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ({"sm_90a": 13, "sm_80 (PTX)": 13}, "has code for sm_80 (PTX), sm_90a; expected sm_75, sm_80 (PTX), sm_90a"),
        ({"sm_75": 13, "sm_90": 13, "sm_80 (PTX)": 13}, "expected sm_75, sm_80 (PTX), sm_90a"),
        ({"sm_75": 13, "sm_90a": 13, "sm_80": 13}, "expected sm_75, sm_80 (PTX), sm_90a"),
        ({"sm_75": 13, "sm_90a": 13, "sm_80 (PTX)": 13, "sm_120": 13}, "expected sm_75, sm_80 (PTX), sm_90a"),
        ({}, "has code for no GPU; expected"),
        ({"sm_75": 12, "sm_90a": 13, "sm_80 (PTX)": 13}, "12 for sm_75, 13 for sm_80 (PTX), 13 for sm_90a"),
    ],
)
def test_wrong_architectures_are_refused(good: wheel.Wheel, code: dict[str, int], said: str) -> None:
    (defect,) = wheel.defects(dataclasses.replace(good, code=code), ARCHITECTURES)
    assert said in defect


@pytest.mark.parametrize(
    "name", ["libcudart.so.13", "libcublasLt.so.13", "libnccl.so.2", "libcuda.so.1", "libstdc++.so.6"]
)
def test_a_library_that_a_machine_may_lack_is_refused(good: wheel.Wheel, name: str) -> None:
    libraries = {**good.libraries, BACKEND: wheel.Library(("libc.so.6", name), ())}
    (defect,) = wheel.defects(dataclasses.replace(good, libraries=libraries), ARCHITECTURES)
    assert f"{BACKEND} is linked to {name}, " in defect


def test_a_library_of_others_inside_is_refused(good: wheel.Wheel) -> None:
    stranger = "pgolf.libs/libcublasLt-1234.so.13"
    libraries = {**good.libraries, stranger: wheel.Library((), ())}
    (defect,) = wheel.defects(dataclasses.replace(good, libraries=libraries), ARCHITECTURES)
    assert defect == f"Libraries of others are in it: {stranger}."


def test_libraries_are_looked_for_in_no_folder(good: wheel.Wheel) -> None:
    libraries = {**good.libraries, MODULE: wheel.Library((), ("/home/me/lib",))}
    (defect,) = wheel.defects(dataclasses.replace(good, libraries=libraries), ARCHITECTURES)
    assert "/home/me/lib" in defect and "expected no folder" in defect


def test_the_rest_is_refused_too(good: wheel.Wheel) -> None:
    licence = next(name for name in good.files if name.endswith("/LICENSE"))
    broken = dataclasses.replace(
        good,
        files=without(good.files, licence),
        libraries=without(good.libraries, MODULE),
        damaged=("pgolf/model.py",),
    )
    record, missing, module = wheel.defects(broken, ARCHITECTURES)
    assert "RECORD does not agree with pgolf/model.py" in record
    assert "LICENSE is not in it" in missing
    assert "0 native modules" in module


# ---- Architectures


def test_all_architectures_are_those_of_the_build() -> None:
    found = wheel.all_architectures()
    assert {"75-real", "90a-real", "80-virtual"} <= set(found)
    assert wheel.wanted_architectures("") == wheel.wanted_architectures("all") == found


def test_architectures_and_the_code_they_mean() -> None:
    assert wheel.wanted_architectures("86-real, 90a-real;80") == ["86-real", "90a-real", "80"]
    assert wheel.wanted_code(["86-real", "90a-real", "80"]) == {"sm_86", "sm_90a", "sm_80", "sm_80 (PTX)"}


@pytest.mark.parametrize("setting", ["native", "86-real native", "sm_90"])
def test_architectures_of_this_machine_are_refused(setting: str) -> None:
    with pytest.raises(wheel.Refused, match="expected all, or architectures such as 86-real,90a-real"):
        wheel.wanted_architectures(setting)


# ---- Reading


def pack(path: Path, files: dict[str, bytes]) -> None:
    info = "pgolf-1.0.dist-info"
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}\n")
        archive.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))


def test_a_file_that_is_no_wheel(tmp_path: Path) -> None:
    path = tmp_path / "pgolf.whl"
    for content in (None, b"no zip"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(wheel.Refused, match="pgolf.whl is not a wheel"):
            wheel.read(path)


def test_record_is_compared_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "pgolf.whl"
    pack(path, {"pgolf/a.py": b"a", "pgolf/b.py": b"b"})
    assert wheel.read(path).damaged == ()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pgolf/c.py", b"c")
    assert wheel.read(path).damaged == ("pgolf/c.py",)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pgolf/a.py", b"a")
    assert wheel.read(path).damaged == ("RECORD",)


if sys.platform == "linux":

    def test_libraries_are_read(tmp_path: Path) -> None:
        path = tmp_path / "pgolf.whl"
        pack(path, {MODULE: Path(_C.__file__).read_bytes(), "pgolf/__init__.py": b""})
        found = wheel.read(path)
        assert found.libraries.keys() == {MODULE} and found.code == {} and found.damaged == ()
        assert not any("blas" in name for name in found.libraries[MODULE].needed)
        assert found.libraries[MODULE].run_paths == ()
        assert found.size == path.stat().st_size
        assert found.files[MODULE][0] == Path(_C.__file__).stat().st_size

    # ---- Linking with an older glibc's names

    def test_a_library_asks_for_the_functions_of_an_older_glibc(tmp_path: Path) -> None:
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")
        source = tmp_path / "calls.cpp"
        source.write_text(
            "#include <cmath>\n#include <dlfcn.h>\n#include <pthread.h>\n"
            "double calls(double x, pthread_t thread) {\n"
            "  pthread_join(thread, nullptr);\n"
            '  return dlopen("m", RTLD_NOW) ? std::pow(x, x) : std::exp(x) + std::erf(x);\n'
            "}\n"
        )

        def run(*command: str | Path) -> str:
            words = [str(word) for word in command]
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout

        stubs = run(sys.executable, ROOT / "cmake/older_glibc.py", compiler, "nm", tmp_path / "stubs").strip()
        run(compiler, "-shared", "-fPIC", source, "-o", tmp_path / "calls.so", *stubs.split(";"))
        names = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", tmp_path / "calls.so").splitlines()]
        versions = dict(name.split("@") for name in names if "@GLIBC_" in name)
        assert versions["pow"] == versions["exp"] == versions["erf"] == "GLIBC_2.2.5"
        assert versions["dlopen"] == versions["pthread_join"] == "GLIBC_2.2.5"


NM_LIBC = """
000000000007f6a0 T dlopen@@GLIBC_2.34
000000000007f6a0 T dlopen@GLIBC_2.2.5
0000000000088a10 T pthread_create@GLIBC_2.2.5
0000000000088a10 T pthread_create@@GLIBC_2.34
0000000000084d30 T pthread_cond_wait@@GLIBC_2.3.2
0000000000084d30 T pthread_cond_wait@GLIBC_2.2.5
00000000000a0f50 T arc4random@@GLIBC_2.36
0000000000028f50 T fopen@@GLIBC_2.2.5
0000000000028f50 T aio_read@@GLIBC_2.34
0000000000028f50 T aio_read@GLIBC_2.2.5
00000000001f6b0c B __libc_single_threaded@@GLIBC_2.32
"""
NM_LIBM = """
0000000000012340 i exp@@GLIBC_2.29
0000000000012340 i exp@GLIBC_2.2.5
0000000000012340 i expf@@GLIBC_2.27
0000000000012340 i expf@GLIBC_2.2.5
0000000000012340 T fmaximum@@GLIBC_2.35
00000000000e5010 B signgam@@GLIBC_2.23
"""


def test_each_function_goes_where_it_lay_with_the_newest_version_up_to_2_28() -> None:
    found = older_glibc.by_library(NM_LIBC.splitlines(), NM_LIBM.splitlines())
    assert found == {
        "libdl.so.2": {"dlopen": "GLIBC_2.2.5"},
        "libpthread.so.0": {"pthread_create": "GLIBC_2.2.5"},
        "libm.so.6": {"exp": "GLIBC_2.2.5", "expf": "GLIBC_2.27"},
    }


def test_an_older_glibc_keeps_its_own_libraries() -> None:
    lines = ["0000000000012340 T pthread_mutex_lock@@GLIBC_2.2.5", "0000000000012340 T fopen@@GLIBC_2.2.5"]
    assert older_glibc.by_library(lines, []) == {"libm.so.6": {}}


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "pgolf-1.0-cp311-cp311-linux_x86_64.whl"
    pack(path, {"pgolf/__init__.py": b""})
    command = [sys.executable, str(ROOT / "dev" / "wheel.py"), str(path)]
    for name, value, said in (
        ("PGOLF_CUDA_ARCHITECTURES", "90a-real", f"{path.name} is refused: Its name is {path.name}"),
        ("PGOLF_CUDA_ARCHITECTURES", "native", "PGOLF_CUDA_ARCHITECTURES is 'native'"),
    ):
        done = subprocess.run(
            command, env={**os.environ, "PGOLF_CUDA": "on", name: value}, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def sass(*lines: str) -> str:
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    return f"\tFunction : kernel\n{code}\n"


LOAD, PRODUCT = "LDSM.16.M88.4 R8, [R2]", "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24"
PACKED = tuple(f"F2FP.BF16.F32.PACK_AB R{r}, R57, R56" for r in range(8, 12))
SECOND = "HGMMA.64x64x16.F32.BF16 R88, R8, gdesc[UR4].tnspB, R88, gsb0"


@pytest.mark.parametrize(
    "lines",
    [
        (LOAD, PRODUCT, "BRA 0x10"),  # filled before the loop
        (LOAD, PRODUCT, "BRA 0x0"),  # in it, before the product
        (LOAD, PRODUCT, *PACKED, "@!P1 BRA 0x10"),  # at its end, for the next turn
        (LOAD, PRODUCT, *PACKED, SECOND),  # no loop
        (LOAD, PRODUCT, "LDS.128 R12, [R2]", "STS.128 [R8], R8", "BRA 0x10"),  # others' registers
    ],
    ids=range(5),
)
def test_operands_that_a_loop_finds_again(lines: tuple[str, ...]) -> None:
    assert fragments.lost_fragments(sass(*lines)) == []


@pytest.mark.parametrize(
    "lines",
    [
        (LOAD, PRODUCT, *PACKED, SECOND, "@!P1 BRA 0x10"),
        (LOAD, PRODUCT, "LDS.128 R8, [R2]", "BRA 0x10"),
        (LOAD, PRODUCT, *PACKED, "FMUL R9, R3, R4", "BRA 0x10"),
        (LOAD, PRODUCT, "HGMMA.64x128x16.F32.F16 R10, gdesc[UR4], R10", "BRA 0x10"),
    ],
    ids=range(4),
)
def test_operands_that_a_loop_loses(lines: tuple[str, ...], good: wheel.Wheel) -> None:
    (lost,) = fragments.lost_fragments(sass(*lines))
    assert lost.startswith("kernel: the product at 0x10 reads R8, which the loop 0x10–")
    assert wheel.defects(dataclasses.replace(good, lost=(lost,)), ARCHITECTURES) == [lost]
