"""``sipo demo``: aligns a small model on real handwritten digits."""

from __future__ import annotations

import argparse
from typing import Any

from sipo.cli.arguments import path
from sipo.cli.errors import CommandError, in_one_line, missing_packages

# Import name and distribution name of what the demo needs beyond the core.
_DEMO_PACKAGES = {
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    from sipo.demo.main import DemoConfig
    from sipo_kernels.options import METHODS

    parser = commands.add_parser(
        "demo",
        help="align a small model on real handwritten digits, in under two minutes",
        description="Aligns a small diffusion model of handwritten digits to prefer ink, samples before and after, "
        "and writes the aligned model, metrics and a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=path, default=DemoConfig.output, help="folder to write")
    parser.add_argument("--method", choices=METHODS, default=DemoConfig.method, help="method of the loss")
    parser.add_argument(
        "--beta",
        type=float,
        default=DemoConfig.beta,
        help="strength of the loss; None takes the method's default for images",
    )
    parser.add_argument("--steps", type=int, default=DemoConfig.steps, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=DemoConfig.batch_size, help="pairs per step")
    parser.add_argument("--learning-rate", type=float, default=DemoConfig.learning_rate, help="learning rate of AdamW")
    parser.add_argument("--samples", type=int, default=DemoConfig.samples, help="digits drawn before and after")
    parser.add_argument("--seed", type=int, default=DemoConfig.seed, help="seed of the whole demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DemoConfig.device, help="device to run on")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    if missing := missing_packages(_DEMO_PACKAGES):
        raise CommandError(f"the demo needs {missing}: pip install 'sipo[demo]'")
    import torch

    from sipo.demo.main import DemoConfig, describe, run_demo
    from sipo_kernels import backends

    try:
        config = DemoConfig(**{name: value for name, value in vars(options).items() if name != "run"})
        # SIPO_BACKEND may name a backend that cannot run here: say so before the work starts.
        backends.choose("auto", torch.device(config.device))
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    with in_one_line():
        summary = run_demo(config)
    print(describe(summary, config.output))
    return 0
