"""Fails the build if object files of one instruction set hold code that machines without it would run.

The linker keeps one copy of every weak function (inline functions, template instantiations), and static initialisers
run whenever the module is loaded. Were such code compiled with AVX-512, a machine without it would stop with an illegal
instruction, far from any kernel. Hence every weak function must carry its instruction set's namespace in its name, and
there must be no static initialiser.

Usage: python check_kernel_symbols.py NM NAMESPACE OBJECT...
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable


def shared_code(nm_lines: Iterable[str], namespace: str) -> list[str]:
    """The offending symbols, sorted, among the lines that nm prints without demangling."""
    found = set()
    own = f"{len(namespace)}{namespace}"  # how the Itanium ABI spells the namespace inside a mangled name
    for line in nm_lines:
        weak_code = re.fullmatch(r"[0-9a-fA-F]+ W (\S+)", line.strip())  # V and u are data
        if weak_code and own not in weak_code[1]:
            found.add(weak_code[1])
        initialiser = re.fullmatch(r"[0-9a-fA-F]+ t (_GLOBAL__sub_I_\S+)", line.strip())
        if initialiser:
            found.add(initialiser[1])
    return sorted(found)


def main(nm: str, namespace: str, *objects: str) -> int:
    listing = subprocess.run([nm, *objects], check=True, capture_output=True, text=True).stdout
    found = shared_code(listing.splitlines(), namespace)
    for name in found:
        print(f"{name} is compiled for {namespace}, but any machine could run it.", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
