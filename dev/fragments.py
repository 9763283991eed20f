"""Does every wgmma find its A operand again when a loop comes back to it? ptxas (13.0) got that wrong once.

python dev/fragments.py build/gpu/libpgolf_cuda.so    # needs cuobjdump: requirements/wheel.txt, or a toolkit

A loop's product may read registers that were filled before the loop, in it before the product, or at its end for the
next turn. Where the loop uses them for something else behind the product, its second turn reads that: ptxas gives the
registers of such an operand away. csrc/cuda/sm90/instructions.cuh (keep_live) says how that is kept from happening;
here it is looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*([^;]*);")
# What writes no register, though its first operand may be one.
STORES = ("ST", "RED", "BRA", "SYNCS.ARRIVE", "R2UR", "EXIT", "BAR")

FILLS = ("F2FP", "LDSM")  # what makes an A operand


class Instruction(NamedTuple):
    address: int
    name: str
    operands: list[str]

    @property
    def written(self) -> range:
        """Its result's registers."""
        if self.name.startswith(STORES):
            return range(0)
        first = re.match(r"R(\d+)", self.operands[0]) if self.operands else None
        # A predicate comes first where an instruction has two results.
        if first is None and len(self.operands) > 1 and re.match(r"U?P", self.operands[0]):
            first = None if "SETP" in self.name else re.match(r"R(\d+)", self.operands[1])
        if first is None:
            return range(0)
        if (shape := re.match(r"HGMMA\.64x(\d+)x16\.F32", self.name)) is not None:
            count = int(shape[1]) // 2
        elif ".128" in self.name or self.name.endswith(".4"):
            count = 4
        else:
            count = 2 if ".64" in self.name or "WIDE" in self.name else 1
        return range(int(first[1]), int(first[1]) + count)

    @property
    def fragment(self) -> range:
        """The registers of a wgmma's A operand, where it is not in shared memory."""
        if self.name.startswith("HGMMA") and (first := re.match(r"R(\d+)", self.operands[1])) is not None:
            return range(int(first[1]), int(first[1]) + 4)
        return range(0)


def functions(sass: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"Function : ", sass)[1:]:
        name = part.split("\n", 1)[0].strip()
        found[name] = [
            Instruction(int(address, 16), operation, [operand.strip() for operand in operands.split(",")])
            for address, operation, operands in INSTRUCTION.findall(part)
        ]
    return found


def lost_fragments(sass: str) -> list[str]:
    """A sentence for each product in a loop that does not find its operand again."""
    found = []
    for name, code in functions(sass).items():
        loops = [
            (int(target, 16), i.address)
            for i in code
            if i.name.startswith("BRA")
            and (target := re.sub(r"^.*0x", "", i.operands[-1]))
            and int(target, 16) < i.address
        ]
        for product in code:
            registers = set(product.fragment)
            around = [loop for loop in loops if loop[0] <= product.address <= loop[1]]
            if not registers or not around:
                continue
            first, last = min(around, key=lambda loop: loop[1] - loop[0])
            body = [i for i in code if first <= i.address <= last]
            writes = [i for i in body if registers & set(i.written)]
            if not writes or writes[0].address < product.address:
                continue
            # Filled at the end for the next turn is as good, if nothing else is read from there.
            last_writes = [max((i for i in writes if r in i.written), default=None) for r in registers]
            filled = all(i is None or i.name.startswith(FILLS) for i in last_writes)
            others = [
                i for i in body if i is not product and i.address > writes[0].address and registers & set(i.fragment)
            ]
            if not filled or others:
                found.append(
                    f"{name}: the product at {product.address:#x} reads R{min(registers)}, which the loop "
                    f"{first:#x}–{last:#x} uses for something else from {writes[0].address:#x} on."
                )
    return found


def find(tool: str) -> str | None:
    """The one of NVIDIA's packages in this environment, else that of a toolkit in PATH."""
    folders = [os.path.join(folder, "nvidia", "cu13", "bin") for folder in sys.path if folder]
    return shutil.which(tool, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def disassembly(library: str | os.PathLike[str]) -> str:
    """Its code for sm_90a. Raises OSError where a tool is missing or cannot read it."""
    cuobjdump, nvdisasm = find("cuobjdump"), find("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        raise FileNotFoundError("cuobjdump or nvdisasm is missing: pip install -r requirements/wheel.txt")
    path = os.pathsep.join([os.path.dirname(nvdisasm), os.environ.get("PATH", "")])  # cuobjdump calls it
    command = [cuobjdump, "-arch", "sm_90a", "-sass", os.fspath(library)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise OSError(f"cuobjdump cannot disassemble {os.fspath(library)}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        sass = disassembly(sys.argv[1])
    except OSError as error:
        sys.exit(str(error))
    products = sum(bool(i.fragment) for code in functions(sass).values() for i in code)
    found = lost_fragments(sass)
    print("\n".join([*found, f"{products} products with an operand in registers, {len(found)} lost"]))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
