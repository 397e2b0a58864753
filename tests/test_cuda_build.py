"""The CUDA kernels as a GPU would get them: compiled by nvcc without a GPU, disassembled, and read."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import disassembly
import pytest
from disassembly import Kernel, Loop

ARCHS = ("80", "90a", "100")
HALVES = [f"Vector<{half}, {target}>" for half in ("bf16", "fp16") for target in (half, "float")]
READERS = [*HALVES, "Vector<float, float>", "Vector<double, double>", "Mixed", "Any"]
KERNELS = [f"grad_kernel<{reader}>" for reader in READERS]
# Half precision is summed in float, and in double where few elements are.
KERNELS += [f"pair_kernel<{reader}, double>" for reader in READERS] + [f"pair_kernel<{half}, float>" for half in HALVES]
# With an error mask.
MASKED = [f"WithErrorMask<{reader}>" for reader in ("Mixed", "Any")]
KERNELS += [name for reader in MASKED for name in (f"grad_kernel<{reader}>", f"pair_kernel<{reader}, double>")]
# A multiprocessor's 65,536 registers for two blocks of 320 threads, dealt out by eight.
REGISTERS = 96

needs_tools = pytest.mark.skipif(
    disassembly.missing_tools() is not None, reason=f"reading CUDA kernels: {disassembly.missing_tools()}"
)


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict[str, Kernel]]:
    """Every kernel for every architecture that the build is for: ``{"80": {"grad_kernel<Any>": ...}}``."""
    archs = [arch for arch in ARCHS if arch in disassembly.cuda_part().details["archs"]]
    source = disassembly.ROOT / "csrc/cuda/pair_loss.cu"
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = pool.map(lambda arch: disassembly.compile_and_read(source, arch), archs)
        return {arch: {kernel.name: kernel for kernel in kernels} for arch, kernels in zip(archs, found, strict=True)}


@pytest.fixture(params=ARCHS)
def kernels(request: pytest.FixtureRequest, compiled: dict[str, dict[str, Kernel]]) -> dict[str, Kernel]:
    """Every kernel for one architecture."""
    if request.param not in compiled:
        pytest.skip(f"the build is not for sm_{request.param}")
    return compiled[request.param]


def count(loop: list[str], start: str, end: str = "") -> int:
    """How many opcodes begin so and have this modifier."""
    return sum(opcode.startswith(start) and end in opcode for opcode in loop)


@needs_tools
def test_there_are_these_kernels(kernels: dict[str, Kernel]) -> None:
    assert sorted(kernels) == sorted(KERNELS)


@needs_tools
@pytest.mark.parametrize("name", KERNELS)
def test_everything_stays_in_registers(kernels: dict[str, Kernel], name: str) -> None:
    kernel = kernels[name]
    assert kernel.registers <= REGISTERS
    if name == "pair_kernel<WithErrorMask<Mixed>, double>":  # a few numbers that are made once; a tile stores none
        assert kernel.stack_bytes <= 24 and kernel.spill_bytes <= 80
        assert not any(count(loop.opcodes, "STL") for loop in kernel.element_loops)
        return
    assert (kernel.stack_bytes, kernel.spill_bytes) == (0, 0)
    assert [op for op in kernel.opcodes if op.startswith(("LDL", "STL"))] == []


def element_loop(kernel: Kernel, writes: bool) -> Loop:
    """The loop that writes gradients, or the one that reduces: there is one of each."""
    (loop,) = [loop for loop in kernel.element_loops if bool(count(loop.opcodes, "STG.E.NA")) == writes]
    return loop


def inputs(loop: Loop, width: str) -> int:
    """Loads of so many bits of what nobody writes (ld.global.nc)."""
    return count(loop.opcodes, "LDG", f".{width}.CONSTANT")


@needs_tools
@pytest.mark.parametrize("name", [name for name in KERNELS if "Any" not in name])
def test_all_loads_are_under_way_before_the_first_is_waited_for(kernels: dict[str, Kernel], name: str) -> None:
    for loop in kernels[name].element_loops:
        assert loop.early_uses == []


@needs_tools
@pytest.mark.parametrize("name", [name for name in KERNELS if "Vector" in name])
def test_elements_move_16_bytes_at_a_time(kernels: dict[str, Kernel], name: str) -> None:
    """Of the wider type; half precision beside float32 moves 8 bytes at a time, in two steps."""
    kernel = kernels[name]
    mixed = any(f"Vector<{half}, float>" in name for half in ("bf16", "fp16"))
    assert [op for op in kernel.opcodes if op.startswith(("LD.", "ST."))] == []  # each access knows its memory
    gradient = element_loop(kernel, writes=True)
    # Policy and target of chosen and rejected sample; one tile at a time.
    assert (inputs(gradient, "64"), inputs(gradient, "128")) == ((4, 4) if mixed else (0, 4))
    written = (count(gradient.opcodes, "STG.E.NA.64"), count(gradient.opcodes, "STG.E.NA.128"))
    assert written == ((4, 0) if mixed else (0, 2))
    others = [op for op in kernel.opcodes if "CONSTANT" in op and ".64" not in op and ".128" not in op]
    assert others == []
    if name.startswith("grad_kernel"):
        return
    reduction = element_loop(kernel, writes=False)
    assert (inputs(reduction, "64"), inputs(reduction, "128")) == ((8, 4) if mixed else (0, 6))  # reference too
    # What shared memory holds of chosen and rejected sample: d, of half precision in float.
    held = 4 if "16" in name else 2
    assert count(reduction.opcodes, "STS", ".128") == held
    assert 2 * count(gradient.opcodes, "LDS", ".128") + count(gradient.opcodes, "LDS", ".64") == 2 * held


@needs_tools
@pytest.mark.parametrize("name", [name for name in KERNELS if "Mixed" in name])
def test_elements_of_mixed_types_move_four_at_a_time(kernels: dict[str, Kernel], name: str) -> None:
    """16 bytes of float or double, and 8 of the 16-bit types: never an element by itself. 4 or 16 bytes of a mask."""
    loops = kernels[name].element_loops
    masks = 2 if "WithErrorMask" in name else 0
    assert len(loops) == 1 + name.startswith("pair_kernel")
    for loop in loops:
        tensors = 4 if count(loop.opcodes, "STG.E.NA") else 6
        # For each the 8 bytes of half precision, or the first or both 16 of the others.
        assert (inputs(loop, "64"), inputs(loop, "128")) == (tensors, 2 * tensors + masks)
        memory = [op for op in loop.opcodes if op.startswith(("LDG", "STG"))]
        narrow = [op for op in memory if ".128" not in op and ".64" not in op]
        assert narrow == ["LDG.E.NA.CONSTANT"] * masks


# --- the reading itself ---------------------------------------------------------------------------------------


@needs_tools
def test_reading_tells_good_code_from_bad(tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text("""
namespace sipo { namespace {
struct Same {}; struct Narrow {};
template <class T> __global__ void vectors(const float4* x, float4* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}
template <class T> __global__ void numbers(const float* x, float* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}
__global__ void table(const int* x, float* y, int n) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[i] = y[i];
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = values[x[i] & 31];
}
} }
void launch(const float* x, float* y) {
  using namespace sipo;
  vectors<Same><<<1, 32>>>((const float4*)x, (float4*)y, 9);
  numbers<Narrow><<<1, 32>>>(x, y, 9);
  table<<<1, 32>>>((const int*)x, y, 9);
}
""")
    arch = disassembly.cuda_part().details["archs"][0]
    found = {kernel.name: kernel for kernel in disassembly.compile_and_read(source, arch)}
    assert set(found) == {"vectors<Same>", "numbers<Narrow>", "table"}
    vectors, numbers, table = found["vectors<Same>"], found["numbers<Narrow>"], found["table"]
    assert vectors.element_loops
    for loop in vectors.element_loops:
        assert count(loop.opcodes, "LDG", ".128") == count(loop.opcodes, "STG", ".128") >= 1
    assert numbers.element_loops == table.element_loops == []
    assert count(numbers.opcodes, "LDG") >= 1 and not count(numbers.opcodes, "LDG", ".128")
    assert table.stack_bytes >= 128 and count(table.opcodes, "STL") and count(table.opcodes, "LDL")
    assert vectors.stack_bytes == numbers.stack_bytes == 0 < vectors.registers


def test_reading_finds_the_innermost_loops() -> None:
    """An inner loop with a switch in it, an outer one closed by a call, and code moved out of the way."""
    listing = """
.text.kernel:
        /*0000*/              MOV R1, c[0x0][0x28] ;
.L_x_outer:
        /*0010*/              LDG.E.64 R2, [R2.64] ;
.L_x_inner:
        /*0020*/              BRX R10 -0x20 (*"BRANCH_TARGETS .L_x_one,.L_x_two"*);
.L_x_one:
        /*0030*/              LDG.E.NA.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0040*/              BRA `(.L_x_join) ;
.L_x_two:
        /*0050*/              BRA.DIV ~URZ, `(.L_x_aside) ;
.L_x_join:
        /*0060*/         @!P0 BRA `(.L_x_inner) ;
        /*0070*/              STG.E.64 [R2.64], R4 ;
        /*0080*/          @P1 CALL.REL.NOINC `(.L_x_done) ;
        /*0090*/              BRA `(.L_x_outer) ;
.L_x_done:
        /*00a0*/              STG.E.128 [R2.64], R4 ;
        /*00b0*/              EXIT ;
.L_x_aside:
        /*00c0*/              SHFL.DOWN P0, R4, R5, R6, R7 ;
        /*00d0*/              BRA `(.L_x_join) ;
.L_x_end:
        /*00e0*/              BRA `(.L_x_end);
"""
    ((name, (opcodes, loops)),) = disassembly.read_sass(listing)
    assert name == "kernel" and len(opcodes) == 15
    assert [sorted(loop.opcodes) for loop in loops] == [
        ["BRA", "BRA", "BRA", "BRA.DIV", "BRX", "LDG.E.NA.128.CONSTANT", "SHFL.DOWN"]
    ]


def test_reading_finds_what_waits_too_early() -> None:
    """A use of a loaded register before the last load: not its overwriting, and nothing after the last load."""

    def uses(*code: str) -> list[str]:
        lines = (f"        /*{16 * i:04x}*/                   {it} ;" for i, it in enumerate([*code, "BRA `(.L_x_0)"]))
        listing = "\n".join([".text.kernel:", ".L_x_0:", *lines])
        ((_, (_, (loop,))),) = disassembly.read_sass(listing)
        return loop.early_uses

    first, last = "LDG.E.128.CONSTANT R4, [R2.64]", "@P0 LDG.E.64.CONSTANT R8, [R2.64+0x10]"
    assert uses(first, last, "FADD R20, R4, R8") == []
    assert uses(first, "CS2R R8, SRZ", last, "STS.128 [R30], R4") == []
    assert uses(first, "IMAD.MOV.U32 R20, RZ, RZ, R7", last) == ["IMAD.MOV.U32 R20, RZ, RZ, R7"]
    assert uses(first, "@P1 STS.128 [R30], R4", last) == ["STS.128 [R30], R4"]
    assert uses(first, "FADD R9, R8, R30", "LDG.E.64.CONSTANT R20, [R6.64]", last) == ["LDG.E.64.CONSTANT R20, [R6.64]"]
    assert uses(first, "MOV R5, R30", "FADD R20, R5, R30", last) == []  # overwritten in between


def test_reading_resources_and_names() -> None:
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 704 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers, 704 bytes cmem[0]
"""
    assert dict(disassembly.read_resources(said)) == {"_Z1aPf": (40, 8, 16), "_Z1bPf": (16, 0, 0)}
    reader = "sipo::(anonymous namespace)::Vector<float, float>"
    long = f"void sipo::(anonymous namespace)::pair_kernel<{reader}, double>(sipo::(anonymous namespace)::Params)"
    assert disassembly.short(long) == "pair_kernel<Vector<float, float>, double>"
    assert disassembly.short("kernel(float*, int)") == "kernel"
