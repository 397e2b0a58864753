"""compute-sanitizer over a few small cases: out-of-bounds and uninitialised accesses, races, misused barriers.

The cases are run in a process under each tool, and compared with float64 on the CPU, so that few kernels but ours run
there. Findings in torch's own kernels are reported and do not fail.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from typing import Any

import torch

from benchmarks.gpu_check.child_processes import ROOT, CheckOptions, Row, command, environment, no_more
from benchmarks.gpu_check.context import BF16, F16, F32, F64, Context, check
from sipo_kernels import METRICS, PairLossOutput, testing

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
USUAL = "/usr/local/cuda/bin/compute-sanitizer"
FINDINGS_EXIT_CODE = 99
# Every allocation on its own, or an access past a tensor's end would land in another one of the same block.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@check("sanitizer's cases", "device", "scaled gradient", "shifted logits", "mend skipped", "totals twice")
def small_cases(ctx: Context) -> None:
    """Odd and even sizes, one block and many, every path of the kernels: shared, weighted, masked, mended, sums."""
    kinds: list[tuple[tuple[int, ...], tuple[torch.dtype, ...], dict[str, Any], dict[str, Any]]] = [
        ((2, 1), (F32,), {}, {}),
        ((4, 7), (BF16,), {"weighted": True}, {"reduction": "sum"}),
        ((6, 3, 37), (BF16, BF16, F32), {"shared_target": True}, {"reduction": "none"}),
        ((4, 1025), (F16,), {}, {"method": "dpo_cm", "ratio": "reference"}),
        ((2, 4, 32, 64), (F32, BF16, F64), {"weighted": True}, {"method": "sdpo", "nonfinite": "skip"}),
        ((2, 4, 64, 160), (BF16,), {"shared_target": True}, {"method": "diffusion_dpo"}),
        ((8, 33), (F64,), {}, {"mask_threshold": 0.9}),
        ((4, 3, 36), (BF16, BF16, F32), {"mask": "shared bool"}, {"safeguard": 0.4}),
        ((4, 37), (BF16,), {"mask": "weights"}, {}),
    ]
    if ctx.on_gpu:  # pairs in groups, and more elements than a multiprocessor keeps
        kinds += [((64, 8192), (BF16,), {}, {}), ((2, 524_288), (F32,), {}, {}), ((6, 65_543), (BF16,), {}, {})]
    for shape, dtypes, making, options in kinds:
        if not ctx.on_gpu and shape[-1] == 160:
            shape = (2, 4, 8, 160)  # Triton's interpreter is slow
        made = Context(ctx.backend, "cpu").batch(shape, *dtypes, **making)
        settings = {"method": "sipo", "beta": 3.0, "mask_threshold": 0.0, **options}
        model = made.model_pred.detach().to(ctx.device).requires_grad_()
        ref, target, scale = (t.to(ctx.device) for t in (made.ref_pred, made.target, made.ratio_scale))
        beside = (None if t is None else t.to(ctx.device) for t in (made.error_weight, made.error_mask))
        batch = testing.Batch(model, ref, target, scale, *beside)
        on_cpu = torch.full((shape[0] // 2,) if settings.get("reduction") == "none" else (), 0.5)
        upstream = on_cpu.to(ctx.device, F64 if F64 in dtypes else F32)
        exact = testing.reference_grad(made, grad_output=on_cpu.double(), **settings)
        truth = testing.run_reference(made, **settings)
        sums = ctx.totals(torch.arange(shape[0] // 2) * 300 % 1000)
        assert sums.metrics is not None and sums.levels is not None
        for expected in (1.0, 0.5):  # made again in the backward pass, and not
            out, grad = testing.run(
                batch, ctx.backend, upstream=upstream, expected_upstream=expected, totals=sums, **settings
            )
            loss, samples, logits, mask = (x.detach().cpu() for x in (out.loss, out.samples, out.logits, out.mask))
            ctx.compare(
                made,
                PairLossOutput(loss, samples, logits, mask),
                grad.cpu(),
                exact,
                truth,
                f"{list(shape)}, expected {expected}",
            )
        counts = sums.metrics[1].tolist(), sums.levels[0].sum().item()
        pairs = float(shape[0])  # of two calls
        ctx.require(counts == ([pairs] * (len(METRICS) - 1) + [2.0], pairs), f"{list(shape)}: counts {counts}")


def find_tool() -> str | None:
    """Finds compute-sanitizer, on the search path or in the usual place."""
    return shutil.which("compute-sanitizer") or shutil.which(USUAL)


def run_tool(tool: str, backends: list[str], options: CheckOptions, limit: float) -> Row:
    """Runs the small cases of all ``backends`` under one tool."""
    name, where = f"compute-sanitizer {tool}", ", ".join(backends)
    if options.device == "cpu":
        return Row(name, where, "not run", "needs a GPU")
    path = find_tool()
    if path is None:
        return Row(name, where, "not run", f"compute-sanitizer is neither on the search path nor {USUAL}")
    if why := no_more(options):
        return Row(name, where, "fail", why)
    flags = ["--tool", tool, "--target-processes", "application-only", "--error-exitcode", str(FINDINGS_EXIT_CODE)]
    if tool == "memcheck":  # torch asks the driver for what it may not have, which is no error of anybody's
        flags += ["--report-api-errors", "no"]
    ours = command("--sanitizer-cases", f"--device={options.device}", *(f"--backend={b}" for b in backends))
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [path, *flags, *ours], cwd=ROOT, env={**environment(options), **UNCACHED}, timeout=limit,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Row(name, where, "fail", f"took longer than {limit:.0f} seconds", seconds=limit)
    row = judge(name, where, done.stdout, done.returncode)
    row.seconds = time.perf_counter() - begin
    return row


def judge(name: str, where: str, output: str, code: int) -> Row:
    """Judges a tool's output: only a whole run with a summary and no finding of ours passes."""
    said = [line for line in output.splitlines() if line.startswith("=========")]
    summaries = re.findall(r"^========= (?:ERROR|RACECHECK) SUMMARY: (\d+)", output, re.MULTILINE)
    compared = sum(int(n) for n in re.findall(r"^sanitizer cases: (\d+) comparisons", output, re.MULTILINE))
    tail = output.splitlines()[-30:]
    refusal = next((line for line in said if "device not supported" in line.lower()), None)
    if refusal is not None and not compared:
        return Row(name, where, "not run", f"the tool refuses this device: {refusal.strip('= ')}", detail=tail)
    if not summaries:
        return Row(name, where, "fail", f"the tool ended without a summary, with code {code}", detail=tail)
    ours, others = findings(said)
    if ours:
        return Row(name, where, "fail", ours[0][0], compared, float(len(ours)), detail=ours[0][:20])
    if any(map(int, summaries)) and not others:
        return Row(name, where, "fail", f"{max(map(int, summaries))} findings, and none could be read", detail=tail)
    if code not in (0, FINDINGS_EXIT_CODE) or not compared:
        return Row(name, where, "fail", f"the cases themselves failed, with code {code}", compared, detail=tail)
    remark = f"{len(others)} findings in torch's own kernels, none in ours" if others else ""
    return Row(name, where, "pass", remark, compared, detail=others[0][:20] if others else [])


def findings(said: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns findings in our kernels and in others', each with the lines that belong to it.

    A finding begins at the margin ("========= Invalid __global__ read ...") and goes on indented. Which kernel it is
    about says its first line (races) or the line "at KERNEL+0x... in FILE"; the host's backtrace names other things.
    """
    blocks: list[list[str]] = []
    for line in said:
        text = line.removeprefix("=========")
        if re.match(r" [A-Z]", text) and not re.match(r" (COMPUTE-SANITIZER|[A-Z]+ SUMMARY|Target application)", text):
            blocks.append([text.strip()])
        elif blocks and text.startswith("  "):
            blocks[-1].append(text.strip())
    ours: list[list[str]] = []
    others: list[list[str]] = []
    for block in blocks:
        kernel = " ".join([block[0], *(line for line in block[1:] if line.startswith("at "))])
        # A finding that names no kernel may be ours.
        elsewhere = "at::" in kernel or "cub::" in kernel or "thrust::" in kernel or "cutlass" in kernel
        (ours if re.search(r"\bpair_|sipo", kernel) or not elsewhere else others).append(block)
    return ours, others


def run_small_cases(backends: list[str], device: str) -> int:
    """Runs the small cases under a tool, prints how much was compared, and returns the process's exit code."""
    for backend in backends:
        context = Context(backend, device)
        small_cases(context)
        if device != "cpu":
            torch.cuda.synchronize()
        print(f"sanitizer cases: {context.cases} comparisons on {backend}", flush=True)
    return 0
