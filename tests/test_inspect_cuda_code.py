"""tests/inspect_cuda_code.py on a loop of machine code, which a kernel with faults would need a GPU compiler for."""

import re
import shutil

import pytest

import inspect_cuda_code
from inspect_cuda_code import Budget, Gate, Kernel, Way

# A loop from 0x10 to 0x90: a packet or, where less than a packet is left, an element; then a byte of a mask.
LOOP = """
/*0000*/ MOV R1, R2 ;
/*0010*/ @P0 BRA 0x40 ;
/*0020*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0030*/ BRA 0x50 ;
/*0040*/ LDG.E.U16 R4, desc[UR4][R2.64] ;
/*0050*/ STG.E.128.STRONG.SM desc[UR4][R6.64], R4 ;
/*0060*/ @P1 BRA 0x80 ;
/*0070*/ LDG.E.U8 R8, desc[UR4][R2.64] ;
/*0080*/ IADD3 R2, R2, R9, RZ ;
/*0090*/ @P2 BRA 0x10 ;
/*00a0*/ EXIT ;
"""


def ways_of(text):
    kernel = Kernel("sm_90", "some_kernel")
    inspect_cuda_code.inspect_code(kernel, inspect_cuda_code.instructions(text))
    return kernel.ways


def test_the_path_that_moves_packets_and_masks():
    (way,) = ways_of(LOOP)
    # The load behind the store is for the next iteration.
    assert way == Way(instructions=8, load_bytes=16, store_bytes=16, loads_after_stores=0, strong_stores=0)


def test_a_load_between_stores():
    load, store = "LDG.E.U8 R8, desc[UR4][R2.64]", re.search(r"STG\S+ [^;]*;", LOOP)[0]
    mask = re.search(rf"/\*(\w+)\*/ {re.escape(load)} ;\n", LOOP)
    (way,) = ways_of(LOOP.replace(mask[0], f"{mask[0]}/*{int(mask[1], 16) + 4:04x}*/ {store}\n"))
    assert (way.store_bytes, way.loads_after_stores) == (32, 1)


def test_a_load_before_the_store_and_a_store_beyond_the_sm():
    earlier = LOOP.replace("LDG.E.U8 R8, desc[UR4][R2.64]", "IADD3 R8, R8, R9, RZ").replace("STRONG.SM", "STRONG.GPU")
    (way,) = ways_of(earlier)
    assert (way.instructions, way.loads_after_stores, way.strong_stores) == (7, 0, 1)


# A way for each of two activations. The second packet of a tile may not exist, and nothing is stored.
ACTIVATIONS = """
/*0000*/ MOV R1, R2 ;
/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0020*/ LDL R9, [R1] ;
/*0030*/ @P0 BRA 0x70 ;
/*0040*/ FMUL R4, R4, R9 ;
/*0050*/ @P1 BRA 0xa0 ;
/*0060*/ FMUL R5, R5, R9 ;
/*0068*/ BRA 0xa0 ;
/*0070*/ MUFU.EX2 R4, R4 ;
/*0080*/ MUFU.RCP R4, R4 ;
/*0090*/ FMUL R4, R4, R9 ;
/*00a0*/ @P2 BRA 0x10 ;
/*00b0*/ EXIT ;
"""


def test_a_way_for_each_activation_leaves_out_no_packet(monkeypatch):
    monkeypatch.setattr(inspect_cuda_code, "GATES", (Gate("some_kernel", 4, acts=True),))
    plain, inverse = ways_of(ACTIVATIONS)
    assert (plain.instructions, plain.has_inverse, inverse.instructions, inverse.has_inverse) == (8, False, 7, True)


def test_local_memory_in_a_loop(monkeypatch):
    for most, faults in ((1, []), (0, ["accesses local memory 1 times in a loop, more than 0"])):
        monkeypatch.setattr(inspect_cuda_code, "GATES", (Gate("some_kernel", 4, local={"sm_90": most}),))
        monkeypatch.setattr(inspect_cuda_code, "BUDGETS", ())
        kernel = Kernel("sm_90", "some_kernel")
        inspect_cuda_code.inspect_code(kernel, inspect_cuda_code.instructions(ACTIVATIONS))
        assert list(inspect_cuda_code.faults_of(kernel)) == faults


def test_loads_between_stores_need_no_row_in_budgets(monkeypatch):
    monkeypatch.setattr(inspect_cuda_code, "BUDGETS", ())
    way = Way(instructions=8, load_bytes=16, store_bytes=16, loads_after_stores=2, strong_stores=0)
    for most, faults in ((2, []), (1, ["has 2 loads after a store in hot code, more than 1"])):
        monkeypatch.setattr(inspect_cuda_code, "GATES", (Gate("some_kernel", 4, loads_after_stores=most),))
        assert list(inspect_cuda_code.faults_of(Kernel("sm_90", "some_kernel", ways=[way]))) == faults


def test_the_limits_of_batch_norm_are_those_of_its_cut():
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    found = {}
    for name in ("stats_kernel<BFloat16, 8, false>", "stats_kernel<BFloat16, 4, true>", "normalise_kernel<double, 1, true, true>"):
        gate = Kernel("sm_90", f"batch_norm_act_{name}").gate
        found[name.partition("<")[2]] = (gate.threads, gate.blocks, gate.bytes, gate.loads, gate.stores)
    assert found == {
        "BFloat16, 8, false>": (256, 4, 16, True, False),
        "BFloat16, 4, true>": (352, 2, 8, True, False),
        "double, 1, true, true>": (512, 1, 16, False, False),
    }


@pytest.mark.parametrize(
    ("registers", "most", "faults"),
    [(64, 8, []), (65, 8, ["has 65 registers: 3 blocks"]), (32, 7, ["takes 8.0 instructions an element"])],
)
def test_faults(monkeypatch, registers, most, faults):
    monkeypatch.setattr(inspect_cuda_code, "GATES", (Gate("some_kernel", 4),))
    monkeypatch.setattr(inspect_cuda_code, "BUDGETS", (Budget("some_kernel", most, 16),))
    ways = ways_of(LOOP)
    found = list(inspect_cuda_code.faults_of(Kernel("sm_90", "some_kernel", registers, ways=ways)))
    assert len(found) == len(faults) and all(map(str.startswith, found, faults)), found
