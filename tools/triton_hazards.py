# SPDX-License-Identifier: Apache-2.0
"""Find registers that are touched while a warp group's product still uses them, in the SASS of a Hopper kernel.

    python -m tools.triton_hazards kernel.sass     # as cuobjdump --dump-sass writes it

HGMMA returns at once. Until a WARPGROUP.DEPBAR says that its group is complete, the tensor cores read its operand A
from registers and write its result D to registers; hardware does not guard them, the compiler must. ptxas 12.8 and 12.9
are known to reuse operands too early (triton-lang/triton#11781, fla-org/flash-linear-attention#1262): results that are
sometimes wrong, on a GPU only. Found here without one:

    writes A   an operand in flight is overwritten
    writes D   a result in flight is overwritten, but for a product that adds to the same one
    reads D    a result is used before the wait

Every path through the kernel is followed, with the products in flight, until nothing new is found: loops too.
Predicated instructions may or may not be executed. B, and A with a descriptor, are in shared memory: not checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.sass import Flow, Instruction, conditional, functions

# Without a register as result, though the first operand may be one; those whose first is memory need not be here
NO_RESULT = ("BAR", "BRX", "BSSY", "BSYNC", "CALL", "FCHK", "NANOSLEEP", "R2P", "RET", "WARPSYNC")
LOADS = ("LD", "LDG", "LDS", "LDL", "LDC", "ATOM", "ATOMG", "ATOMS")
STORES = ("ST", "STG", "STS", "STL", "RED", "ATOM", "ATOMG", "ATOMS")
MOST_GROUPS = 8  # distinguished groups; older ones count as one


class Hazard(NamedTuple):
    address: int
    text: str
    what: str  # "writes A", "writes D" or "reads D"
    product: int  # its address
    registers: tuple[int, ...]

    def __str__(self) -> str:
        names = ", ".join(f"R{register}" for register in self.registers)
        return f"{self.address:#x} {self.text}: {self.what} of the product at {self.product:#x} ({names})"


class Product(NamedTuple):
    address: int
    a: frozenset[int]
    d: frozenset[int]
    commits: bool  # is the last of its group


class Flight(NamedTuple):
    """Products in flight by address, in groups, the oldest first; and those of the incomplete group."""

    groups: tuple[frozenset[int], ...] = ()
    group: frozenset[int] = frozenset()

    def addresses(self) -> frozenset[int]:
        return self.group.union(*self.groups)

    def plus(self, product: Product) -> Flight:
        group = self.group | {product.address}
        if not product.commits:
            return Flight(self.groups, group)
        groups = (*self.groups, group)
        if len(groups) > MOST_GROUPS:  # as one group they are waited for later: nothing is missed
            groups = (groups[0] | groups[1], *groups[2:])
        return Flight(groups)

    def waited(self, left: int) -> Flight:
        return Flight(self.groups[max(0, len(self.groups) - left) :], self.group)


# ----------------------------------------------------------------------------------------------------------- registers


def operands_of(one: Instruction) -> list[str]:
    return [operand.strip() for operand in one.operands.split(",")] if one.operands else []


def span(register: str, width: int) -> frozenset[int]:
    """Return R8 and the width - 1 registers behind it; nothing for RZ or a number."""
    found = re.search(r"\bR(\d+)", register)
    return frozenset(range(int(found[1]), int(found[1]) + width)) if found else frozenset()


def split(one: Instruction) -> tuple[str, list[str]]:
    """Return the result register, "" if there is none, and the other operands. A predicate may stand before it."""
    operands = operands_of(one)
    base = one.name.split(".")[0]
    while operands and re.fullmatch(r"U?P(\d|T|R)", operands[0]):
        operands = operands[1:]
    has = operands and re.fullmatch(r"R(\d+|Z)(\.\w+)*", operands[0]) and "SETP" not in base and base not in NO_RESULT
    return (operands[0], operands[1:]) if has else ("", operands)


def bits(one: Instruction) -> int:
    """Return the width of an instruction's data in registers."""
    options = one.name.split(".")[1:]
    return 4 if "128" in options else 2 if {"64", "U64", "S64", "F64"} & set(options) else 1


def matrices(one: Instruction) -> int:
    """Return the registers of LDSM and STSM: one per matrix."""
    last = one.name.split(".")[-1]
    return int(last) if last in ("2", "4") else 1


def writes(one: Instruction) -> frozenset[int]:
    result, _ = split(one)
    base, *options = one.name.split(".")
    width = 1
    if base in LOADS:
        width = bits(one)
    elif base == "LDSM":
        width = matrices(one)
    elif base.endswith("MMA"):
        width = 2 if "F16" in options and "F32" not in options else 4
    elif base == "CS2R":
        width = 1 if "32" in options else 2
    elif (base == "IMAD" and "WIDE" in options) or base in ("DADD", "DMUL", "DFMA", "LEPC"):
        width = 2
    elif base in ("F2F", "I2F", "F2I") and options:  # of the options that are types, the first is that of the result
        width = 2 if next((x for x in options if re.fullmatch(r"[FSU]\d+", x)), "") in ("F64", "S64", "U64") else 1
    return span(result, width)


def reads(one: Instruction) -> frozenset[int]:
    _, operands = split(one)
    base, *options = one.name.split(".")
    widths = [1] * len(operands)
    if operands and base in STORES:
        widths[-1] = bits(one)
    elif operands and base == "STSM":
        widths[-1] = matrices(one)
    elif base == "IMAD" and "WIDE" in options and len(operands) > 2:
        widths[2] = 2
    elif base == "HMMA":
        widths = [2, 1, 4] if "1688" in options else [4, 2, 4]
    elif base.endswith("MMA"):
        widths = [4] * len(operands)
    elif base in ("DADD", "DMUL", "DFMA", "DSETP") or (base in ("F2F", "I2F", "F2I") and bits(one) == 2):
        widths = [2] * len(operands)
    found: frozenset[int] = frozenset()
    for operand, width in zip(operands, widths, strict=False):
        for register in re.findall(r"\bR\d+(?:\.reuse)?(?:\.64)?", operand):
            inside = "[" in operand  # an address: its own width
            found |= span(register, 2 if register.endswith(".64") else 1 if inside else width)
    return found


def product(one: Instruction) -> Product | None:
    """Return the operands of HGMMA D, A, B, C: D and C are the same, C is RZ in a first product."""
    base, *options = one.name.split(".")
    if not re.fullmatch(r"[A-Z]GMMA", base):
        return None
    shape = re.fullmatch(r"64x(\d+)x\d+", options[0]) if options else None
    operands = operands_of(one)
    if not shape or len(operands) < 3 or not re.fullmatch(r"R\d+", operands[0]):
        raise ValueError(f"{one.name} {one.operands}: an unknown product")
    columns = int(shape[1])
    d = span(operands[0], columns // (4 if options[1:2] == ["F16"] else 2))
    a = span(operands[1], 4) if operands[1].startswith("R") else frozenset()
    return Product(one.address, a, d, "gsb0" in operands)


# ------------------------------------------------------------------------------------------------------------- walking


def hazards(code: list[Instruction]) -> list[Hazard]:
    """Return the hazards by address."""
    products = {found.address: found for one in code if (found := product(one))}
    if not products:
        return []
    flow = Flow(code)
    found: set[Hazard] = set()
    seen = {(0, Flight())}
    waiting = [(0, Flight())]
    while waiting:
        block, flight = waiting.pop()
        for one in flow.blocks[block]:
            if one.predicate == "!PT":
                continue
            if flight != Flight():
                found |= set(touched(one, [products[address] for address in flight.addresses()]))
            if (of_one := products.get(one.address)) is not None:
                if of_one.a & of_one.d:
                    found.add(hazard(one, "writes A", of_one, of_one.a & of_one.d))
                flight = flight.plus(of_one)
            elif one.name.startswith("WARPGROUP.DEPBAR") and not conditional(one):
                flight = flight.waited(int(operands_of(one)[-1], 16))
        for following in flow.after[block]:
            if (following, flight) not in seen:
                seen.add((following, flight))
                waiting.append((following, flight))
    return sorted(found)


def touched(one: Instruction, in_flight: list[Product]) -> Iterator[Hazard]:
    own = product(one)
    written, read = (own.d, own.a) if own else (writes(one), reads(one))
    for other in in_flight:
        if both := written & other.a:
            yield hazard(one, "writes A", other, both)
        # products add to the same registers one after the other
        if (both := written & other.d) and not (own and own.d == other.d):
            yield hazard(one, "writes D", other, both)
        if both := read & other.d:
            yield hazard(one, "reads D", other, both)


def hazard(one: Instruction, what: str, of: Product, registers: frozenset[int]) -> Hazard:
    return Hazard(one.address, f"{one.name} {one.operands}".strip(), what, of.address, tuple(sorted(registers)))


def main(paths: list[str]) -> int:
    count = 0
    for path in paths:
        for name, code in functions(Path(path).read_text()).items():
            found = hazards(code)
            count += len(found)
            print(f"{path} {name}: {sum(product(one) is not None for one in code)} products, {len(found)} hazards")
            print(*(f"  {one}" for one in found), sep="\n", end="\n" if found else "")
    return count > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
