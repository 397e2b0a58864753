"""Compiles the Triton kernels for NVIDIA GPUs without one, and prints what the machine code does as JSON.

Run in a process of its own (``TRITON_INTERPRET=0``) by test_triton_kernels.py; by hand: ``python tests/aot.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sipo_kernels.backends.triton import passes as passes
from sipo_kernels.backends.triton import plan as triton_plan
from sipo_kernels.backends.triton.launch import FOLD
from sipo_kernels.layout import accumulate_dtype, stats_dtype
from sipo_kernels.options import LOSS_TYPES, METHODS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 100)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
TL = {torch.float32: tl.float32, torch.float64: tl.float64}
STRIDES = ("elements", "model_stride", "ref_stride", "target_stride", "error_mask_stride")
COUNTS = ("pairs", "parts", "tiles", "distance", "keep", "bins", "pair_level_stride", "upstream_stride")
# Name of each variant: kernel, and what it does beside its work.
VARIANTS = {
    "fused": (passes.pair_forward, True),
    "reduce": (passes.pair_forward, False),
    "gradient": (passes.pair_backward, False),
    "mend": (passes.pair_backward, True),
}
# Of policy, reference and target. "small": of fewer elements than SMALL_SAMPLE.
MIXES = {
    "bf16": "bf16-bf16-bf16",
    "fp32": "fp32-fp32-fp32",
    "fp64": "fp64-fp64-fp64",
    "mixed": "bf16-bf16-fp32",
    "mixed16": "fp16-fp16-fp32",
    "small": "bf16-bf16-fp32",
}
SHARED = {"SHARED_TARGET": True}
TOTALS = {"METRICS_TOO": True, "LEVELS": True, "EXPECTED_ON_DEVICE": True}
RELATIVES = {"LOSS_TYPE": LOSS_TYPES.index("dmpo"), "SMOOTHED": True, "SAFEGUARDED": True}
MASK, WEIGHTS = {"HAS_ERROR_MASK": "i1"}, {"HAS_ERROR_MASK": "fp32"}  # instead of True, the type of its elements
# What is compiled for each capability: name, variant, mix, constants other than those of a plain SIPO batch.
COMPILED: list[tuple[str, str, str, dict[str, Any]]] = [
    *((f"{variant}-{mix}", variant, mix, {}) for mix in ("bf16", "fp32", "mixed") for variant in VARIANTS),
    ("fused-small", "fused", "small", {}),
    # What a training step asks for: running sums, and an upstream gradient that is read on the device.
    ("fused-totals", "fused", "mixed16", SHARED | TOTALS),
    # What takes the most registers: float64 everywhere, and all that a call can ask for with sums in float64.
    ("fused-fp64", "fused", "fp64", {}),
    ("fused-relatives", "fused", "small", RELATIVES | TOTALS),
    *((f"{variant}-mixed-mask", variant, "mixed", SHARED | MASK) for variant in ("fused", "mend")),
    ("fused-bf16-mask", "fused", "bf16", MASK),
    ("fused-relatives-mask", "fused", "small", RELATIVES | TOTALS | MASK),
    ("fused-mixed-weights", "fused", "mixed", TOTALS | WEIGHTS),
]


def compile_for(variant: str, mix: str, capability: int, **changes: Any) -> Any:
    """One kernel as the launcher would specialise it for a SIPO batch of real latents (D a multiple of 16).

    Args:
        variant: one of ``VARIANTS``.
        mix: one of ``MIXES``.
        capability: 90 for sm_90.
        changes: constants other than SIPO's.
    """
    kernel, extra = VARIANTS[variant]
    model, ref, target = names = MIXES[mix].split("-")
    inputs = [torch.empty(0, dtype=TYPES[name]) for name in names]
    acc = accumulate_dtype(37 if mix == "small" else 1 << 20, inputs[2], *inputs[:2])
    grad_acc = TL[stats_dtype(inputs[0], inputs[2])]
    constants = {
        "METHOD": METHODS.index("sipo"),
        "LOSS_TYPE": LOSS_TYPES.index("sigmoid"),
        "SMOOTHED": False,
        "SAFEGUARDED": False,
        "MASKS": True,
        "POSTERIOR": True,
        "SKIP": False,
        "PER_PAIR": False,
        "HAS_REF": True,
        "HAS_SCALE": True,
        "HAS_WEIGHT": True,
        "SHARED_TARGET": False,
        "SHARED_ERROR_MASK": changes.get("SHARED_TARGET", False),
        "WITH_GRAD": extra,
        "EXPECTED_ON_DEVICE": False,
        "METRICS_TOO": False,
        "LEVELS": False,
        "MEND": extra,
        "REMEMBER": extra,
        "ACC": grad_acc if kernel is passes.pair_backward else TL[acc],
        "GRAD_ACC": grad_acc,
        "PARTS": triton_plan.MAX_PARTS,
        "BLOCK": triton_plan.block(acc, *inputs, error_mask=torch.empty(0) if "HAS_ERROR_MASK" in changes else None),
        "FOLD": FOLD[acc],
    } | changes
    constants["HAS_ERROR_MASK"] = "HAS_ERROR_MASK" in changes
    statistics = "fp64" if "fp64" in names else "fp32"
    pointers = {"model": model, "ref": ref, "target": target, "grad": model, "partial": str(TL[acc])}
    pointers |= {"error_mask": changes.get("HAS_ERROR_MASK", "i1")}
    pointers |= {"tickets": "i32", "records": "fp64", "mask": "i1", "expected": "fp64", "remembered": "fp64"}
    pointers |= {"metrics": "fp32", "levels": "fp32", "pair_levels": "i64"}
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in STRIDES + COUNTS:
            signature[name] = "i32"
        else:
            signature[name] = parameter.annotation_type or "*" + pointers.get(name, statistics)
    order = list(signature)
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in STRIDES]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(order.index(name),): value for name, value in constants.items() if name in signature},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": triton_plan.WARPS}
    if kernel is passes.pair_forward:
        options["maxnreg"] = triton_plan.REGISTERS
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read(binary: Any) -> dict[str, int]:
    """Counts of memory instructions from the disassembly, and the resources that the code object states."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", "-ndf", str(cubin))
    # STRONG is what other programs wrote: partial sums and numbers of pairs, not the inputs.
    loads = [name for name in re.findall(r"\bLDG\S*", sass) if "STRONG" not in name]
    stores = re.findall(r"\bSTG\S*", sass)
    ptx = binary.asm["ptx"]
    # Scalars of the pair come as .b32 and .b64; a vector of inputs narrower than 16 bytes would be one of these.
    vectors = re.findall(r"ld\.global\S*\.(?:v2\.b32|v4\.b16|v2\.b16|v2\.b64|b16)\b", ptx)
    return {
        "wide_loads": sum(".128" in name for name in loads),
        "wide_stores": sum(".128" in name for name in stores),
        "kept_loads": len(re.findall(r"ld\.global\S*evict_last\S*\.v4\.b32", ptx)),
        "streamed_stores": len(re.findall(r"st\.global\.cs\.v4\.b32", ptx)),
        "narrow_stores": sum(".128" not in name for name in stores),
        "input_loads_narrower": sum(".cg." not in name for name in vectors),
        "local_instructions": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        **{
            key: int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
            for key, name in (("registers", "REG"), ("stack_bytes", "STACK"), ("local_bytes", "LOCAL"))
        },
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    with ThreadPoolExecutor(1) as pool:  # one kernel is read while the next is compiled
        found = {
            f"{name}-{capability}": pool.submit(read, compile_for(variant, mix, capability, **changes))
            for capability in CAPABILITIES
            for name, variant, mix, changes in COMPILED
        }
    print(json.dumps({name: reading.result() for name, reading in found.items()}, indent=1))


if __name__ == "__main__":
    main()
