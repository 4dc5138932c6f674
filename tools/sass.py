# SPDX-License-Identifier: Apache-2.0
"""Analysis of SASS, the machine code of NVIDIA GPUs: instructions by kind, control flow, loops and paths.

Shared by triton_budget.py and cuda_budget.py."""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA", "UTCMMA")
KINDS: dict[str, tuple[str, ...]] = {
    "tensor core": TENSOR_CORE,
    "exp2": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "FMNMX", "FMNMX3", "FSEL", "FSETP", "F2FP", "FFMA2", "FADD2", "FMUL2"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"),
    "global": ("LDG", "STG", "LDGSTS"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL", "MOVM", "PRMT"),
    "sync": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "SYNCS", "MEMBAR", "FENCE"),
}
OF = {name: kind for kind, names in KINDS.items() for name in names}


def kind(name: str) -> str:
    """Return the kind; the default is integer: addresses, predicates, copies."""
    return OF.get(name.split(".")[0], "integer")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str
    predicate: str = ""


def instructions(listing: str) -> list[Instruction]:
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);"
    return [
        Instruction(int(address, 16), name, operands, predicate)
        for address, predicate, name, operands in re.findall(pattern, listing)
    ]


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Return instructions by mangled name."""
    parts = re.split(r"Function : (\S+)", listing)
    return {name: instructions(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def cuobjdump(*arguments: str | Path, folder: Path | None = None) -> str:
    """Run cuobjdump of Triton's CUDA tools: nvcc alone comes without."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("cuobjdump is that of the triton package, which is missing")
    tool = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True, cwd=folder).stdout


# ------------------------------------------------------------------------------------------------------- control flow


class Loop(NamedTuple):
    """A natural loop: the blocks that reach the header again without leaving the blocks that it dominates."""

    header: int
    blocks: frozenset[int]


class Flow:
    """The reachable basic blocks of a kernel, and their successors.

    A branch for diverged warps (BRA.DIV, and what it leads to) is not taken, and a call returns. A call with a
    predicate is how ptxas writes a jump out of a loop for sm_80: like a branch."""

    def __init__(self, code: list[Instruction]) -> None:
        addresses = [instruction.address for instruction in code]
        starts = {0}
        jumps: dict[int, int] = {}  # from the index of a branch to that of its target
        for i, (_, name, operands, predicate) in enumerate(code):
            base = name.split(".")[0]
            if base in ("BRX", "BRXU", "JMX", "JMP"):
                raise ValueError(f"{name} {operands}: an unknown jump")
            if (base == "BRA" and not name.startswith("BRA.DIV")) or (base == "CALL" and predicate):
                target = re.search(r"0x([0-9a-f]+)\s*$", operands)
                assert target, f"{name} {operands}"
                jumps[i] = bisect_left(addresses, int(target[1], 16))
                starts |= {jumps[i], i + 1}
            elif base in ("EXIT", "RET"):
                starts.add(i + 1)
        bounds = [*sorted(starts - {len(code)}), len(code)]
        self.blocks = [code[begin:end] for begin, end in pairwise(bounds)]
        self.after: list[list[int]] = []
        self.exits = {block for block, end in enumerate(bounds[1:]) if code[end - 1].name.startswith("EXIT")}
        for block, end in enumerate(bounds[1:]):
            last = code[end - 1]
            found = [bisect_left(bounds, jumps[end - 1])] if end - 1 in jumps else []
            jumps_always = end - 1 in jumps and last.name.startswith("BRA") and not conditional(last)
            ends = last.name.split(".")[0] in ("EXIT", "RET") and not conditional(last)
            if not jumps_always and not ends and end < len(code):
                found.append(block + 1)
            self.after.append(found)

    @cached_property
    def order(self) -> list[int]:
        """Return the reachable blocks, each before its successors, except for back edges of loops."""
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((b for b in rest if b not in seen), None)
            if following is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.after[following])))
        return done[::-1]

    @cached_property
    def before(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in self.after[block]:
                found[following].append(block)
        return found

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """Return for each block those that every path to it passes, itself included."""
        found = {block: set(self.order) for block in self.order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                new = set.intersection(*(found[other] for other in self.before[block])) | {block}
                changed |= new != found[block]
                found[block] = new
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """Return the loops, outer ones first."""
        bodies: dict[int, set[int]] = {}
        for block in self.order:
            for header in self.after[block]:
                if header in self.dominators[block]:
                    body, found = bodies.setdefault(header, {header}), [block]
                    while found:
                        if (one := found.pop()) not in body:
                            body.add(one)
                            found += self.before[one]
        loops = [Loop(header, frozenset(body)) for header, body in bodies.items()]
        return sorted(loops, key=lambda loop: -len(loop.blocks))

    @cached_property
    def everything(self) -> Loop:
        """Return the kernel as a loop that ends where the kernel does."""
        return Loop(0, frozenset(self.order))

    def inside(self, loop: Loop) -> list[Loop]:
        return [other for other in self.loops if other.blocks < loop.blocks]

    def code(self, blocks: Collection[int]) -> list[Instruction]:
        return [instruction for block in blocks for instruction in self.blocks[block]]

    def after_any(self, blocks: Iterable[int]) -> set[int]:
        """Return the blocks that can follow any of these without a back edge."""
        found = set(blocks)
        for block in self.order:
            if block in found:
                found |= {to for to in self.after[block] if to not in self.dominators[block]}
        return found

    def path(self, loop: Loop, worth: Callable[[int], int], avoid: Collection[int] = ()) -> list[int]:
        """Return a path from the header to an end of the loop that passes no block twice: one with the largest worth,
        among equals that of the fewest instructions."""
        value = {block: (worth(block), -len(self.blocks[block])) for block in loop.blocks}
        best = {loop.header: (value[loop.header], [loop.header])}
        ends = []
        for block in self.order:
            if block not in best:
                continue
            following = self.after[block]
            if loop.header in following or (loop == self.everything and block in self.exits):
                ends.append(best[block])
            for to in following:
                if to not in loop.blocks or to in avoid or to in self.dominators[block]:
                    continue
                (much, few), way = best[block]
                new = (much + value[to][0], few + value[to][1])
                if to not in best or new > best[to][0]:
                    best[to] = (new, [*way, to])
        if not ends:
            raise ValueError("no path through the loop")
        return max(ends)[1]


def conditional(branch: Instruction) -> bool:
    """Return whether a branch is conditional, including BRA P1, target and BRA.U !UP0, target."""
    return branch.predicate not in ("", "PT") or "P" in branch.operands.rpartition("0x")[0]
