"""Reads the machine code of a library built with CUDA and fails on code that costs bandwidth; needs no GPU.

    python tests/inspect_cuda_code.py build/cuda/lib/gradkernels/_C.*.so

For every kernel on every architecture it checks the local memory (which holds spills), the registers, and
that the loop over packets moves 16 bytes with each instruction. GATES has the limits; a kernel without a row
is an error. cuobjdump and nvdisasm come with the CUDA toolkit or with triton.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Gate:
    """The limits of a kernel.

    kernel: a pattern for the name with template arguments.
    registers: the largest number allowed.
    loads, stores: whether a loop has to move 16 bytes at a time.
    """

    kernel: str
    registers: int
    loads: bool = False
    stores: bool = False


# The second template argument of the activations' kernels is the number of elements that are moved at once.
# An SM has 65,536 registers: enough for 4 blocks of 256 threads with 64 registers each, or for 2 with 128.
ONE = r"<.*, 1>"
PACKETS = r"<.*, [248]>"
# batch_norm_act: two blocks of 256 threads on an SM, or one for kernels that compute in float64.
FLOAT64 = "<double, .*>"
GATES = (
    Gate(rf"(activation|rrelu|parametric)_(forward|forward_mask|backward|backward_mask)_kernel{PACKETS}", 72, loads=True, stores=True),
    Gate(rf"(activation|rrelu|parametric)_(forward|forward_mask|backward|backward_mask)_kernel{ONE}", 72),
    Gate(rf"parametric_backward_(run|column)_kernel{PACKETS}", 128, loads=True, stores=True),
    Gate(rf"parametric_backward_(run|column)_kernel{ONE}", 128),
    *(
        Gate(f"batch_norm_act_{name}_kernel{arguments}", registers, loads=True, stores=name != "stats")
        for name in ("stats", "normalise", "forward", "backward_reduce", "backward_elemt", "backward")
        for arguments, registers in ((FLOAT64, 255), ("<.*>", 128))
    ),
    Gate(r"batch_norm_act_gather_stats_kernel", 64),
    Gate(r"grad_norms_kernel<.*>", 64, loads=True),
    Gate(r"grad_norms_of_runs_kernel<.*>", 64),
    Gate(r"clip_with_norm_kernel", 64, loads=True, stores=True),
    Gate(r"clamp_kernel", 64, loads=True, stores=True),
    Gate(r"rmsprop_kernel<.*>", 84, loads=True, stores=True),
)


@dataclass
class Kernel:
    architecture: str
    name: str
    registers: int = 0
    local_bytes: int = 0
    loads: bool = False
    stores: bool = False


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


def moves_packets_in_a_loop(code: list[tuple[int, str]], pattern: str) -> bool:
    """Whether an instruction that matches can be reached from itself."""
    places = {address: place for place, (address, _) in enumerate(code)}
    follow: list[list[int]] = []
    for place, (_, text) in enumerate(code):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        # Not a branch with a condition: "@P0 BRA 0x40" or "BRA.U UP0, 0x40".
        ends = re.match(r"(EXIT|RET|BRX)\b|BRA\S*\s+0x", text) is not None
        follow.append([] if ends or place + 1 == len(code) else [place + 1])
        if branch is not None and int(branch.group(1), 16) in places:
            follow[-1].append(places[int(branch.group(1), 16)])
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
            kernel.stores = moves_packets_in_a_loop(code, r"\bSTG\.E\.\S*128|\bSTG\.128|\bST\.E\.128")
        yield from found.values()


def faults_of(kernel: Kernel) -> Iterator[str]:
    gate = next((gate for gate in GATES if re.fullmatch(gate.kernel, kernel.name)), None)
    if gate is None:
        yield "has no row in GATES"
        return
    if kernel.local_bytes > 0:
        yield f"has {kernel.local_bytes} bytes of local memory for each thread"
    if kernel.registers > gate.registers:
        yield f"has {kernel.registers} registers, more than {gate.registers}"
    if gate.loads and not kernel.loads:
        yield "has no loop with 16-byte loads"
    if gate.stores and not kernel.stores:
        yield "has no loop with 16-byte stores"


def main() -> None:
    kernels = [kernel for library in sys.argv[1:] for kernel in kernels_of(library)]
    if not kernels:
        sys.exit("inspect_cuda_code: no kernels in " + " ".join(sys.argv[1:]))
    faults = [f"{kernel.architecture} {kernel.name} {fault}" for kernel in kernels for fault in faults_of(kernel)]
    most = max(kernels, key=lambda kernel: kernel.registers)
    architectures = ", ".join(sorted({kernel.architecture for kernel in kernels}))
    print(f"{len(kernels)} kernels on {architectures}; most registers: {most.registers}, {most.name}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
