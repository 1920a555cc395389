"""Tests of the checks of products that are still running, on machine code written for them."""

import pytest

from bench.upkeep import hazards

LOOP = """
        /*0000*/                   LDS.128 R4, [R2] ;
.L_x_0:
        /*0010*/                   HMUL2.BF16_V2 R8, R4.H0_H0, R5 ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8].tnspB, R24{of_first} ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0050*/                   {between} ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0070*/                   {behind} ;
        /*0080*/              @!P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


def loop(between="NOP", pending="0x0", behind="NOP", of_first=""):
    return LOOP.format(between=between, pending=pending, behind=behind, of_first=of_first)


@pytest.mark.parametrize(
    "written",
    [
        "FADD R8, R0, R1", "FADD R15, R0, R1", "LDS.128 R12, [R3]", "LDS.128 R9, [R3]", "LDSM.16.M88.4 R12, [R3]",
        "LDS.64 R7, [R3]", "IMAD.WIDE R10, R2, 0x4, R4", "CS2R R14, SRZ", "@P1 MOV R11, R0", "SHFL.BFLY PT, R13, R0, 0x1",
    ],
)  # fmt: skip
def test_registers_that_are_written_too_early(written):
    """Before the wait; behind it they are free."""
    (found,) = hazards.overwritten_operands(loop(between=written))
    assert written.removeprefix("@P1 ") in found
    assert not hazards.overwritten_operands(loop(behind=written))


@pytest.mark.parametrize(
    "harmless",
    [
        "FADD R16, R8, R9", "LDS.64 R6, [R3]", "LDS.128 R4, [R8]", "STS.128 [R8], R8", "ISETP.LT P0, R8, R9",
        "R2UR UR8, R8", "LDGSTS.E.128 [R8], [R12]", "LDS.U16 R7, [R3]", "CS2R.32 R7, SR_CLOCKLO",
    ],
)  # fmt: skip
def test_what_writes_other_registers(harmless):
    assert not hazards.overwritten_operands(loop(between=harmless))


def test_across_the_end_of_a_loop():
    """The last group stays in flight: the next iteration writes the left side of its products."""
    found = hazards.overwritten_operands(loop(pending="0x1"))
    assert found == ["overwrites the left side of a running product: HMUL2.BF16_V2 R8, R4.H0_H0, R5"]
    # The first product in a group of its own, which is complete when one is pending.
    assert not hazards.overwritten_operands(loop(pending="0x1", of_first=", gsb0"))


def test_a_left_side_in_shared_memory_has_no_registers():
    code = (
        loop(between="FADD R8, R0, R1").replace("R24, R8,", "R24, gdesc[UR4],").replace("R24, R12,", "R24, gdesc[UR4],")
    )
    assert not hazards.overwritten_operands(code)


def test_loops_whose_products_run_one_by_one():
    """Waits as many as products; one for each tile of four is what a loop should have."""
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0"
    together = loop(between=f"{product} ;\n /*0051*/ {product}")
    assert hazards.waits_in_loops(together) == 1 and not hazards.serialised_loops(together)
    apart = loop(between=f"{wait} ;\n /*0051*/ {product} ;\n /*0052*/ {wait} ;\n /*0053*/ {product}")
    assert hazards.waits_in_loops(apart) == 3
    assert hazards.serialised_loops(apart) == ["a loop waits 3 times for 4 products"]
    assert hazards.waits_in_loops("/*0000*/ EXIT ;") == 0
