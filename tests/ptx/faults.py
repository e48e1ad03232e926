"""Faults for the text of nvcc's PTX, each of which a test has to notice.

A row has what is wrong, a pattern for the kernel's mangled name, a pattern in its text, what the match becomes, the test that
must fail (CAUGHT_BY in tests/test_ptx.py), and which match it is.
"""

from typing import NamedTuple

SHUFFLE = r"(shfl\.sync\.\w+\.b32 \s*%r\d+\|%p\d+, %r\d+), %r\d+,"
BARRIER = r"bar\.sync\s+0;"
FENCE = r"membar\.gl;"
ACTIVATION, PARAMETRIC, NORMS = "activation_forward_kernel", "parametric_backward_run_kernel", "grad_norms_kernel"
STATS, NORMALISE, REDUCE = "batch_norm_act_stats_kernel", "batch_norm_act_normalise_kernel", "batch_norm_act_backward_reduce_kernel"


class Fault(NamedTuple):
    what: str
    kernel: str
    old: str
    new: str
    test: str
    which: int = 0


# Of parametric_backward_run_kernel, only thread 0 has written what barrier 1 is there to order.
DROPPED = {
    (PARAMETRIC, "learnt parameter"): (0, 2, 3),
    (STATS, "shapes of batch norm"): (0, 1, 2),
    (REDUCE, "shapes of batch norm"): (0, 1, 2, 3),
    (NORMS, "norms"): (0, 1),
    (NORMS, "norms of nan"): (2,),
}

PACKET_OF_TWO = r"(st\.global\S*v[24]\.u32\s*\[[^\]]*\], \{)(%r\d+),(%r\d+)"
STORE_AND_BARRIER = r"(st\.shared\.f64[^;]*;)([^;]*?)(bar\.sync\s+0;)"

FAULTS = (
    *(
        Fault(f"barrier {i} of {kernel} is dropped", kernel, BARRIER, "", test, i)
        for (kernel, test), which in DROPPED.items()
        for i in which
    ),
    Fault("a shuffle from another lane", PARAMETRIC, SHUFFLE, r"\1, 15,", "learnt parameter"),
    Fault("a shuffle of clipping from another lane", NORMS, SHUFFLE, r"\1, 17,", "norms"),
    Fault("an exchange of mask bits with another lane", NORMALISE, SHUFFLE, r"\1, 3,", "mask of batch norm"),
    Fault("a shuffle of part of a warp", PARAMETRIC, r"(shfl\.sync[^;]*), %r\d+;", r"\1, 65535;", "learnt parameter"),
    Fault(
        "a barrier before the store it follows",
        PARAMETRIC,
        r"(st\.shared\.f64[^;]*;)([^;]*?)(bar\.sync\s+0;)",
        r"\3\2\1",
        "learnt parameter",
    ),
    Fault("a barrier that half of the threads reach", STATS, BARRIER, "@%p1 bar.sync 0;", "shapes of batch norm"),
    Fault("the fence before the count is dropped", STATS, FENCE, "", "shapes of batch norm"),
    Fault("the fence after the count is dropped", PARAMETRIC, FENCE, "", "learnt parameter", 1),
    Fault("a counter is not reset", PARAMETRIC, r"atom\.global\.exch\.b32[^;]*;", "", "learnt parameter"),
    Fault("a block counts twice", "grad_norms_of_runs_kernel", r"(atom\.global\.add\.u32[^;]*), 1;", r"\1, 2;", "norms"),
    Fault("one element too many", ACTIVATION, r"setp\.lt\.s64", "setp.le.s64", "forward of swish", 2),
    Fault("one element too many of a list", NORMS, r"setp\.lt\.s64", "setp.le.s64", "norms", 5),
    Fault("a packet is stored after its place", ACTIVATION, r"(st\.global\.wb\.v4\.u32 \[%rd\d+)\]", r"\1+16]", "forward of swish", 1),
    Fault("a packet is loaded from between packets", ACTIVATION, r"(ld\.global\.v4\.u32[^;]*%rd\d+)\]", r"\1+4]", "forward of swish", 1),
    Fault("a byte of the mask goes to its neighbour", "mask", r"(st\.global\.u8\s*\[%rd\d+)\]", r"\1+1]", "mask", 2),
    Fault(
        "two halves of a packet change places",
        NORMALISE,
        r"(st\.global\S*v[24]\.u32\s*\[[^\]]*\], \{)(%r\d+),(%r\d+)",
        r"\1\3,\2",
        "shapes of batch norm",
        6,
    ),
    Fault("a parameter is read from another place", REDUCE, r"(ld\.param\.u64[^;]*\+)64\]", r"\g<1>72]", "shapes of batch norm"),
    Fault("a block is another block", STATS, r"%ctaid\.x", "%nctaid.x", "shapes of batch norm"),
    Fault("shared memory beyond its size", PARAMETRIC, r"(ld\.shared\.\w+ [^;]*)\];", r"\1+32768];", "learnt parameter"),
    Fault("another rounding", ACTIVATION, r"cvt\.rn\.bf16", "cvt.rz.bf16", "forward of swish"),
    Fault("an approximation without its suffix", ACTIVATION, r"ex2\.approx\.ftz", "ex2.approx", "forward of swish"),
    Fault("a comparison the other way round", "mask", r"setp\.gt\.f32", "setp.lt.f32", "mask", 5),
    Fault("a comparison without nan", "clamp_kernel", r"setp\.lt\.f32", "setp.ltu.f32", "clamp", 3),
    Fault("a product that does not saturate", "activation_backward_kernel", r"cvt\.sat\.f32\.f32", "mov.f32", "special values"),
    Fault("another sign", "rmsprop_kernel", r"neg\.f32", "mov.f32", "rmsprop"),
    Fault("a shift that keeps the sign", "rrelu", r"shr\.u32", "shr.s32", "rrelu"),
    Fault("a register that nothing wrote", REDUCE, r"mov\.f64\s*%fd\d+, 0d0000000000000000;", "", "shapes of batch norm", 1),
    Fault("a branch the other way", "rmsprop_kernel", "@%p", "@!%p", "rmsprop"),
)
