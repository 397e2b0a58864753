"""The command line: ``sipo demo`` and ``sipo doctor``.

Everything heavy is imported by the command that uses it, so that ``sipo doctor`` also works where half of the
packages are missing: that is when it is wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn, TextIO

import sipo
from sipo.cli import analysis_commands as cli_analysis
from sipo.cli.data_commands import add_commands
from sipo.cli.errors import (
    INTERRUPTED,
    READER_GONE,
    CommandError,
    gone_readers,
    in_one_line,
    missing_packages,
    path,
    print_nowhere,
    tell,
)

# Import name and distribution name of what `sipo demo` needs beyond the core.
_DEMO_PACKAGES = {
    "accelerate": "accelerate",
    "diffusers": "diffusers",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}
# What `sipo doctor` lists, and what installs it where it is missing.
_LISTED_PACKAGES = {
    "torch": "pip install torch",
    "numpy": "pip install numpy",
    "triton": "pip install 'sipo[triton]'",
    "diffusers": "pip install 'sipo[train]'",
    "accelerate": "pip install 'sipo[train]'",
    "safetensors": "pip install 'sipo[train]'",
    "tqdm": "pip install 'sipo[train]'",
    "transformers": "pip install 'sipo[train]'",
    "peft": "pip install 'sipo[train]'",
    "datasets": "pip install 'sipo[train]'",
    "av": "pip install 'sipo[train]'",
    "pydantic": "pip install 'sipo[train]'",
    "scikit-learn": "pip install 'sipo[demo]'",
    "matplotlib": "pip install 'sipo[demo]'",
    "tensorboard": "pip install tensorboard",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; ``--help`` has the rest."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_fail(message))


def _fail(message: str) -> int:
    """Prints a user error as one line and returns the exit status for it."""
    tell(f"sipo: error: {' '.join(message.split())}")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``sipo`` and ``python -m sipo``.

    Args:
        argv: arguments without the program's name; the process's own if left out.

    Returns:
        Exit status: 0, 2 for a user error, 130 after Ctrl-C, or 141 where nobody reads what is printed (``| head``).
        Parsing errors and ``--help`` raise ``SystemExit`` instead.
    """
    status = 0
    try:
        try:
            status = _run(argv)
        except KeyboardInterrupt:
            status = INTERRUPTED
            tell("sipo: interrupted")
        finally:  # here, as the interpreter's own errors at its end are not ours
            tell()
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()
    except OSError as error:  # EIO: of a terminal that was closed
        if error.errno not in (errno.EPIPE, errno.EIO) or not (gone := gone_readers()):
            raise
        print_nowhere(gone)
        return status or READER_GONE
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes no positional arguments after an option where some came before it
        if not hasattr(options, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        with _plain_warnings():
            status: int = options.run(options)
    except CommandError as error:
        return _fail(str(error))
    return status


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings are one line on standard error, without file and source line; others stay as Python has them."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.split(".")[0] == "sipo":
            from sipo.progress import say

            say(f"sipo: warning: {' '.join(str(message).split())}")
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sipo", description=(sipo.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"sipo {sipo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_commands(commands)
    cli_analysis.add_commands(commands)
    _add_demo(commands)
    doctor = commands.add_parser("doctor", help="what is installed, and which backends can run")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    from sipo.demo.main import DemoConfig
    from sipo_kernels.options import METHODS

    demo = commands.add_parser(
        "demo",
        help="align a small model on real handwritten digits, in under two minutes",
        description="Aligns a small diffusion model of handwritten digits to prefer ink, samples before and after, "
        "and writes the aligned model, metrics and a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = DemoConfig
    demo.add_argument("--output", type=path, default=default.output, help="folder to write")
    demo.add_argument("--method", choices=METHODS, default=default.method, help="preference loss")
    demo.add_argument("--beta", type=float, default=default.beta, help="strength; None is the method's own for images")
    demo.add_argument("--steps", type=int, default=default.steps, help="optimiser steps")
    demo.add_argument("--batch-size", type=int, default=default.batch_size, help="pairs per step")
    demo.add_argument("--learning-rate", type=float, default=default.learning_rate, help="of AdamW")
    demo.add_argument("--samples", type=int, default=default.samples, help="digits drawn before and after")
    demo.add_argument("--seed", type=int, default=default.seed, help="the same seed gives the same numbers")
    demo.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help="where to run")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    if missing := missing_packages(_DEMO_PACKAGES):
        return _fail(f"the demo needs {missing}: pip install 'sipo[demo]'")
    import torch

    from sipo.demo.main import DemoConfig, describe, run_demo
    from sipo_kernels import backends

    try:
        config = DemoConfig(**{name: value for name, value in vars(options).items() if name != "run"})
        # SIPO_BACKEND may name one that cannot run here: better said before the work than in the midst of it.
        backends.choose("auto", torch.device(config.device))
    except (ValueError, RuntimeError) as error:
        return _fail(str(error))
    with in_one_line():
        summary = run_demo(config)
    print(describe(summary, config.output))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    print(f"sipo {sipo.__version__}")
    _line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, remedy in _LISTED_PACKAGES.items():
        try:
            _line(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            _line(name, f"not installed: {remedy}")
    print("devices")
    for name, text in _devices():
        _line(name, text)
    print("native library")
    from sipo_kernels import backends, build_info

    for part, targets, prefix in (("cpu", "isas", ""), ("cuda", "archs", "sm_")):
        found = build_info.part(part)
        if found["built"]:
            _line(f"{part} part", f"for {', '.join(prefix + name for name in found[targets])}, by {found['compiler']}")
        else:
            _line(f"{part} part", f"left out: {found['reason']}; {found['remedy']}")
    print("backends")

    for device, status in backends.report():
        name = f"{device} {status.name}"
        if not status.available:
            _line(name, f"cannot run: {status.reason}; {status.remedy}")
            continue
        problem = _try_backend(status.name, device)
        _line(name, f"runs ({status.reason})" if problem is None else f"cannot run: {problem}")
    return 0


def _line(name: str, text: str) -> None:
    print(f"  {name:<14}{text}")


def _devices() -> list[tuple[str, str]]:
    import torch

    devices = [("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices.append((f"cuda:{index}", f"{properties.name}, compute capability {capability}, {memory}"))
    if len(devices) == 1:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        devices.append(("cuda", f"no device ({built})"))
    return devices


def _try_backend(name: str, device: str) -> str | None:
    """Runs a tiny loss and its gradient on a backend; what went wrong, or ``None``.

    An installed backend may still fail when it is used: Triton without a C compiler, a driver too old for torch.
    """
    import torch

    from sipo_kernels import pair_loss

    try:
        model_pred = torch.zeros(4, 8, dtype=torch.float32, device=device, requires_grad=True)
        reference, target = torch.zeros_like(model_pred), torch.ones_like(model_pred)
        pair_loss(model_pred, reference, target, method="diffusion_dpo", beta=1.0, backend=name).loss.backward()
        gradient = model_pred.grad
        # With the policy equal to the reference: sigmoid(0) * beta/2 / B * (2/D) * (0 - 1), by docs/math.md §6.
        expected = -0.5 * 0.5 / 2 * (2 / 8)
        if gradient is None or not torch.allclose(gradient[:2], torch.full_like(gradient[:2], expected)):
            return "it computes a wrong gradient; please report this with the lines above"
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first}"
    return None
