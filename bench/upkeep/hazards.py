"""What the machine code of a Hopper kernel does to products of the tensor cores that are still running.

A product (HGMMA) runs beside the warps that issued it, until `WARPGROUP.DEPBAR` waits for its group. Its left side may
be in registers, which nothing may write meanwhile. Triton 3.6.0 does not always see to it (issue 9433), and the check
of its intermediate code (`aot.pipelined_register_dots`) knows tensors, not what ptxas puts into their registers: so
this one reads the machine code, every loop twice around.
"""

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_BRANCH_TARGET = re.compile(r"(\.L\w+)")
_PENDING = re.compile(r"gsb0, (0x\w+)")
_LEFT_REGISTERS = 4  # of a thread: 64 rows of 32 bytes
_WIDE_LOADS = ("LDS", "LDSM", "LDG", "LD", "LDL", "LDC")
_WITHOUT_RESULT = (
    "ST", "STS", "STG", "STL", "STSM", "LDGSTS", "RED", "BAR", "BRA", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "HGMMA"
)  # fmt: skip


class Instruction(NamedTuple):
    """Name with suffixes, and operands."""

    name: str
    operands: str


def loops(machine_code: str) -> list[list[Instruction]]:
    """Returns the instructions between each label and a branch back to it, if there are products among them."""
    lines, labels, found = machine_code.splitlines(), {}, []
    for number, line in enumerate(lines):
        if match := _LABEL.match(line):
            labels[match[1]] = number
        elif "BRA" in line and (match := _BRANCH_TARGET.search(line)) and match[1] in labels:
            body = instructions(lines[labels[match[1]] : number + 1])
            if any(each.name.startswith("HGMMA") for each in body):
                found.append(body)
    return found


def instructions(lines: list[str]) -> list[Instruction]:
    """Returns the instructions of some lines of machine code."""
    return [Instruction(*match.groups()) for line in lines if (match := _INSTRUCTION.match(line))]


def overwritten_operands(machine_code: str) -> list[str]:
    """Returns a message for each instruction that writes a register of the left side of a product still running."""
    found = []
    for body in (instructions(machine_code.splitlines()), *(body * 2 for body in loops(machine_code))):
        groups: list[set[int]] = []  # issued, oldest first
        group: set[int] = set()
        for each in body:
            if each.name.startswith("HGMMA"):
                group |= _left_side(each)
                if "gsb0" in each.operands:
                    groups, group = [*groups, group], set()
            elif each.name.startswith("WARPGROUP.DEPBAR"):
                pending = int(_PENDING.search(each.operands)[1], 16)
                groups = groups[len(groups) - pending :] if pending else []
            elif _written(each) & group.union(*groups):
                found.append(f"overwrites the left side of a running product: {each.name} {each.operands}")
    return list(dict.fromkeys(found))


def serialised_loops(machine_code: str) -> list[str]:
    """Returns a message for each loop that waits for most of its products one by one.

    ptxas makes them so without a word, where it runs out of registers or cannot tell what a product reads. A product of
    tiles is several instructions, at least four with 64 columns of half precision, with a single wait for them.
    """
    found = []
    for body in loops(machine_code):
        products, waits = (sum(each.name.startswith(name) for each in body) for name in ("HGMMA", "WARPGROUP.DEPBAR"))
        if products > 2 and 2 * waits > products:
            found.append(f"a loop waits {waits} times for {products} products")
    return list(dict.fromkeys(found))


def waits_in_loops(machine_code: str) -> int:
    """Returns the number of waits for products in the shortest loop with products, 0 if there is none."""
    bodies = loops(machine_code)
    if not bodies:
        return 0
    return sum(each.name.startswith("WARPGROUP.DEPBAR") for each in min(bodies, key=len))


def _left_side(product: Instruction) -> set[int]:
    """Registers of the left side of a product, none if it is in shared memory."""
    match = re.match(r"R\d+, R(\d+),", product.operands)
    return set(range(int(match[1]), int(match[1]) + _LEFT_REGISTERS)) if match else set()


def _written(each: Instruction) -> set[int]:
    """Registers that an instruction writes."""
    name, *suffixes = each.name.split(".")
    behind = r"P\w+, " if name in ("SHFL", "ATOM", "ATOMG", "ATOMS", "MATCH") else ""  # a predicate, the first result
    match = re.match(rf"{behind}R(\d+)\b", each.operands)
    if name in _WITHOUT_RESULT or match is None:
        return set()
    count = 1
    if name in _WIDE_LOADS:
        count = 4 if {"128", "4"} & set(suffixes) else 2 if {"64", "2"} & set(suffixes) else 1
    elif name in ("HMMA", "IMMA", "DMMA"):
        count = 4
    elif "WIDE" in suffixes or (name == "CS2R" and "32" not in suffixes) or name.startswith("D"):
        count = 2
    return set(range(int(match[1]), int(match[1]) + count))
