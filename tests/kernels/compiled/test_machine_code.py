"""The main loop is told from what runs once per tile, for the control flow that NVIDIA's and AMD's compilers write."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def machine_code() -> ModuleType:
    spec = importlib.util.spec_from_file_location("machine_code", Path(__file__).with_name("machine_code.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine_code"] = module  # where dataclasses look up the types of their fields
    spec.loader.exec_module(module)
    return module


def sass(text: str) -> str:
    """Lines as nvdisasm writes them: instructions indented, with an address and a semicolon; labels as they are."""
    lines = textwrap.dedent(text).strip().splitlines()
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


FLATTENED = """
    LDGSTS.E.BYPASS.128 [R1], [R2]
    .L_x_0:
    LDGSTS.E.BYPASS.128 [R1], [R2]
    {load}
    HMMA.16816.F32.BF16 R4, R8, R12, R4
    @!P0 BRA `(.L_x_1)
    LDG.E.U16 R3, [R2]
    @P1 BRA `(.L_x_2)
    LDG.E.U8 R5, [R2]
    .L_x_2:
    STG.E.128 [R6], R8
    .L_x_1:
    @P2 BRA `(.L_x_0)
    EXIT
"""


def test_what_a_branch_skips_and_stores_is_no_part_of_the_main_loop(machine_code: ModuleType) -> None:
    found = machine_code.figures("cuda", sass(FLATTENED.format(load="IADD3 R1, R1, R2, RZ")))
    assert found["loop"] == {"copy128": 1, "tensor_core": 1}
    assert (found["copy128"], found["load16"], found["load8"], found["store128"]) == (2, 1, 1, 1)


def test_narrow_loads_of_every_iteration_are_found(machine_code: ModuleType) -> None:
    found = machine_code.figures("cuda", sass(FLATTENED.format(load="@P3 LDG.E.U16 R7, [R2.64]")))
    assert found["loop"] == {"copy128": 1, "load16": 1, "tensor_core": 1}


def test_narrow_loads_behind_a_branch_that_stores_nothing_are_found(machine_code: ModuleType) -> None:
    skipped = "@P3 BRA `(.L_x_3)\n    LDG.E.U16 R7, [R2]\n    .L_x_3:"
    found = machine_code.figures("cuda", sass(FLATTENED.format(load=skipped)))
    assert found["loop"] == {"copy128": 1, "load16": 1, "tensor_core": 1}


def test_the_inner_of_two_loops_is_the_main_loop(machine_code: ModuleType) -> None:
    nested = """
        .L_x_0:
        LDG.E.U16 R3, [R2]
        .L_x_1:
        UTMALDG.2D [UR8], [UR4]
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24
        @P0 BRA `(.L_x_1)
        STG.E.128 [R6], R8
        BRA.U UP0, `(.L_x_0)
        EXIT
    """
    found = machine_code.figures("cuda", sass(nested))
    assert found["loop"] == {"tensor_core": 1, "tma_load": 1}


def test_waiting_out_of_line_does_not_hide_the_main_loop(machine_code: ModuleType) -> None:
    # nvcc's compiler puts the second try of a wait behind the end of the kernel, from where it jumps back.
    waiting = """
        .L_x_0:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5
        @!P1 BRA `(.L_x_2)
        .L_x_1:
        LDG.E.U16 R3, [R2]
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24
        @P0 BRA `(.L_x_0)
        STG.E.128 [R6], R8
        EXIT
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R5
        @!P1 BRA `(.L_x_2)
        BRA `(.L_x_1)
    """
    assert machine_code.figures("cuda", sass(waiting))["loop"] == {"load16": 1, "tensor_core": 1}


def test_amd_loads_that_the_last_iteration_skips_are_found(machine_code: ModuleType) -> None:
    text = "\n".join(
        (
            ".LBB0_1:                                ; =>This Inner Loop Header: Depth=1",
            "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]",
            "\ts_cbranch_execz .LBB0_2",
            "\tglobal_load_dwordx4 v[0:3], v4, s[0:1]",
            "\tbuffer_load_ushort v5, v6, s[0:3], 0 offen",
            ".LBB0_2:",
            "\ts_cbranch_scc0 .LBB0_1",
            "\tglobal_load_ubyte v5, v6, s[0:1]",
            "\tglobal_store_dwordx2 v4, v[0:1], s[0:1]",
            "\ts_endpgm",
        )
    )
    found = machine_code.figures("hip", text)
    assert found["loop"] == {"load128": 1, "load16": 1, "tensor_core": 1}
    assert (found["load8"], found["store64"]) == (1, 1)


def test_a_kernel_without_a_product_has_no_main_loop(machine_code: ModuleType) -> None:
    assert machine_code.figures("cuda", sass("LDG.E.128 R4, [R2]\nSTG.E.128 [R2], R4\nEXIT"))["loop"] is None
