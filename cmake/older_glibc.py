"""Makes libraries to link with, so that what is linked runs with glibc 2.28 too (PGOLF_PORTABLE).

When glibc moves or changes a function, it gives it a new version and keeps the old one for programs linked before; the
linker takes the newest. dlopen, pthread_create or pow so ask for the glibc of the machine that builds. The libraries
made here hold nothing but the names of such functions, under the newest version up to 2.28 and in the library where
they lay then. At run time glibc itself answers, that of 2.28 or that of today: the same names as those of a program
linked long ago.

Usage: python older_glibc.py CXX NM FOLDER; prints the paths of the libraries, separated by semicolons.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

OLDEST = (2, 28)
# Where functions lay before 2.34 moved them to libc.so.6, by the beginnings of their names.
FORMER = {
    "dl": "libdl.so.2",
    "pthread_": "libpthread.so.0",
    "__pthread_": "libpthread.so.0",
    "sem_": "libpthread.so.0",
    "shm_": "librt.so.1",
}


def functions(nm_lines: Iterable[str], *, changed: bool) -> dict[str, str]:
    """The functions of a library with their newest version up to OLDEST.

    changed: those alone whose default version is a newer one. nm_lines: what `nm -D` prints of the library.
    """
    default: dict[str, tuple[int, ...]] = {}
    older: dict[str, tuple[int, ...]] = {}
    for line in nm_lines:
        found = re.fullmatch(r"\w+ [TWi] (\w+)(@@?)GLIBC_([\d.]+)", line.strip())
        if found is None:
            continue
        name, version = found[1], tuple(map(int, found[3].split(".")))
        if found[2] == "@@":
            default[name] = version
        if version <= OLDEST:
            older[name] = max(version, older.get(name, ()))
    return {
        name: "GLIBC_" + ".".join(map(str, version))
        for name, version in older.items()
        if name in default and (default[name] > OLDEST or not changed)
    }


def by_library(libc: Iterable[str], libm: Iterable[str]) -> dict[str, dict[str, str]]:
    """The functions of each library to make, from what `nm -D` prints of today's libc.so.6 and libm.so.6."""
    found: dict[str, dict[str, str]] = {}
    for name, version in functions(libc, changed=True).items():
        library = next((library for start, library in FORMER.items() if name.startswith(start)), None)
        if library is not None:
            found.setdefault(library, {})[name] = version
    # Two libraries of one name cannot be linked, so this one stands for the whole of today's.
    found["libm.so.6"] = functions(libm, changed=False)
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def link(cxx: str, folder: Path, library: str, versions: dict[str, str]) -> Path:
    source, names, result = (folder / f"{library}{suffix}" for suffix in (".c", ".map", ""))
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(versions)), encoding="utf-8")
    groups: dict[str, list[str]] = {}
    for name, version in sorted(versions.items()):
        groups.setdefault(version, []).append(name)
    names.write_text(
        "".join(f"{version} {{ {' '.join(f'{name};' for name in group)} }};\n" for version, group in groups.items()),
        encoding="utf-8",
    )
    options = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{library},--version-script={names}"]
    subprocess.run([cxx, *options, "-x", "c", str(source), "-o", str(result)], check=True)
    return result


def main(cxx: str, nm: str, folder: str) -> None:
    def listing(library: str) -> list[str]:
        file = output_of(cxx, f"-print-file-name={library}").strip()
        return output_of(nm, "-D", "--defined-only", file).splitlines()

    Path(folder).mkdir(parents=True, exist_ok=True)
    libraries = by_library(listing("libc.so.6"), listing("libm.so.6"))
    print(";".join(str(link(cxx, Path(folder), library, names)) for library, names in sorted(libraries.items())))


if __name__ == "__main__":
    main(*sys.argv[1:])
