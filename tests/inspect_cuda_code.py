"""Reads the machine code of a library built with CUDA and fails on code that costs bandwidth; needs no GPU.

    python tests/inspect_cuda_code.py [--figures] build/cuda/lib/gradkernels/_C.*.so

For every kernel on every architecture it checks the local memory (which holds spills), how many blocks the
registers of an SM hold, and its hot loops: the innermost loops that move packets. A hot loop has to move 16
bytes with each instruction, within a budget of instructions per element, with loads before stores, and with
stores that need not be visible beyond the SM at once. GATES and BUDGETS have the limits; a kernel without a
row in GATES is an error. --figures prints what the rows limit, for new rows. cuobjdump comes with the CUDA
toolkit or with triton; object files of nvcc may be given too.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

THREADS = 256
REGISTERS_OF_SM = 65_536
MOST_THREADS_OF_SM = 2048
PACKET_BYTES = 16


@dataclass(frozen=True)
class Gate:
    """The limits of a kernel.

    kernel: a pattern for the name with template arguments.
    blocks: how many blocks of 256 threads the registers of an SM have to hold.
    loads, stores: whether a loop has to move 16 bytes at a time.
    """

    kernel: str
    blocks: int
    loads: bool = False
    stores: bool = False


@dataclass(frozen=True)
class Budget:
    """The limits of a kernel's hot loops, of each if there are several.

    kernel: a pattern as in Gate.
    most: instructions for each element, on the path that moves whole packets.
    bytes: what is loaded for each element. A kernel with a loop for each dtype has PACKET_BYTES, so that most is for
        each packet.
    loads_after_stores: whether a load may wait for a store of the same iteration.

    Instructions are counted for the architectures that packages are built for. Compute capability 7.5 converts bfloat16 by
    integer arithmetic, and 12.0 has few instructions for float64.
    """

    kernel: str
    most: float
    bytes: int
    loads_after_stores: bool = False


# The second template argument of the activations' kernels is the number of elements that are moved at once.
ONE = r"<.*, 1>"
PACKETS = r"<.*, [248]>"
# batch_norm_act: two blocks on an SM, or one for kernels that compute in float64.
FLOAT64 = "<double, .*>"
GATES = (
    Gate(rf"(activation|rrelu|parametric)_(forward|forward_mask|backward|backward_mask)_kernel{PACKETS}", 3, loads=True, stores=True),
    Gate(rf"(activation|rrelu|parametric)_(forward|forward_mask|backward|backward_mask)_kernel{ONE}", 3),
    Gate(rf"parametric_backward_(run|column)_kernel{PACKETS}", 2, loads=True, stores=True),
    Gate(rf"parametric_backward_(run|column)_kernel{ONE}", 2),
    *(
        Gate(f"batch_norm_act_{name}_kernel{arguments}", blocks, loads=True, stores=name != "stats")
        for name in ("stats", "normalise", "forward", "backward_reduce", "backward_elemt", "backward")
        for arguments, blocks in ((FLOAT64, 1), ("<.*>", 2))
    ),
    Gate(r"batch_norm_act_gather_stats_kernel", 4),
    Gate(r"grad_norms_kernel<.*>", 4, loads=True),
    Gate(r"grad_norms_of_runs_kernel<.*>", 4),
    Gate(r"clip_with_norm_kernel", 4, loads=True, stores=True),
    Gate(r"clamp_kernel", 4, loads=True, stores=True),
    Gate(r"rmsprop_kernel<.*>", 3, loads=True, stores=True),
)
# A tenth above what --figures prints.
BUDGETS = (
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
class Loop:
    """A hot loop, on the path that moves most, and of these the shortest."""

    instructions: int
    load_bytes: int
    store_bytes: int
    loads_after_stores: int
    strong_stores: int


@dataclass
class Kernel:
    architecture: str
    name: str
    registers: int = 0
    local_bytes: int = 0
    loads: bool = False
    stores: bool = False
    loops: list[Loop] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Of 256 threads, as many as the registers of an SM hold, which gives them to warps in eights for each thread."""
        return min(MOST_THREADS_OF_SM // THREADS, REGISTERS_OF_SM // (-(-max(self.registers, 1) // 8) * 8 * THREADS))


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
    if not re.search(rf"\b{instruction}\b", text):
        return 0
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", text)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width.group(1)] if width else 4


def is_packet(text: str) -> bool:
    return moved_bytes(text, "LDG") == PACKET_BYTES or moved_bytes(text, "STG") == PACKET_BYTES


def is_wanted(text: str) -> bool:
    """Whether an instruction moves a packet or a byte of a mask."""
    return is_packet(text) or moved_bytes(text, "LDG") == 1 or moved_bytes(text, "STG") == 1


def is_slow(text: str) -> bool:
    """Whether an instruction belongs to the remainder of a tensor, or to what is rare."""
    return moved_bytes(text, "STG") == 2 or moved_bytes(text, "LDG") == 2 or "CALL" in text


def loads_after_stores(texts: list[str], follow: list[list[int]], begin: int, end: int) -> int:
    """How many loads of a loop can follow a store of a packet in the same iteration."""
    after: set[int] = set()
    loads = 0
    for place in range(begin, end + 1):
        if moved_bytes(texts[place], "STG") == PACKET_BYTES or place in after:
            after.update(each for each in follow[place] if each > place)
        loads += place in after and moved_bytes(texts[place], "LDG") > 0
    return loads


def hot_loops(code: list[tuple[int, str]]) -> Iterator[Loop]:
    """The innermost loops that move packets."""
    follow = successors_of(code)
    texts = [text for _, text in code]
    found = [(target, place) for place in range(len(code)) for target in follow[place] if target <= place]
    found = [(begin, end) for begin, end in found if any(is_packet(text) for text in texts[begin : end + 1])]
    for begin, end in found:
        if any((begin, end) != other and begin <= other[0] and other[1] <= end for other in found):
            continue
        # The best way to each place: what is moved quickly, minus instructions, and the place before.
        best: dict[int, tuple[int, int, int]] = {begin: (0, 0, -1)}
        for place in range(begin, end + 1):
            if place not in best:
                continue
            moved, instructions, _ = best[place]
            mine = (moved + is_wanted(texts[place]) - is_slow(texts[place]), instructions - 1, place)
            for after in follow[place]:
                if place < after <= end:
                    best[after] = max(best.get(after, mine), mine)
        if end not in best:
            continue
        path, place = [], end
        while place >= 0:
            path.append(texts[place])
            place = best[place][2]
        path.reverse()
        if any(is_packet(text) for text in path):
            yield Loop(
                len(path),
                sum(moved_bytes(text, "LDG") for text in path if is_packet(text)),
                sum(moved_bytes(text, "STG") for text in path if is_packet(text)),
                loads_after_stores(texts, follow, begin, end),
                sum(re.search(r"\bSTG\b.*STRONG\.(GPU|SYS)", text) is not None for text in path),
            )


def moves_packets_in_a_loop(code: list[tuple[int, str]], pattern: str) -> bool:
    """Whether an instruction that matches can be reached from itself."""
    follow = successors_of(code)
    for start, (_, text) in enumerate(code):
        if re.search(pattern, text):
            seen, ahead = set(), list(follow[start])
            while ahead:
                place = ahead.pop()
                if place == start:
                    return True
                if place not in seen:
                    seen.add(place)
                    ahead += follow[place]
    return False


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
            code = instructions(part)
            kernel = found[symbol]
            kernel.loads = moves_packets_in_a_loop(code, r"\bLDG\.E\.\S*128|\bLDG\.128|\bLD\.E\.128|\bLDGSTS\.\S*128")
            kernel.loops = list(hot_loops(code))
            kernel.stores = moves_packets_in_a_loop(code, r"\bSTG\.E\.\S*128|\bSTG\.128|\bST\.E\.128")
        yield from found.values()


def faults_of(kernel: Kernel) -> Iterator[str]:
    gate = next((gate for gate in GATES if re.fullmatch(gate.kernel, kernel.name)), None)
    if gate is None:
        yield "has no row in GATES"
        return
    if kernel.local_bytes > 0:
        yield f"has {kernel.local_bytes} bytes of local memory for each thread"
    if kernel.blocks < gate.blocks:
        yield f"has {kernel.registers} registers: {kernel.blocks} blocks on an SM, fewer than {gate.blocks}"
    if gate.loads and not kernel.loads:
        yield "has no loop with 16-byte loads"
    if gate.stores and not kernel.stores:
        yield "has no loop with 16-byte stores"
    budget = next((budget for budget in BUDGETS if re.fullmatch(budget.kernel, kernel.name)), None)
    if any(loop.strong_stores > 0 for loop in kernel.loops):
        yield "has stores in a loop that are visible beyond the SM"
    if budget is None:
        return
    if not kernel.loops:
        yield "has no hot loop"
    for loop in kernel.loops:
        is_counted = kernel.architecture in COUNTED and loop.load_bytes > 0
        if is_counted and loop.instructions * budget.bytes > budget.most * loop.load_bytes:
            yield f"takes {loop.instructions * budget.bytes / loop.load_bytes:.1f} instructions an element, more than {budget.most}"
        if loop.loads_after_stores > 0 and not budget.loads_after_stores:
            yield f"has {loop.loads_after_stores} loads after a store in a loop"


def figures_of(kernel: Kernel) -> Iterator[str]:
    yield (
        f"{kernel.architecture} {kernel.name}: {kernel.registers} registers, {kernel.blocks} blocks on an SM, "
        f"{kernel.local_bytes} bytes of local memory"
    )
    for loop in kernel.loops:
        each = f"{loop.instructions * PACKET_BYTES / loop.load_bytes:.1f} for 16 loaded bytes" if loop.load_bytes else "no loads"
        yield (
            f"  {loop.instructions} instructions, {each}; {loop.load_bytes} bytes loaded, {loop.store_bytes} stored, "
            f"{loop.loads_after_stores} loads after stores"
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
