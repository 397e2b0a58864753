"""``sipo doctor``: lists what is installed and which backends can run."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import sipo

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
    "scikit-learn": "pip install 'sipo[demo]'",
    "matplotlib": "pip install 'sipo[demo]'",
    "tensorboard": "pip install tensorboard",
}


def add(commands: Any) -> None:
    """Adds the command to the parser's subcommands."""
    parser = commands.add_parser("doctor", help="list what is installed and which backends can run")
    parser.set_defaults(run=_doctor)


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

    for device, status in backends.statuses():
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
