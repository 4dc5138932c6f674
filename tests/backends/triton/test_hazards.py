# SPDX-License-Identifier: Apache-2.0
"""hazards.py finds what it is there to find, in listings by hand; what compilers make is in test_budget.py."""

from __future__ import annotations

import pytest

from tools.sass import Instruction, instructions
from tools.triton_hazards import hazards, product, reads, writes

FIRST = "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR12], RZ, !UPT"  # D: R24..55, A: R56..59
LAST = "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR16], R24, gsb0"
SHARED = "HGMMA.64x16x16.F32 R88, gdesc[UR4], RZ, !UPT, gsb0"  # D: R88..95
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines: str) -> list[Instruction]:
    """As cuobjdump writes it, at 0, 16, 32 and so on."""
    return instructions(
        "\n".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x00 */" for i, line in enumerate(lines))
    )


def found(*lines: str) -> list[tuple[int, str, tuple[int, ...]]]:
    return [(one.address // 16, one.what, one.registers) for one in hazards(listing(*lines, "EXIT"))]


def test_a_right_kernel():
    assert found(
        "F2FP.BF16.F32.PACK_AB R56, R163, R156",
        "WARPGROUP.ARRIVE",
        FIRST,
        LAST,  # adds to the same result
        "UMOV UR12, UR20",  # a descriptor has been read
        "FADD R2, R3, R4",
        "LDS.128 R64, [R68+UR6+0x4000]",  # beside A
        "STG.E.128 desc[UR18][R16.64], R20",  # below D
        "@!PT LDS RZ, [RZ]",
        "@!PT FADD R24, R24, R24",  # never runs
        WAIT,
        "FMUL R24, R24, R56",
        "MOV R56, R60",
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("line", "what", "registers"),
    [
        ("MOV R56, R2", "writes A", (56,)),
        ("@P1 FADD R63, R2, R3", "writes A", (63,)),
        ("F2FP.BF16.F32.PACK_AB R57, R163, R156", "writes A", (57,)),
        ("LDSM.16.M88.4 R60, [R124+UR6+0xa000]", "writes A", (60, 61, 62, 63)),
        ("LDG.E.64 R58, desc[UR34][R22.64+0x90]", "writes A", (58, 59)),
        ("SHFL.BFLY PT, R59, R2, 0x1, 0x1f", "writes A", (59,)),
        ("IMAD.WIDE.U32 R62, R3, UR15, RZ", "writes A", (62, 63)),
        ("CS2R R56, SRZ", "writes A", (56, 57)),
        ("IADD3 R57, P5, R14, UR20, RZ", "writes A", (57,)),
        ("LDS R55, [R2]", "writes D", (55,)),
        ("LDS.128 R20, [R2]", None, ()),  # R20..23
        ("LDS.128 R22, [R2]", "writes D", (24, 25)),
        ("HMMA.16816.F32.BF16 R52, R4, R8, R12", "writes D", (52, 53, 54, 55)),
        ("FADD R2, R40.reuse, R3", "reads D", (40,)),
        ("FSETP.GEU.AND P2, PT, |R24|, 1.175, PT", "reads D", (24,)),
        ("ISETP.GE.AND P1, PT, R2, R55, PT", "reads D", (55,)),
        ("STG.E.128 desc[UR18][R16.64], R52", "reads D", (52, 53, 54, 55)),
        ("STS.64 [R23], R20", None, ()),
        ("STS [R24], R20", "reads D", (24,)),
        ("STSM.16.M88.4 [R2], R21", "reads D", (24,)),
        ("LDG.E R2, desc[UR4][R54.64]", "reads D", (54, 55)),
        ("IMAD.WIDE R2, R28, 0x4, R54", "reads D", (28, 54, 55)),
        ("R2UR UR37, R34", "reads D", (34,)),
        ("BAR.SYNC.DEFER_BLOCKING R30, 0x80", "reads D", (30,)),
        ("LEA.HI.X R2, R4, R23, R5, 0x1, P3", None, ()),
        ("MOV R2, R56", None, ()),  # A may be read
    ],
)
def test_each_kind(line, what, registers):
    expected = [(3, what, registers)] if what else []
    assert sorted({(at, kind, these) for at, kind, these in found("NOP", FIRST, LAST, line, WAIT)}) == expected


def test_products_among_each_other():
    assert found(FIRST, "HGMMA.64x32x16.F32.BF16 R24, R64, gdesc[UR4], RZ, !UPT, gsb0") == [
        (1, "writes D", tuple(range(24, 40)))
    ], "another shape"
    assert found(FIRST, "HGMMA.64x16x16.F32.BF16 R104, R24, gdesc[UR4], RZ, !UPT") == [(1, "reads D", (24, 25, 26, 27))]
    assert found(FIRST, "HGMMA.64x16x16.F32.BF16 R56, R80, gdesc[UR4], RZ, !UPT") == [(1, "writes A", (56, 57, 58, 59))]
    assert found("HGMMA.64x64x16.F32.BF16 R24, R24, gdesc[UR4], RZ, !UPT") == [(0, "writes A", (24, 25, 26, 27))]


def test_waits():
    """They count groups, the youngest of which may go on."""
    one_left = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    use_of_first, use_of_second = "FADD R2, R24, R3", "FADD R2, R88, R3"
    assert found(FIRST, LAST, SHARED, one_left, use_of_first) == []
    assert found(FIRST, LAST, SHARED, one_left, use_of_second) == [(4, "reads D", (88,))]
    assert found(FIRST, LAST, SHARED, WAIT, use_of_first, use_of_second) == []
    # not committed, not waited for; nor if a predicate decides
    assert found(FIRST, WAIT, use_of_first) == [(2, "reads D", (24,))]
    assert len(found(FIRST, LAST, "@P0 " + WAIT, use_of_first)) == 2


def test_every_way_is_walked():
    """What the end of a loop's body leaves in flight meets its beginning; and a branch that leaves out the wait."""
    assert found(
        "MOV R2, R56",  # 0x00
        "MOV R56, R3",  # 0x10  the loop
        SHARED,
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        LAST.replace("R60", "R56"),
        "@P0 BRA 0x10",
        WAIT,
    ) == [(1, "writes A", (56,))]
    around = ["NOP", FIRST, LAST, "@P0 BRA 0x50", WAIT, "FADD R2, R24, R3"]
    assert len(found(*around)) == 2
    assert found(*around[:4], WAIT, WAIT, around[-1]) == []
    # a loop that never waits ends too
    assert len(found("NOP", LAST, "@P0 BRA 0x10", "MOV R60, R2")) == 1


def test_widths():
    def registers(of, text):
        return sorted(of(listing(text)[0]))

    assert registers(writes, "F2F.F64.F32 R2, R8") == [2, 3]
    assert registers(writes, "F2F.F32.F64 R2, R8") == [2] and registers(reads, "F2F.F32.F64 R2, R8") == [8, 9]
    assert registers(writes, "F2I.FTZ.U32.TRUNC.NTZ R2, R8") == [2]
    assert registers(reads, "DFMA R2, R4, R6, R8") == [4, 5, 6, 7, 8, 9]
    assert registers(writes, "IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R16") == [4, 5, 6, 7]
    assert registers(writes, "LDGSTS.E.BYPASS.128 [R137+0xa000], desc[UR18][R6.64], P4") == []
    assert registers(reads, "LDGSTS.E.BYPASS.128 [R137+0xa000], desc[UR18][R6.64], P4") == [6, 7, 137]
    assert registers(writes, "ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R4.64], R7") == [2]
    assert registers(reads, "LOP3.LUT P1, RZ, R2, 0x1, RZ, 0xc0, !PT") == [2]
    assert registers(writes, "LOP3.LUT P1, RZ, R2, 0x1, RZ, 0xc0, !PT") == []
    half = product(listing("HGMMA.64x64x16.F16 R24, R8, gdesc[UR12], R24, gsb0")[0])
    assert half is not None and sorted(half.d) == list(range(24, 40)) and sorted(half.a) == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="unknown"):
        hazards(listing("HGMMA.SP R24, R8, gdesc[UR12], R24, gsb0", "EXIT"))
