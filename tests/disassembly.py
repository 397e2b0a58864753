"""The machine code of the CUDA kernels: compiled with the build's own nvcc and flags, disassembled, and read.

Needs no GPU. test_cuda_build.py holds the kernels to what is read here; by hand: ``python tests/disassembly.py 90a``.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


class Loop(NamedTuple):
    """One loop: its opcodes, and instructions that wait for a load of elements before another is under way."""

    opcodes: list[str]
    early_uses: list[str]


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    name: str  # without namespaces and parameters: "pair_kernel<Vector<bf16, float>, float>"
    registers: int
    stack_bytes: int
    spill_bytes: int
    opcodes: list[str]  # with modifiers: "LDG.E.128.CONSTANT"; of the functions that it calls as well
    element_loops: list[Loop]  # the innermost ones with 16-byte accesses to global memory


@functools.cache
def build_script() -> ModuleType:
    """setup.py as a module: imported, and nothing built."""
    spec = importlib.util.spec_from_file_location("sipo_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


@functools.cache
def cuda_part() -> Any:
    """setup.py's CUDA part: the compiler, the flags, and ``details["archs"]``."""
    return build_script().cuda_part(build_script().find_compiler())


@functools.cache
def missing_tools() -> str | None:
    """What is lacking to compile and read kernels, or ``None``."""
    try:
        cuda_part()
    except build_script().LeftOutError as why:
        return str(why)
    if nvdisasm() is None:
        return "no nvdisasm found (it is in the CUDA toolkit and in Triton)"
    if shutil.which("c++filt") is None:
        return "no c++filt found (it is in binutils)"
    return None


def nvdisasm() -> str | None:
    """The disassembler: the toolkit's where it has one, or the one that comes with Triton."""
    beside_nvcc = Path(build_script().find_nvcc()[-1]).with_name("nvdisasm")
    triton = importlib.util.find_spec("triton")
    packaged = [Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"] if triton and triton.origin else []
    return next(filter(None, map(shutil.which, map(str, (beside_nvcc, "nvdisasm", *packaged)))), None)


def compile_and_read(source: Path, arch: str) -> list[Kernel]:
    """Every kernel of a source file, compiled for one architecture ("90a")."""
    # As the build compiles it, but for one architecture and to plain machine code.
    others = ("-gencode", "-Xfatbin", "--threads")
    nvcc = [word for word in cuda_part().units[0].command if not word.startswith(others)]
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        said = _run(*nvcc, target, "-Xptxas=-v", "-cubin", str(source), "-o", cubin).stderr
        sass = _run(str(nvdisasm()), cubin).stdout
    resources = dict(read_resources(said))
    code = dict(read_sass(sass))
    assert set(resources) == set(code), "ptxas and nvdisasm tell of different kernels"
    plain = _run("c++filt", *code).stdout.splitlines()
    return [Kernel(short(name), *resources[mangled], *code[mangled]) for name, mangled in zip(plain, code, strict=True)]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done


def short(name: str) -> str:
    """A demangled kernel's name without what all of them share: return type, namespaces, parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name.removeprefix("void "))
    return name.rpartition("(")[0].replace(" >", ">") if name.endswith(")") else name


def read_resources(said: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """``(kernel, (registers, bytes of stack, bytes spilled))`` from what ``ptxas -v`` prints."""
    entry = r"Compiling entry function '(\S+)'[^\n]*\n(.*?)Used (\d+) registers"
    for name, between, registers in re.findall(entry, said, re.DOTALL):
        # Functions that are called and not inlined have lines of their own.
        stack = [int(size) for size in re.findall(r"(\d+) bytes stack frame", between)]
        spills = [int(size) for size in re.findall(r"(\d+) bytes spill", between)]
        yield name, (int(registers), sum(stack), sum(spills))


def read_sass(listing: str) -> Iterator[tuple[str, tuple[list[str], list[Loop]]]]:
    """``(kernel, (opcodes, element loops))`` from what nvdisasm prints."""
    sections = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)[1:]
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        blocks = _blocks(text.splitlines())
        wide = [loop for loop in _loops(blocks) if any(_wide_global(it.opcode) for i in loop for it in blocks[i].code)]
        innermost = [loop for loop in wide if not any(other < loop for other in wide)]
        codes = [[it for i in sorted(loop) for it in blocks[i].code] for loop in innermost]
        loops = [Loop([it.opcode for it in code], early_uses(code)) for code in codes]
        yield name, ([it.opcode for block in blocks for it in block.code], loops)


def _wide_global(opcode: str) -> bool:
    return opcode.startswith(("LDG.", "STG.")) and ".128" in opcode


class _Instruction(NamedTuple):
    opcode: str
    operands: str


def early_uses(code: list[_Instruction]) -> list[str]:
    """Instructions that read what a load of elements brings, although another such load comes behind them.

    Elements are what nobody writes meanwhile (``LDG...CONSTANT``). In the order of the listing, whatever the branches.
    """
    loads = [i for i, it in enumerate(code) if it.opcode.startswith("LDG") and "CONSTANT" in it.opcode]
    awaited: set[int] = set()
    found = []
    for i, (opcode, operands) in enumerate(code[: loads[-1] if loads else 0]):
        first, _, others = operands.partition(",")
        writes = re.fullmatch(r"\s*R(\d+)(\.reuse)?\s*", first) if not opcode.startswith("ST") else None
        if awaited & _registers(others if writes else operands):
            found.append(opcode + operands)
        if writes:
            width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
            written = set(range(int(writes[1]), int(writes[1]) + width))
            awaited = awaited | written if i in loads else awaited - written
    return found


def _registers(operands: str) -> set[int]:
    found = re.findall(r"(?<![A-Z])R(\d+)(\.64)?", operands)
    return {int(number) + more for number, wide in found for more in ((0, 1) if wide else (0,))}


class _Block(NamedTuple):
    """Instructions that run one after another, the labels before them, and where they may jump in the end."""

    labels: list[str]
    code: list[_Instruction]
    jumps: list[str]
    ends: list[bool]  # holds one item if the next block does not follow

    @staticmethod
    def new() -> _Block:
        return _Block([], [], [], [])


_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")


def _blocks(lines: list[str]) -> list[_Block]:
    blocks = [_Block.new()]
    for line in lines:
        if label := _LABEL.match(line):
            if blocks[-1].code:
                blocks.append(_Block.new())
            blocks[-1].labels.append(label[1])
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            blocks[-1].code.append(_Instruction(opcode, operands.rstrip()))
            if opcode.startswith(("BRA", "BRX", "JMP", "JMX", "CALL", "EXIT", "RET")):
                blocks[-1].jumps.extend(re.findall(r"\.L\w+", operands))
                # `BRA P1, (label)` has a condition too. A call returns; one of a label is a jump, and that is as well.
                maybe = predicate or opcode.startswith("CALL")
                maybe = maybe or (opcode.startswith("BRA") and re.match(r"\s*[!~]?U?[PR]", operands))
                if not maybe:
                    blocks[-1].ends.append(True)
                blocks.append(_Block.new())
    return blocks


def _loops(blocks: list[_Block]) -> list[frozenset[int]]:
    """The natural loops, as sets of blocks; jumps back from code that was moved out of the way are none."""
    at = {label: i for i, block in enumerate(blocks) for label in block.labels}
    after = [[at[label] for label in block.jumps if label in at] for block in blocks]
    for i, block in enumerate(blocks[:-1]):
        if not block.ends:
            after[i].append(i + 1)
    reached, waiting = {0}, [0]
    while waiting:
        new = set(after[waiting.pop()]) - reached
        reached |= new
        waiting += new
    before: list[list[int]] = [[] for _ in blocks]
    for i in reached:
        for target in after[i]:
            before[target].append(i)
    # Dominators, as bits: a block's are its own and those common to all that lead to it.
    everything = (1 << len(blocks)) - 1
    dominators = [1] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            common = everything
            for source in before[i]:
                common &= dominators[source]
            if (common := common | 1 << i) != dominators[i]:
                dominators[i], changed = common, True
    loops: dict[int, set[int]] = {}
    for tail in reached:
        for head in after[tail]:
            if dominators[tail] >> head & 1:
                body, waiting = loops.setdefault(head, {head}), [tail]
                while waiting:
                    if (i := waiting.pop()) not in body:
                        body.add(i)
                        waiting += before[i]
    return [frozenset(body) for body in loops.values()]


def main() -> None:
    """Prints what was read, a kernel a line and its element loops below."""
    for kernel in compile_and_read(ROOT / "csrc/cuda/pair_loss.cu", sys.argv[1]):
        local = sum(op.startswith(("LDL", "STL")) for op in kernel.opcodes)
        print(
            f"{kernel.name}: {kernel.registers} registers, {kernel.stack_bytes} bytes of stack, "
            f"{kernel.spill_bytes} spilled, {local} local accesses, {len(kernel.opcodes)} instructions"
        )
        for loop in kernel.element_loops:
            memory = [op for op in loop.opcodes if re.match(r"(LD|ST|ATOM|RED)[A-Z]*\b", op)]
            counts = ", ".join(f"{memory.count(op)} {op}" for op in sorted(set(memory)))
            print(f"    loop of {len(loop.opcodes)}, {len(loop.early_uses)} early uses: {counts}")


if __name__ == "__main__":
    main()
