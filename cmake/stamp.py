"""Writes the header with the build stamp: the version and a hash over the native sources.

The extension and the CUDA backend are two libraries with one struct of functions between them. Both are compiled with
this stamp, and a backend that carries another one is refused.

Usage: python stamp.py SOURCE_FOLDER HEADER
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".def"}


def stamp(root: Path) -> str:
    init = (root / "python" / "pgolf" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    if version is None:
        raise SystemExit("python/pgolf/__init__.py gives no __version__.")
    native = root / "csrc"
    names = sorted(path.relative_to(native).as_posix() for path in native.rglob("*") if path.suffix in SUFFIXES)
    content = hashlib.sha256()
    for name in names:
        data = (native / name).read_bytes().replace(b"\r\n", b"\n")
        content.update(f"{name} {len(data)}\n".encode() + data)
    return f"{version[1]}+{content.hexdigest()[:16]}"


def main(root: str, header: str) -> None:
    text = f'#define PGOLF_BUILD_STAMP "{stamp(Path(root))}"\n'
    target = Path(header)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
