"""Full-size networks with random weights take two LoRA steps on this machine: ``python -m benchmarks.full_size``.

Each network is built from its published configuration, in bfloat16, and trained by ``sipo.training`` on one random pair
with the adapters off as the reference. Nothing is downloaded. Where the weights do not fit into memory, the network
keeps its full width and loses layers, and the result says so. The numbers show that shapes, names and memory work out
at that size; they are no measure of speed, as the images are tiny.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import machine, timing

RANK = 4
STEPS = 2
SHARE = 0.75  # of the memory that is free, for the frozen weights


class FullSizeCase(NamedTuple):
    """A published network.

    Attributes:
        name: of the checkpoint.
        family: its family.
        config: values of its configuration that are not the class's defaults.
        sample: shape of one sample's latents, small.
        text: shapes of the tensors of a condition by name; a mask is all true.
        fewer: values that leave layers out, for a machine with too little memory.
    """

    name: str
    family: str
    config: dict[str, Any]
    sample: tuple[int, ...]
    text: Shapes
    fewer: dict[str, Any]


Shapes = dict[str, tuple[int, ...]]


def _text(width: int, *, mask: bool = False, more: Shapes | None = None) -> Shapes:
    """Returns the shapes of a condition with 32 tokens of text."""
    masks: Shapes = {"prompt_embeds_mask": (32,)} if mask else {}
    return {"prompt_embeds": (32, width), **masks, **(more or {})}


_POOLED: Shapes = {"pooled_prompt_embeds": (768,)}
_IMAGE: Shapes = {"condition_latents": (16, 8, 8)}
_KLEIN = {"guidance_embeds": False, "in_channels": 128}
CASES = [
    FullSizeCase(
        "Lumina-Image 2.0", "lumina2", {"cap_feat_dim": 2304}, (16, 8, 8), _text(2304, mask=True), {},
    ),
    FullSizeCase("SANA 1.6B", "sana", {}, (32, 4, 4), _text(2304, mask=True), {}),
    FullSizeCase(
        "FLUX.2 klein 4B", "flux2-klein",
        {**_KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        (128, 4, 4), _text(7680), {},
    ),
    FullSizeCase(
        "FLUX.2 klein 9B", "flux2-klein",
        {**_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        (128, 4, 4), _text(12288), {"num_layers": 2, "num_single_layers": 4},
    ),
    FullSizeCase(
        "Z-Image", "z-image", {}, (16, 8, 8), _text(2560, mask=True), {"n_layers": 6},
    ),
    FullSizeCase(
        "Chroma1", "chroma", {}, (16, 8, 8), _text(4096, more={"prompt_attention_mask": (32,)}),
        {"num_layers": 4, "num_single_layers": 8},
    ),
    FullSizeCase(
        "FLUX.1 dev", "flux", {"guidance_embeds": True}, (16, 8, 8), _text(4096, more=_POOLED),
        {"num_layers": 4, "num_single_layers": 8},
    ),
    FullSizeCase(
        "FLUX.1 Kontext dev", "flux-kontext", {"guidance_embeds": True}, (16, 8, 8),
        _text(4096, more=_POOLED | _IMAGE), {"num_layers": 4, "num_single_layers": 8},
    ),
    FullSizeCase(
        "FLUX.2 dev", "flux2", {}, (128, 4, 4), _text(15360), {"num_layers": 1, "num_single_layers": 4},
    ),
    FullSizeCase(
        "Qwen-Image", "qwen-image", {}, (16, 8, 8), _text(3584, mask=True), {"num_layers": 12},
    ),
    FullSizeCase(
        "Qwen-Image-2.1", "qwen-image-2.1", {}, (64, 4, 4), _text(4096, mask=True), {"num_layers": 12},
    ),
    FullSizeCase(
        "Qwen-Image-Edit", "qwen-image-edit", {}, (16, 8, 8),
        _text(3584, mask=True, more=_IMAGE), {"num_layers": 12},
    ),
]  # fmt: skip


def measure(case: FullSizeCase) -> dict[str, Any]:
    """Builds one network and trains it for two steps, in this process.

    Returns:
        JSON values: the sizes, the times, the peak of the process's memory and the metrics of both steps.
    """
    import diffusers
    from accelerate import init_empty_weights

    from sipo import SIPOLoss
    from sipo.families import get_family
    from sipo.families.tuning import adapter_off, prepare_lora
    from sipo.training import AdapterOff, TrainingConfig, make_accelerator, train
    from sipo.training.log_reader import read_metrics

    family = get_family(case.family)
    network_class = getattr(diffusers, family.network_class)

    def empty(config: dict[str, Any]) -> nn.Module:
        with init_empty_weights():  # the tables of rotary embeddings are kept
            network: nn.Module = network_class.from_config(dict(config))
        return network

    network = empty(case.config)
    whole = sum(parameter.numel() for parameter in network.parameters())
    fits = 2 * whole <= SHARE * _free_memory()
    if not fits:
        network = empty({**case.config, **case.fewer})
    start = time.perf_counter()
    _fill(network)
    network.requires_grad_(False).eval()
    built = time.perf_counter() - start
    prepare_lora(network, rank=RANK, target_modules=family.lora_targets)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    condition = {
        name: torch.ones(shape, dtype=torch.bool) if name.endswith("_mask") else random(shape).bfloat16()
        for name, shape in case.text.items()
    }
    pair = {"chosen": random(case.sample), "rejected": random(case.sample), "condition": condition}
    # A method without masks: at random weights, the errors may be so large that SIPO masks every noise level.
    loss_fn = SIPOLoss(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), method="diffusion_dpo")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            max_train_steps=STEPS, train_batch_size=1, output_dir=folder, learning_rate=1e-4, mixed_precision="bf16",
            logging_steps=1, report_to="none", alarms="off", progress=False,
        )  # fmt: skip
        start = time.perf_counter()
        options: dict[str, Any] = {"accelerator": make_accelerator(config)}
        train(network, AdapterOff(adapter_off), loss_fn, [pair], family.predict, config, **options)
        steps = time.perf_counter() - start
        lines = read_metrics(Path(folder) / "metrics.jsonl", "training")
    metrics = [{name: line[name] for name in ("loss", "model_mse", "ref_mse", "grad_norm")} for line in lines]
    assert len(metrics) == STEPS and all(math.isfinite(value) for line in metrics for value in line.values())
    moved = sum(bool(p.detach().any()) for name, p in network.named_parameters() if "lora_B" in name)
    assert moved, f"no adapter of {case.name} moved"
    return {
        "name": case.name,
        "family": case.family,
        "parameters": whole,
        "parameters_here": sum(parameter.numel() for parameter in network.parameters()) - trained,
        "left_out": {} if fits else case.fewer,
        "trained": trained,
        "adapters_that_moved": moved,
        "seconds_to_build": built,
        "seconds_for_steps": steps,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "metrics": metrics,
    }


def _free_memory() -> int:
    """Returns how many bytes of memory are free, as Linux counts them."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _fill(network: nn.Module) -> None:
    """Gives parameters on the meta device memory, in bfloat16: random values of variance 1 / inputs, 1 in norms."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, dtype=torch.bfloat16, device="cpu")
            module.register_parameter(name, nn.Parameter(empty))
    buffer = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, tensor in network.named_parameters():
        if tensor.ndim < 2:
            tensor.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        flat, values = tensor.data.view(-1), (buffer / tensor[0].numel() ** 0.5).bfloat16()
        for begin in range(0, len(flat), len(buffer)):
            part = flat[begin : begin + len(buffer)]
            part.copy_(values[: len(part)])


def main() -> None:
    """Measures the cases that the command line names, each in a process of its own, and writes a results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", default="", help="checkpoints whose name matches")
    default = timing.RESULTS / "full-size-cpu.json"
    parser.add_argument("--output", type=Path, help=f"results file (default {default.relative_to(machine.ROOT)})")
    options = parser.parse_args()
    cases = [case for case in CASES if re.search(options.only, case.name)]
    if not cases:
        parser.error(f"--only {options.only!r}: expected one of {', '.join(case.name for case in CASES)} to match")
    output = options.output or (machine.ROOT / "out" / "bench" / default.name if options.only else default)
    results: dict[str, Any] = {"kind": "full-size", "machine": machine.describe("cpu"), "cases": []}
    spawn = multiprocessing.get_context("spawn")
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # whose memory is this case's alone
            entry = pool.submit(measure, case).result()
        print(
            f"{case.name}: {entry['parameters'] / 1e9:.2f} billion weights, {entry['parameters_here'] / 1e9:.2f} here, "
            f"{entry['trained'] / 1e6:.1f} million trained; {entry['seconds_for_steps']:.0f} s for {STEPS} steps, "
            f"{entry['peak_rss_gb']:.1f} GB at most; losses {[line['loss'] for line in entry['metrics']]}",
            flush=True,
        )
        results["cases"].append(entry)
        timing.write(results, output)


if __name__ == "__main__":
    main()
