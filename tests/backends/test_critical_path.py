"""The model of an iteration of the CUDA kernels, benchmarks/codegen/critical_path.py, on listings that are written here."""

from __future__ import annotations

import importlib

import pytest

from tests.cuda_on_cpu import host_cuda


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(host_cuda.ROOT / "benchmarks"))
        yield importlib.import_module("codegen.critical_path")


def control(stall: int, sets: int = 7, reads: int = 7, waits: int = 0) -> int:
    return (stall | sets << 5 | reads << 8 | waits << 11) << 41


def listing(lines: list[str | tuple[str, int]], kernel: str = "sinkhorn_ELb0E") -> str:
    """What nvdisasm prints for instructions, each with its control, and labels between them."""
    text, at = f'\t.section\t.text.{kernel},"ax",@progbits\n', 0
    for line in lines:
        if isinstance(line, str):
            text += f"{line}:\n"
        else:
            text += f"        /*{at:04x}*/                   {line[0]} ;   /* 0x0000000000000000 */\n"
            text += f"                                                    /* 0x{line[1]:016x} */\n"
            at += 16
    return text


def test_parser(model):
    code = model.parse(
        listing([(".", 0)], "other") + listing([
            ("LDS.128 R4, [R8]", control(4, sets=1)), ".L_x_7", ("@!P0 FADD R4, R4, R5", control(1, reads=2, waits=0b101010)),
            ("@P1 BRA `(.L_x_7)", control(5)), ("BRA.DIV UR4, `(.L_x_7)", control(6)),
        ]),
        "ELb0E",
    )  # fmt: skip
    load, add, jump, divergent = code.instructions
    assert code.labels == {".L_x_7": 1}
    assert (load.at, load.word, load.kind, load.stall, load.sets, load.reads, load.waits) == (
        0,
        "LDS.128",
        "LDS",
        4,
        (1,),
        (),
        (),
    )
    assert (add.at, add.kind, add.stall, add.sets, add.reads, add.waits) == (16, "FADD", 1, (), (2,), (1, 3, 5))
    assert jump.targets == [".L_x_7"]
    assert divergent.targets == [], "a warp whose threads are together falls through"


def an_iteration() -> list[str | tuple[str, int]]:
    """A loop with an inner loop over rows in memory, and exchanges for clusters of two and of one."""
    add, plain = ("FADD R1, R1, R2", control(4)), control(1)
    return [
        "start_is_no_label", ".L_x_1", *[("FFMA R1, R2, R3, R1", plain)] * 200,
        ("@P0 BRA `(.L_x_3)", control(5)), ".L_x_2", ("FFMA R9, R9, R9, R9", plain), ("@P1 BRA `(.L_x_2)", control(5)), ".L_x_3",
        ("BAR.SYNC.DEFER_BLOCKING 0x0", plain), ("@P2 BRA `(.L_x_4)", control(5)),
        ("STAS.128 [R4.64], R4", plain), ("STAS.128 [R6.64], R4", plain),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1+URZ], R2", control(1, sets=0)), ("LDS R2, [R3]", control(1, sets=1, waits=1)),
        ("FADD R1, R1, R2", control(4, waits=2)), ("BRA `(.L_x_5)", control(5)), ".L_x_4", add, ".L_x_5",
        ("MUFU.RCP R4, R1", control(1, sets=2)), ("FMUL R4, R4, R4", control(1, waits=4)),
        ("BAR.RED.AND.DEFER_BLOCKING 0x0, P1", plain), ("@!P0 BRA `(.L_x_1)", control(5)),
    ]  # fmt: skip


def test_path_and_time(model):
    way = model.path(model.parse(listing(an_iteration()), "ELb0E"), cluster=2)
    kinds = [instruction.kind for instruction in way]
    assert kinds == [
        *["FFMA"] * 200, "BRA", "BAR", "BRA", "STAS", "STAS", "SYNCS", "LDS", "FADD", "BRA", "MUFU", "FMUL", "BAR", "BRA",
    ]  # fmt: skip
    one, two = model.simulate(way, 1), model.simulate(way, 2)
    assert one.first_barrier == 200 + 5 + model.TAKEN + model.BARRIER
    assert one.arrived - one.sent == model.MESSAGE
    after = model.LATENCY["LDS"] + 4 + 5 + model.TAKEN + model.LATENCY["MUFU"] + 1 + model.BARRIER + 5 + model.TAKEN
    assert one.end - one.arrived == after
    assert 400 <= two.first_barrier - model.BARRIER <= 405 + 2 * model.TAKEN, (
        "two warps share the multiply-adds of a scheduler"
    )
    assert two.end - two.first_barrier == one.end - one.first_barrier
