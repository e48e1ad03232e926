"""Reads the machine code of a library built with CUDA and fails on code that costs bandwidth; needs no GPU.

    python tests/inspect_cuda_code.py [--figures] build/cuda/lib/gradkernels/_C.*.so

For every kernel on every architecture it checks how many blocks the registers of an SM hold, and its hot code: the
innermost loops that move packets, or the way through a kernel that moves them without a loop. Local memory, which
holds spills, may be accessed there as often as a row says. Hot code has to move the bytes of a packet with each
instruction, within a budget of instructions per element, with loads before stores, and with stores that need
not be visible beyond the SM at once. GATES, of_batch_norm() and BUDGETS have the limits; a kernel
without a row in one of the first two is an error. --figures prints what the rows limit, for new rows. cuobjdump
comes with the CUDA toolkit or with triton; batch norm's limits need g++. Object files of nvcc may be given too.
"""

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import channel_cut

REGISTERS_OF_SM = 65_536
MOST_WARPS_OF_SM = 64
# An SM has four parts, each with its registers and warps.
PARTS_OF_SM = 4
PACKET_BYTES = 16


@dataclass(frozen=True)
class Gate:
    """The limits of a kernel.

    kernel: a pattern for the name with template arguments.
    blocks: how many blocks of `threads` threads the registers of an SM have to hold.
    loads, stores: whether a loop has to move packets of `bytes` bytes.
    once: whether a thread moves its packets without a loop, except in the last block.
    acts: whether there is a way for each activation, or else for packets that exist and for those that do not.
    local: how many instructions of an innermost loop that moves packets may access local memory, on which architecture;
        none on the others.
    loads_after_stores: how many loads of hot code may wait for a store of the same iteration.
    """

    kernel: str
    blocks: int
    loads: bool = False
    stores: bool = False
    threads: int = 256
    bytes: int = PACKET_BYTES
    once: bool = False
    acts: bool = False
    local: Mapping[str, int] = field(default_factory=dict)
    loads_after_stores: int = 0


@dataclass(frozen=True)
class Budget:
    """The limits of a kernel's hot code, of each piece if there are several.

    kernel: a pattern as in Gate.
    most: instructions for each element, on the path that moves whole packets.
    bytes: what is loaded for each element. A kernel with a loop for each dtype has PACKET_BYTES, so that most is for
        each packet.
    most_with_inverse: the same on the path of the longest activation with an inverse: of batch norm gelu or mish, of the
        activations' own kernels swish.

    Instructions are counted for the architectures that packages are built for. Compute capability 7.5 converts bfloat16 by
    integer arithmetic, and 12.0 has few instructions for float64.
    """

    kernel: str
    most: float
    bytes: int
    most_with_inverse: float | None = None


# The second template argument of the activations' kernels is the number of elements that are moved at once. With a
# learnt parameter it may be 4 in 16 bits.
SIXTEEN_BITS = r"<(BFloat16|Float16), "
PACKETS = r"<.*, [248](, \(Span\)[012])?>"
ONE = r"<.*, 1(, \(Span\)[012])?>"
EIGHT_BYTES = rf"{SIXTEEN_BITS}4(, \(Span\)[012])?>"


# (rows, channels, inner) of runs that are long (csrc/common/shape.h) and of columns, both whole packets of any width.
SHAPE_OF_RUNS, SHAPE_OF_COLUMNS = (1, 1, 64), (1, 64, 1)
# The architectures on which some of what a thread keeps across a tile of small packets is in local memory.
LOCAL = {
    rf"batch_norm_act_stats_kernel{SIXTEEN_BITS}4, true>": ("sm_90",),
    rf"batch_norm_act_backward_reduce_kernel{SIXTEEN_BITS}4, true, false>": ("sm_100", "sm_120"),
    rf"batch_norm_act_backward_reduce_kernel{SIXTEEN_BITS}4, true, true>": ("sm_100", "sm_120"),
    rf"batch_norm_act_backward_elemt_kernel{SIXTEEN_BITS}4, true, false, false>": ("sm_100", "sm_120"),
    # With coefficients of sets, two numbers more for each column.
    rf"batch_norm_act_backward_elemt_kernel{SIXTEEN_BITS}4, true, false, true>": ("sm_100", "sm_120"),
    rf"batch_norm_act_backward_elemt_kernel{SIXTEEN_BITS}4, true, true, true>": ("sm_100", "sm_120"),
    r"batch_norm_act_backward_elemt_kernel<float, 4, true, false, true>": ("sm_80", "sm_90", "sm_100", "sm_120"),
    r"batch_norm_act_backward_elemt_kernel<float, 1, true, false, true>": ("sm_100", "sm_120"),
    rf"batch_norm_act_normalise_kernel{SIXTEEN_BITS}4, true, false>": ("sm_100",),
    r"batch_norm_act_normalise_kernel<float, 1, true, false>": ("sm_100",),
}
MOST_LOCAL = 16


@cache
def of_batch_norm() -> tuple[Gate, ...]:
    """Of each type, width, columns and residual, with the threads and blocks of csrc/cuda/channel_cut.h."""
    compiler = shutil.which("g++")
    if compiler is None:
        sys.exit("inspect_cuda_code: no g++, which compiles csrc/cuda/channel_cut.h for the limits of batch norm")
    plan_of = channel_cut.ChannelCut(compiler).plan_of
    gates = {}
    types = ((SIXTEEN_BITS, 2), ("<float, ", 4), ("<double, ", 8))
    for (names, element_bytes), columns, residual, alignment in itertools.product(types, (False, True), (False, True), (16, 8, 1)):
        shape = SHAPE_OF_COLUMNS if columns else SHAPE_OF_RUNS
        plan = plan_of(shape, element_bytes, residual=residual, alignment=max(alignment, element_bytes))
        blocks, width, packets = plan.blocks_of_processor, plan.width, plan.width > 1
        limits: dict[str, Any] = {"threads": plan.most_threads, "bytes": width * element_bytes if packets else PACKET_BYTES, "acts": True}
        arguments = rf"{names}{width}, {str(columns).lower()}"
        kernels = {} if residual else {rf"batch_norm_act_stats_kernel{arguments}>": False}
        arguments = f"{arguments}, {str(residual).lower()}>"
        # Only with a residual there is grad_residual to store.
        kernels[rf"batch_norm_act_backward_reduce_kernel{arguments}"] = packets and residual
        kernels[rf"batch_norm_act_normalise_kernel{arguments}"] = packets
        for sets in ("false", "true") if columns else ("false",):
            kernels[rf"batch_norm_act_backward_elemt_kernel{arguments[:-1]}, {sets}>"] = packets
        for kernel, stores in kernels.items():
            gates[kernel] = Gate(
                kernel, blocks, loads=packets, stores=stores, **limits, local=dict.fromkeys(LOCAL.get(kernel, ()), MOST_LOCAL)
            )
    return tuple(gates.values())


GATES = (
    # nvcc puts some loads of the kernels with a parameter between stores. These limits are what it does today.
    Gate(rf"parametric_forward_kernel{EIGHT_BYTES}", 3, loads=True, stores=True, bytes=8, once=True, acts=True, loads_after_stores=6),
    Gate(r"parametric_forward_kernel<.*, [248], \(Span\)1>", 3, loads=True, stores=True, once=True, acts=True, loads_after_stores=6),
    Gate(r"parametric_forward_kernel<.*, [248], \(Span\)2>", 3, loads=True, stores=True, once=True, acts=True, loads_after_stores=48),
    Gate(rf"parametric_backward_run_kernel{EIGHT_BYTES}", 2, loads=True, stores=True, bytes=8, loads_after_stores=2),
    Gate(rf"parametric_backward_column_kernel{EIGHT_BYTES}", 2, loads=True, stores=True, threads=512, bytes=8, loads_after_stores=6),
    Gate(
        rf"(activation|rrelu|parametric)_(forward|forward_mask|backward|backward_mask)_kernel{PACKETS}",
        3,
        loads=True,
        stores=True,
        once=True,
        acts=True,
    ),
    Gate(rf"(activation|rrelu|parametric)_(forward|forward_mask|backward|backward_mask)_kernel{ONE}", 3),
    Gate(rf"parametric_backward_run_kernel{PACKETS}", 2, loads=True, stores=True, loads_after_stores=6),
    Gate(rf"parametric_backward_run_kernel{ONE}", 2),
    Gate(r"parametric_backward_column_kernel<double, 2>", 1, loads=True, stores=True, threads=512, loads_after_stores=6),
    Gate(r"parametric_backward_column_kernel<double, 1>", 1, threads=512),
    Gate(rf"parametric_backward_column_kernel{PACKETS}", 2, loads=True, stores=True, threads=512, loads_after_stores=6),
    Gate(rf"parametric_backward_column_kernel{ONE}", 2, threads=512),
    Gate(r"batch_norm_act_gather_stats_kernel", 4),
    Gate(r"group_norm_act_(statistics|sums)_kernel<(float|double)>", 4, threads=128),
    Gate(r"grad_norms_kernel<.*>", 4, loads=True),
    Gate(r"grad_norms_of_runs_kernel<.*>", 4),
    Gate(r"clip_with_norm_kernel", 4, loads=True, stores=True),
    Gate(r"clamp_kernel", 4, loads=True, stores=True),
    Gate(r"adaptive_clip_kernel<\(Norm\)., 256>", 3, loads=True, stores=True),
    Gate(r"adaptive_clip_kernel<\(Norm\)., 32>", 24, loads=True, stores=True, threads=32),
    Gate(r"rmsprop_kernel<.*>", 3, loads=True, stores=True),
)
WHOLE, FLOATS = rf"{SIXTEEN_BITS}8(, false)?", r"<float, 4"
# Of batch norm in packets of 4 in 16 bits.
LONG_RUNS, SHORT_RUNS = rf"{SIXTEEN_BITS}4, false", rf"{SIXTEEN_BITS}4, true"
# Of a kernel for sets of one channel and of several.
SETS = ", (true|false)"
# A tenth above the most that --figures prints for the architectures of COUNTED.
BUDGETS = (
    Budget(rf"activation_forward_kernel{WHOLE}>", 12.1, 2, most_with_inverse=10.0),
    Budget(rf"activation_forward_mask_kernel{WHOLE}>", 7.9, 2),
    Budget(rf"activation_backward_kernel{WHOLE}>", 9.0, 4, most_with_inverse=17.5),
    Budget(rf"activation_backward_mask_kernel{WHOLE}>", 5.7, 2),
    Budget(rf"parametric_forward_kernel{WHOLE}, \(Span\)0>", 5.7, 2, most_with_inverse=13.5),
    Budget(rf"activation_forward_kernel{FLOATS}>", 22.2, 4, most_with_inverse=43.3),
    Budget(rf"activation_forward_mask_kernel{FLOATS}>", 9.9, 4),
    Budget(rf"activation_backward_kernel{FLOATS}>", 40.6, 8, most_with_inverse=53.0),
    Budget(rf"activation_backward_mask_kernel{FLOATS}>", 7.0, 4),
    Budget(rf"batch_norm_act_stats_kernel{WHOLE}>", 10.9, 2),
    Budget(rf"batch_norm_act_stats_kernel{LONG_RUNS}>", 14.7, 2),
    Budget(rf"batch_norm_act_stats_kernel{SHORT_RUNS}>", 13.1, 2),
    Budget(rf"batch_norm_act_stats_kernel{FLOATS}, (true|false)>", 12.9, 4),
    Budget(rf"batch_norm_act_normalise_kernel{WHOLE}, false>", 16.5, 2, most_with_inverse=28.7),
    Budget(rf"batch_norm_act_normalise_kernel{LONG_RUNS}, false>", 20.7, 2, most_with_inverse=32.8),
    Budget(rf"batch_norm_act_normalise_kernel{SHORT_RUNS}, false>", 18.4, 2, most_with_inverse=30.5),
    Budget(rf"batch_norm_act_normalise_kernel{FLOATS}, (true|false), false>", 29.9, 4, most_with_inverse=61.0),
    Budget(rf"batch_norm_act_normalise_kernel{WHOLE}, true>", 16.6, 4, most_with_inverse=32.2),
    Budget(rf"batch_norm_act_normalise_kernel{LONG_RUNS}, true>", 23.2, 4, most_with_inverse=37.7),
    Budget(rf"batch_norm_act_normalise_kernel{SHORT_RUNS}, true>", 20.4, 4, most_with_inverse=34.7),
    Budget(rf"batch_norm_act_normalise_kernel{FLOATS}, (true|false), true>", 21.2, 8, most_with_inverse=65.6),
    Budget(rf"batch_norm_act_backward_reduce_kernel{WHOLE}, false>", 17.5, 4, most_with_inverse=34.1),
    Budget(rf"batch_norm_act_backward_reduce_kernel{LONG_RUNS}, false>", 22.1, 4, most_with_inverse=39.1),
    Budget(rf"batch_norm_act_backward_reduce_kernel{SHORT_RUNS}, false>", 20.2, 4, most_with_inverse=36.9),
    Budget(rf"batch_norm_act_backward_reduce_kernel{FLOATS}, (true|false), false>", 50.3, 8, most_with_inverse=62.3),
    # With a residual there are two ways: from its mask or from itself.
    Budget(rf"batch_norm_act_backward_reduce_kernel{WHOLE}, true>", 25.9, 4, most_with_inverse=42.3),
    Budget(rf"batch_norm_act_backward_reduce_kernel{LONG_RUNS}, true>", 22.2, 4, most_with_inverse=33.3),
    Budget(rf"batch_norm_act_backward_reduce_kernel{SHORT_RUNS}, true>", 21.5, 4, most_with_inverse=32.5),
    Budget(rf"batch_norm_act_backward_reduce_kernel{FLOATS}, (true|false), true>", 39.4, 8, most_with_inverse=48.2),
    Budget(rf"batch_norm_act_backward_elemt_kernel{WHOLE}, false{SETS}>", 19.5, 4, most_with_inverse=35.9),
    Budget(rf"batch_norm_act_backward_elemt_kernel{LONG_RUNS}, false{SETS}>", 25.1, 4, most_with_inverse=42.1),
    Budget(rf"batch_norm_act_backward_elemt_kernel{SHORT_RUNS}, false{SETS}>", 23.0, 4, most_with_inverse=39.5),
    Budget(rf"batch_norm_act_backward_elemt_kernel{FLOATS}, (true|false), false{SETS}>", 52.0, 8, most_with_inverse=64.4),
    Budget(rf"batch_norm_act_backward_elemt_kernel{WHOLE}, true{SETS}>", 17.8, 4, most_with_inverse=28.8),
    Budget(rf"batch_norm_act_backward_elemt_kernel{LONG_RUNS}, true{SETS}>", 21.6, 4, most_with_inverse=32.7),
    Budget(rf"batch_norm_act_backward_elemt_kernel{SHORT_RUNS}, true{SETS}>", 21.7, 4, most_with_inverse=33.3),
    Budget(rf"batch_norm_act_backward_elemt_kernel{FLOATS}, (true|false), true{SETS}>", 39.1, 8, most_with_inverse=47.3),
    Budget(r"grad_norms_kernel<\(Norm\)[01]>", 65, PACKET_BYTES),
    Budget(r"grad_norms_kernel<\(Norm\)2>", 45, PACKET_BYTES),
    Budget(r"clip_with_norm_kernel", 76, PACKET_BYTES),
    Budget(r"clamp_kernel", 95, PACKET_BYTES),
    # Of three, four and five loaded packets.
    Budget(r"rmsprop_kernel<false, false>", 117, PACKET_BYTES),
    Budget(r"rmsprop_kernel<(true, false|false, true)>", 104, PACKET_BYTES),
    Budget(r"rmsprop_kernel<true, true>", 92, PACKET_BYTES),
)
COUNTED = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Way:
    """A way through hot code: of those that move most, the shortest. In kernels of activations, there is one for those that
    need no exponential, and one for those with an inverse, each the one with the most arithmetic.
    """

    instructions: int
    load_bytes: int
    store_bytes: int
    loads_after_stores: int
    strong_stores: int
    has_inverse: bool = False


@dataclass
class Kernel:
    architecture: str
    name: str
    registers: int = 0
    local_bytes: int = 0
    local: int = 0
    loads: bool = False
    stores: bool = False
    ways: list[Way] = field(default_factory=list)

    @property
    def gate(self) -> Gate | None:
        gates = (*GATES, *of_batch_norm()) if self.name.startswith("batch_norm_act_") else GATES
        return next((gate for gate in gates if re.fullmatch(gate.kernel, self.name)), None)

    def blocks(self, threads: int) -> int:
        """As many as the registers of an SM hold, which gives them to warps in eights for each thread."""
        of_warp = -(-max(self.registers, 1) // 8) * 8 * 32
        warps = min(MOST_WARPS_OF_SM, REGISTERS_OF_SM // PARTS_OF_SM // of_warp * PARTS_OF_SM)
        return warps // (threads // 32)


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton is not None and triton.origin is not None else None
    found = str(beside) if beside is not None and beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"inspect_cuda_code: no {name}: neither in PATH nor in an installed triton")
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def short_name(symbol: str) -> str:
    """The name of a kernel without namespaces and parameters."""
    demangled = output_of("c++filt", symbol).strip().removeprefix("void ")
    name = re.match(r"(?:\w+::|\(anonymous namespace\)::)*(\w+(?:<.*>)?)\(", demangled)
    return re.sub(r"gradkernels::(cuda::)?(\(anonymous namespace\)::)?", "", name.group(1) if name else demangled)


def instructions(text: str) -> list[tuple[int, str]]:
    """Address and text of every instruction of a function."""
    return [(int(address, 16), code) for address, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", text)]


def successors_of(code: list[tuple[int, str]]) -> list[list[int]]:
    """The places that each instruction may be followed by."""
    places = {address: place for place, (address, _) in enumerate(code)}
    follow: list[list[int]] = []
    for place, (_, text) in enumerate(code):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        # Not a branch with a condition: "@P0 BRA 0x40" or "BRA.U UP0, 0x40".
        ends = re.match(r"(EXIT|RET|BRX)\b|BRA\S*\s+0x", text) is not None
        follow.append([] if ends or place + 1 == len(code) else [place + 1])
        if branch is not None and int(branch.group(1), 16) in places:
            follow[-1].append(places[int(branch.group(1), 16)])
    return follow


def moved_bytes(text: str, instruction: str) -> int:
    """By an access to global memory with this instruction, LDG or STG; 0 for another instruction."""
    if instruction not in text or not re.search(rf"\b{instruction}\b", text):
        return 0
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", text)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width.group(1)] if width else 4


def is_packet(text: str, size: int) -> bool:
    return moved_bytes(text, "LDG") == size or moved_bytes(text, "STG") == size


def is_wanted(text: str, size: int) -> bool:
    """Whether an instruction moves a packet or a byte of a mask."""
    return is_packet(text, size) or moved_bytes(text, "LDG") == 1 or moved_bytes(text, "STG") == 1


def is_slow(text: str) -> bool:
    """Whether an instruction belongs to the remainder of a tensor, or to what is rare."""
    return moved_bytes(text, "STG") == 2 or moved_bytes(text, "LDG") == 2 or "CALL" in text


class Flow:
    """The places of a function in an order in which only `backward` goes back, and the loops: head, then all places."""

    def __init__(self, follow: list[list[int]]) -> None:
        self.backward: set[tuple[int, int]] = set()
        open_places, done, finished = {0}, {0}, []
        stack = [(0, iter(follow[0]))]
        while stack:
            place, ahead = stack[-1]
            after = next(ahead, None)
            if after is None:
                stack.pop()
                open_places.discard(place)
                finished.append(place)
            elif after in open_places:
                self.backward.add((place, after))
            elif after not in done:
                done.add(after)
                open_places.add(after)
                stack.append((after, iter(follow[after])))
        self.order = finished[::-1]
        self.ahead = {place: [each for each in follow[place] if (place, each) not in self.backward] for place in self.order}
        before: dict[int, list[int]] = {}
        for place in self.order:
            for after in follow[place]:
                before.setdefault(after, []).append(place)
        self.loops: dict[int, set[int]] = {}
        for end, head in self.backward:
            loop = self.loops.setdefault(head, {head})
            left = [end]
            while left:
                place = left.pop()
                if place not in loop:
                    loop.add(place)
                    left += before.get(place, [])

    def ends_of(self, head: int) -> set[int]:
        return {end for end, target in self.backward if target == head}


def loads_after_stores(texts: list[str], flow: Flow, inside: set[int], size: int) -> int:
    """How many loads can follow a store of a packet and come before another one, in a loop in the same iteration. A loop that
    loads for its next iteration does so after all stores.
    """
    stores = {place for place in flow.order if place in inside and moved_bytes(texts[place], "STG") == size}
    after: set[int] = set()
    before: set[int] = set()
    for place in flow.order:
        if place in inside and (place in stores or place in after):
            after.update(flow.ahead[place])
    for place in reversed(flow.order):
        if place in inside and any(ahead in stores or ahead in before for ahead in flow.ahead[place]):
            before.add(place)
    return sum(moved_bytes(texts[place], "LDG") > 0 for place in inside & after & before)


# The special functions on a way, and the end of all ways.
PLAIN, EXPONENTIAL, INVERSE = range(3)
END = -1


def ways_through(texts: list[str], flow: Flow, inside: set[int], begin: int, ends: set[int], gate: Gate) -> Iterator[Way]:
    """The best way through these places; if there is a way for each activation, the best without an exponential and with an inverse."""
    # For each place and the special functions before it: what is moved quickly, arithmetic, bytes, minus instructions, and where
    # from. A kernel that stores nothing could leave out packets that it has loaded; that way has less arithmetic. One that
    # loads its next tile last could do so for another way than it has taken; that has as many loads, of fewer bytes.
    best: dict[tuple[int, int], tuple[int, int, int, int, tuple[int, int] | None]] = {(begin, PLAIN): (0, 0, 0, 0, None)}
    for at in ((place, kind) for place in flow.order if place in inside for kind in (PLAIN, EXPONENTIAL, INVERSE)):
        if at not in best:
            continue
        text = texts[at[0]]
        moved, work, size, count, _ = best[at]
        kind = at[1]
        if gate.acts:
            kind = max(kind, INVERSE if "MUFU.RCP" in text else EXPONENTIAL if "MUFU.EX2" in text else PLAIN)
            work += re.search(r"\b([FD](ADD|MUL|FMA)|MUFU)\b", text) is not None
        size += moved_bytes(text, "LDG") + moved_bytes(text, "STG")
        mine = (moved + is_wanted(text, gate.bytes) - is_slow(text), work, size, count - 1, at)
        for after in flow.ahead[at[0]] + [END] * (at[0] in ends):
            if (after, kind) not in best or best[after, kind][:4] < mine[:4]:
                best[after, kind] = mine
    for kind in (PLAIN, INVERSE):
        before = best[END, kind][4] if (END, kind) in best else None
        path = []
        while before is not None:
            path.append(texts[before[0]])
            before = best[before][4]
        packets = [text for text in path if is_packet(text, gate.bytes)]
        if packets:
            yield Way(
                len(path),
                sum(moved_bytes(text, "LDG") for text in packets),
                sum(moved_bytes(text, "STG") for text in packets),
                loads_after_stores(texts, flow, inside, gate.bytes),
                sum(re.search(r"\bSTG\b.*STRONG\.(GPU|SYS)", text) is not None for text in path),
                kind == INVERSE,
            )


def hot_loops(flow: Flow, texts: list[str], size: int) -> dict[int, set[int]]:
    """The innermost loops that move packets: their heads and all their places."""
    moving = {head: loop for head, loop in sorted(flow.loops.items()) if any(is_packet(texts[place], size) for place in loop)}
    return {head: loop for head, loop in moving.items() if not any(other in loop for other in moving if other != head)}


def inspect_code(kernel: Kernel, code: list[tuple[int, str]]) -> None:
    """Fills in what the machine code says."""
    gate = kernel.gate or Gate(kernel.name, 0)
    flow = Flow(successors_of(code))
    texts = [text for _, text in code]
    hot = hot_loops(flow, texts, gate.bytes)
    if gate.once:
        whole = set(flow.order)
        kernel.ways = list(ways_through(texts, flow, whole, 0, {place for place in whole if not flow.ahead[place]}, gate))
    else:
        kernel.ways = [way for head, loop in hot.items() for way in ways_through(texts, flow, loop, head, flow.ends_of(head), gate)]
    kernel.loads, kernel.stores = (
        any(moved_bytes(texts[place], name) == gate.bytes for loop in hot.values() for place in loop) for name in ("LDG", "STG")
    )
    for loop in (hot or flow.loops).values():
        kernel.local = max(kernel.local, sum(re.search(r"\b(LDL|STL)\b", texts[place]) is not None for place in loop))


def kernels_of(library: str) -> Iterator[Kernel]:
    cuobjdump = tool("cuobjdump")
    architectures = sorted(set(re.findall(r"\.(sm_\d+)\.", output_of(cuobjdump, "--list-elf", library))))
    for architecture in architectures:
        found = {}
        usage = output_of(cuobjdump, "--dump-resource-usage", "--gpu-architecture", architecture, library)
        for symbol, figures in re.findall(r"Function (\w+):\s+(.*)", usage):
            figure = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", figures))
            kernel = Kernel(architecture, short_name(symbol), int(figure["REG"]), int(figure["STACK"]) + int(figure["LOCAL"]))
            found[symbol] = kernel
        sass = output_of(cuobjdump, "--dump-sass", "--gpu-architecture", architecture, library)
        for part in re.split(r"\n\s*Function : ", sass)[1:]:
            symbol = part.split("\n", 1)[0].strip()
            inspect_code(found[symbol], instructions(part))
        yield from found.values()


def faults_of(kernel: Kernel) -> Iterator[str]:
    gate = kernel.gate
    if gate is None:
        yield "has no row in GATES"
        return
    most_local = gate.local.get(kernel.architecture, 0)
    if kernel.local > most_local:
        yield f"accesses local memory {kernel.local} times in a loop, more than {most_local}"
    blocks = kernel.blocks(gate.threads)
    if blocks < gate.blocks:
        yield f"has {kernel.registers} registers: {blocks} blocks on an SM, fewer than {gate.blocks}"
    if gate.loads and not kernel.loads:
        yield f"has no loop with {gate.bytes}-byte loads"
    if gate.stores and not kernel.stores:
        yield f"has no loop with {gate.bytes}-byte stores"
    if any(way.strong_stores > 0 for way in kernel.ways):
        yield "has stores in hot code that are visible beyond the SM"
    budget = next((budget for budget in BUDGETS if re.fullmatch(budget.kernel, kernel.name)), None)
    for way in kernel.ways:
        if way.loads_after_stores > gate.loads_after_stores:
            yield f"has {way.loads_after_stores} loads after a store in hot code, more than {gate.loads_after_stores}"
    if budget is None:
        return
    if not kernel.ways:
        yield "has no hot code"
    for way in kernel.ways:
        most = budget.most_with_inverse if way.has_inverse else budget.most
        if most is not None and kernel.architecture in COUNTED and way.load_bytes > 0:
            each = way.instructions * budget.bytes / way.load_bytes
            if each > most:
                yield f"takes {each:.1f} instructions an element{' with an inverse' if way.has_inverse else ''}, more than {most}"


def figures_of(kernel: Kernel) -> Iterator[str]:
    yield (
        f"{kernel.architecture} {kernel.name}: {kernel.registers} registers, {kernel.blocks(kernel.gate.threads if kernel.gate else 256)} "
        f"blocks on an SM, {kernel.local_bytes} bytes of local memory, {kernel.local} accesses in a loop"
    )
    for way in kernel.ways:
        each = f"{way.instructions * PACKET_BYTES / way.load_bytes:.1f} for 16 loaded bytes" if way.load_bytes else "no loads"
        yield (
            f"  {way.instructions} instructions{' with an inverse' if way.has_inverse else ''}, {each}; {way.load_bytes} bytes loaded, "
            f"{way.store_bytes} stored, {way.loads_after_stores} loads after stores"
        )


def main() -> None:
    shows = "--figures" in sys.argv[1:]
    libraries = [each for each in sys.argv[1:] if each != "--figures"]
    kernels = [kernel for library in libraries for kernel in kernels_of(library)]
    if not kernels:
        sys.exit("inspect_cuda_code: no kernels in " + " ".join(libraries))
    if shows:
        print("\n".join(line for kernel in kernels for line in figures_of(kernel)))
    faults = [f"{kernel.architecture} {kernel.name} {fault}" for kernel in kernels for fault in faults_of(kernel)]
    most = max(kernels, key=lambda kernel: kernel.registers)
    architectures = ", ".join(sorted({kernel.architecture for kernel in kernels}))
    print(f"{len(kernels)} kernels on {architectures}; most registers: {most.registers}, {most.name}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
