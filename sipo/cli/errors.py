"""Errors that a user of the command line can do something about take one line each; bugs keep their traceback."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# What all commands but `sipo demo` and `sipo doctor` need. Import name → distribution.
_PACKAGES = {
    "accelerate": "accelerate",
    "av": "av",
    "datasets": "datasets",
    "diffusers": "diffusers",
    "huggingface_hub": "huggingface-hub",
    "peft": "peft",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "yaml": "pyyaml",
}

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""

READER_GONE = 141
"""Exit status where nobody reads what is printed any more, as a shell has it of programs that end by SIGPIPE."""

# Packages whose errors are about the network, a file, or what a codec can do, and have no other class in common.
_OF_PACKAGES = {"av": "FFmpeg", "huggingface_hub": "hub", "safetensors": "safetensors"}
_OF_PACKAGES["safetensors_rust"] = "safetensors"  # as it was called before
_OF_PACKAGES |= dict.fromkeys(("aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3"), "network")


class CommandError(Exception):
    """An error for the user of a command, in one line."""


def check_exists(target: Path) -> None:
    """Refuses a run's folder or a configuration that does not exist."""
    if not target.exists():
        raise CommandError(f"{target}: no such file or folder, expected the folder of a run or a YAML file")


def missing_packages(packages: Mapping[str, str]) -> str:
    """Returns what has to be installed of a table from import name to distribution; "" if nothing."""
    needed: dict[str, Any] = {}  # versions by distribution; any will do where sipo itself is not installed
    with contextlib.suppress(ImportError):  # PackageNotFoundError is one
        from packaging.requirements import Requirement

        needed = {each.name: each.specifier for each in map(Requirement, importlib.metadata.requires("sipo") or ())}
    missing = []
    for module, name in packages.items():
        if importlib.util.find_spec(module) is None:
            missing.append(name)
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another distribution, as pillow-simd
            version = importlib.metadata.version(name)
            if name in needed and not needed[name].contains(version, prereleases=True):
                missing.append(f"{name}{needed[name]} ({version} is installed)")
    return ", ".join(missing)


def one_line_errors(work: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Wraps a command that needs the packages of ``sipo[train]``; see :func:`in_one_line`."""

    @functools.wraps(work)
    def guarded(options: argparse.Namespace) -> int:
        if missing := missing_packages(_PACKAGES):
            raise CommandError(f"this needs {missing}: pip install 'sipo[train]'")
        _quieten()
        with in_one_line():
            return work(options)

    return guarded


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Turns errors that a user can do something about into a :class:`CommandError`.

    Raises:
        BrokenPipeError: nobody reads what is printed.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and gone_readers():
            raise
        if message := user_message(error):
            raise CommandError(message) from error
        raise


def user_message(error: Exception) -> str:
    """Returns the message for a user in one line; "" for an error that can only be a bug."""
    import torch

    from sipo.processes import OtherProcessError, is_out_of_memory, lost_connection

    text = _said(error)
    if isinstance(error, torch.OutOfMemoryError):  # not in training, which says more
        advice = "lower training.train_batch_size or data.sizes; data.enable_tiling encodes and decodes in less"
        return f"out of memory; {advice}: {text}"
    if is_out_of_memory(error):
        advice = "lower training.dataloader_num_workers, data.sizes or data.frames, or use smaller files"
        return f"out of memory on the host; {advice}: {text}"
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply: {text}"
    # OSError: files; ValueError: ours for data, caches, checkpoints and configurations; FloatingPointError: of
    # loss.nonfinite=raise.
    if isinstance(error, (OSError, ValueError, FloatingPointError, ImportError, OtherProcessError)):
        return text
    if "sipo.training" in sys.modules:
        from sipo.training import TrainingDivergedError, TrainingOutOfMemoryError

        if isinstance(error, (TrainingDivergedError, TrainingOutOfMemoryError)):
            return text
    package = type(error).__module__.partition(".")[0]
    if package in _OF_PACKAGES:
        return f"{_OF_PACKAGES[package]}: {text}"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text}; if the system killed it for lack of memory, lower training.dataloader_num_workers"
    if reason := lost_connection(error):
        return reason
    return text if isinstance(error, getattr(torch.distributed, "DistError", ())) else ""  # not in every build of torch


def _said(error: Exception) -> str:
    """Returns an error's message; of an error in a data loader's process, the message without its traceback."""
    text = str(error).strip()
    if "Original Traceback (most recent call last)" in text:
        last = re.search(r"^[\w.]+(?:: (.*))?\Z", text.splitlines()[-1])
        text = (last[1] or "" if last else text).strip()
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        # A number stands for a file that was open already.
        shown = [os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name) for name in names]
        text = f"{' -> '.join(shown)}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def _quieten() -> None:
    """Hides what diffusers and transformers print about every component that is loaded; downloads keep their bars.

    Nor is a line wanted for each image processor that could do with torchvision, or for each image whose EXIF data are
    damaged, and whose pixels are not.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # it prints every prompt of a batch that is too long
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


# ---- Readers of what is printed, as `| head` ----


def gone_readers() -> list[Any]:
    """Returns which of standard output and standard error nobody reads any more."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # none, closed, or no file
            watch = select.poll()
            watch.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
                found.append(stream)
    return found


def print_nowhere(streams: list[Any]) -> None:
    """Redirects streams that nobody reads to the null device: the interpreter flushes them when it ends."""
    with open(os.devnull, "wb") as nowhere:
        for stream in streams:
            os.dup2(nowhere.fileno(), stream.fileno())


def tell(line: str = "") -> None:
    """Prints a line on standard error, or flushes it; it is no error if nobody reads it any more."""
    if sys.stderr is None or sys.stderr.closed:
        return
    try:
        if line:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    except OSError:
        with contextlib.suppress(OSError):  # no file
            print_nowhere([sys.stderr])
