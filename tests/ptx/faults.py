"""Faults for the text of nvcc's PTX, each of which a test has to notice.

A row has what is wrong, a pattern for the kernel's mangled name, a pattern in its text, what the match becomes, the test that
must fail (CAUGHT_BY in tests/test_ptx.py), and which match it is among those that the test executes.
"""

from collections import namedtuple

Fault = namedtuple("Fault", "what kernel old new test which", defaults=[0])

SHUFFLE = r"(shfl\.sync\.\w+\.b32 \s*%r\d+\|%p\d+, %r\d+), %r\d+,"
BARRIER, FENCE = r"bar\.sync\s+0;", r"membar\.gl;"
PACKET_OF_TWO = r"(st\.global\S*v[24]\.u32\s*\[[^\]]*\], \{)(%r\d+),(%r\d+)"
ACTIVATION, PARAMETRIC, COLUMN = "activation_forward_kernel", "parametric_backward_run_kernel", "parametric_backward_column_kernel"
STATS, NORMALISE, REDUCE = "batch_norm_act_stats_kernel", "batch_norm_act_normalise_kernel", "batch_norm_act_backward_reduce_kernel"
NORMS, CLIP, SHAPES, LEARNT = "grad_norms_kernel", "clip_with_norm_kernel", "shapes of batch norm", "learnt parameter"

# Of parametric_backward_run_kernel, only thread 0 has written what barrier 1 is there to order.
DROPPED = {
    (PARAMETRIC, BARRIER, LEARNT): (0, 2, 3),
    (STATS, BARRIER, SHAPES): (0, 1, 2),
    (REDUCE, BARRIER, SHAPES): (0, 1, 2, 3),
    (NORMS, BARRIER, "norms"): (0, 1),
    (NORMS, BARRIER, "norms of nan"): (2,),
    ("adaptive_clip_kernelILNS_4NormE1ELi256E", BARRIER, "units"): (3,),
    (STATS + "INS_8BFloat16ELi4ELb1E", FENCE, SHAPES): (0, 1),
    (PARAMETRIC, FENCE, LEARNT): (1,),
}

FAULTS = (
    *(
        Fault(f"{old} {i} dropped from {kernel}", kernel, old, "", test, i)
        for (kernel, old, test), places in DROPPED.items()
        for i in places
    ),
    Fault("a shuffle from another lane", PARAMETRIC, SHUFFLE, r"\1, 15,", LEARNT),
    Fault("a shuffle of part of a warp", PARAMETRIC, r"(shfl\.sync[^;]*), %r\d+;", r"\1, 65535;", LEARNT),
    Fault("a word that is not shuffled", NORMS, r"(mov\.b64 \s*%rd\d+, \{%r\d+, )%r\d+\}", r"\g<1>0}", "norms"),
    Fault("a barrier before the store it follows", PARAMETRIC, r"(st\.shared\.f64[^;]*;)([^;]*?)(bar\.sync\s+0;)", r"\3\2\1", LEARNT),
    Fault("a barrier that half of the threads reach", STATS, BARRIER, "@%p1 bar.sync 0;", SHAPES),
    Fault("a counter is not reset", PARAMETRIC, r"atom\.global\.exch\.b32[^;]*;", "", LEARNT),
    Fault("a block counts twice", "grad_norms_of_runs_kernel", r"(atom\.global\.add\.u32[^;]*), 1;", r"\1, 2;", "norms"),
    Fault("a block does not count", COLUMN, r"atom\.global\.add\.u32 (\s*%r\d+, \[[^\]]*\]), 1;", r"ld.global.u32 \1;", LEARNT),
    Fault("the last block but one merges", COLUMN, r"(atom\.global\.add[^;]*;\s*add\.s32 [^;]*), 1;", r"\1, 2;", LEARNT),
    Fault("a counter of another slab", STATS, r"(shl\.b64 \s*%rd\d+, %rd\d+), 2;(\s*add\.s64[^;]*;\s*membar)", r"\1, 3;\2", SHAPES),
    Fault("one element too many", ACTIVATION, r"setp\.lt\.s64", "setp.le.s64", "forward of swish"),
    Fault("a stride of an element too many", "rmsprop_kernel", r"(add\.s64 \s*%rd\d+, %rd\d+), 1024;", r"\1, 1025;", "rmsprop"),
    Fault("a block that does not stride", "clamp_kernel", r"@%p\d+ bra\s+\$\w+;(\s*\$\w+:\s*ret;)", r"\1", "clamp"),
    Fault("a search that ends early", "clamp_kernel", r"(setp\.gt\.s32 \s*%p\d+, %r\d+), 1;", r"\1, 2;", "clamp"),
    Fault("another member of the table", CLIP, r"(ld\.param\.u32 [^;]*\+)21644\]", r"\g<1>21640]", "total norm"),
    Fault("a packet is stored after its place", ACTIVATION, r"(st\.global\.wb\.v4\.u32 \[%rd\d+)\]", r"\1+16]", "forward of swish"),
    Fault("a packet is loaded from between packets", ACTIVATION, r"(ld\.global\.v4\.u32[^;]*%rd\d+)\]", r"\1+4]", "forward of swish"),
    Fault("a packet is loaded twice", "clamp_kernel", r"(ld\.global\.v4\.u32[^;]*)\+4096\]", r"\1+8192]", "clamp"),
    Fault("a byte of the mask goes to its neighbour", "mask", r"(st\.global\.u8\s*\[%rd\d+)\]", r"\1+1]", "mask"),
    Fault("two bytes of the mask are loaded", "activation_backward_mask", r"ld\.global\.u8", "ld.global.u16", "mask"),
    Fault("a bit of the mask goes to its neighbour", "forward_mask", r"(bfi\.b32 \s*%r\d+, %r\d+, %r\d+), 1, 1;", r"\1, 2, 1;", "mask"),
    Fault("a store without its guard", NORMALISE, r"@%p\d+ bra\s+\$\w+;(\s*st\.global\.u8)", r"\1", "mask of batch norm"),
    Fault("two halves of a packet change places", NORMALISE, PACKET_OF_TWO, r"\1\3,\2", SHAPES),
    Fault("two halves of a word change places", CLIP, r"(mov\.b32 \s*)\{(%rs\d+), (%rs\d+)\}", r"\1{\3, \2}", "total norm"),
    Fault("a parameter is read from another place", REDUCE, r"(ld\.param\.u64[^;]*\+)80\]", r"\g<1>88]", SHAPES),
    Fault("another member of a part", STATS, r"(ld\.global\.f64 [^;]*)\+8\]", r"\1+16]", SHAPES),
    Fault("a block is another block", STATS, r"%ctaid\.x", "%nctaid.x", SHAPES),
    Fault("a lane modulo 16", PARAMETRIC, r"(and\.b32 \s*%r\d+, %r\d+), -32;", r"\1, -16;", LEARNT),
    Fault("a sum in its neighbour's place", STATS, r"(st\.shared\.f64 \s*\[%r\d+)\]", r"\1+8]", SHAPES),
    Fault("shared memory beyond its size", PARAMETRIC, r"(ld\.shared\.\w+ [^;]*)\];", r"\1+32768];", LEARNT),
    Fault("another rounding", ACTIVATION, r"cvt\.rn\.bf16", "cvt.rz.bf16", "forward of swish"),
    Fault("a product is rounded", "rmsprop", r"fma(.rn.f32)(\s*%f\d+)(, %f\d+, %f\d+), (%f\d+);", r"mul\1\2\3; add\1\2,\2, \4;", "rmsprop"),
    Fault("a constant is zero", CLIP, r"0d3EB0C6F7A0B5ED8D", "0d0000000000000000", "total norm"),
    Fault("the variance of a sample is that of all", STATS, r"0dBFF0000000000000;", "0d0000000000000000;", SHAPES),
    Fault("an approximation without its suffix", ACTIVATION, r"ex2\.approx\.ftz", "ex2.approx", "forward of swish"),
    Fault("two operands change places", NORMALISE, r"(fma\.rn\.f32 \s*%f\d+, %f\d+), (%f\d+), (%f\d+);", r"\1, \3, \2;", SHAPES),
    Fault("a choice the other way", "forward_mask", r"(selp\.f32 \s*%f\d+, )(%f\d+), (%f\d+)", r"\1\3, \2", "mask"),
    Fault("the least instead of the largest", NORMS, r"max\.u32", "min.u32", "largest"),
    Fault("a comparison without nan", "clamp_kernel", r"setp\.lt\.f32", "setp.ltu.f32", "clamp", 3),
    Fault("a product that does not saturate", "activation_backward_kernel", r"cvt\.sat\.f32\.f32", "mov.f32", "special values"),
    Fault("another sign", "rmsprop_kernel", r"neg\.f32", "mov.f32", "rmsprop"),
    Fault("a shift that keeps the sign", "rrelu", r"shr\.u32", "shr.s32", "rrelu"),
    Fault("another operation on bits", "rrelu", r"xor\.b32", "or.b32", "rrelu", 7),
    Fault("a register that nothing wrote", REDUCE, r"mov\.f64\s*%fd\d+, 0d0000000000000000;", "", SHAPES, 1),
)
