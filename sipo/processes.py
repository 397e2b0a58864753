"""Runs work that the processes of one run share, and passes on its errors.

An error in one process is raised in all, and no process waits for one that has exited.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from sipo.files import one_line

_T = TypeVar("_T")

ROUND_SECONDS = 10.0
"""How long a process works on before it hears of the others; a collective operation waits that long, and no longer."""

# What gloo, NCCL and torch's store say where the other end is gone or too late.
_LOST = re.compile(
    r"closed by (remote )?peer|connection (was likely )?closed|connection (reset|refused)|broken pipe|got 0 bytes"
    r"|tim(ed|e) ?out|pair closure|remote process exited|ncclRemoteError|was aborted",
    re.IGNORECASE,
)


class OtherProcessError(RuntimeError):
    """Another process of the run has failed; the message is its error's, and which it was."""


def from_all(accelerator: Any, work: Callable[[], _T]) -> list[_T]:
    """Runs ``work`` in every process; returns all results, by process, or raises in all of them.

    Every process calls it. ``work`` must not wait for other processes.

    Raises:
        Exception: this process's own, once the others know of it.
        OtherProcessError: another's, where this one's ``work`` succeeded.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return [work()]
    failed: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failed = error
    try:
        everyone = gathered(accelerator, ("" if failed is None else one_line(failed), result))
    except Exception:
        if failed is not None:  # says more than that another process is gone, which may be for the same reason
            raise failed  # noqa: B904 - the other one is its context
        raise
    if failed is not None:
        raise failed
    for rank, (message, _) in enumerate(everyone):
        if message:
            raise OtherProcessError(f"process {rank}: {message}")
    return [each for _, each in everyone]


def everywhere(accelerator: Any, work: Callable[[], _T]) -> _T:
    """Like :func:`from_all`, for results that stay in their process: returns this process's own."""
    own: list[_T] = []
    from_all(accelerator, lambda: own.append(work()))
    return own[0]


def on_main(accelerator: Any, work: Callable[[], object]) -> None:
    """Runs ``work`` in the main process alone; the others wait for it. Errors as for :func:`from_all`."""

    def alone() -> None:
        if accelerator is None or accelerator.is_main_process:
            work()

    from_all(accelerator, alone)


def from_main(accelerator: Any, work: Callable[[], _T]) -> _T:
    """Returns, in every process, what ``work`` returns in the main process. Errors as for :func:`from_all`."""
    main = accelerator is None or accelerator.is_main_process
    result: Any = from_all(accelerator, lambda: work() if main else None)[0]
    found: _T = result
    return found


def in_rounds(accelerator: Any, work: Generator[None, None, None]) -> None:
    """Runs ``work`` to its end in every process, and ends it early in all of them where one fails.

    Every process calls it. Where ``work`` yields it may be interrupted, which should be every few seconds; how often
    it yields may differ between processes. So nobody computes for hours beside one that has failed, and who is ready
    first does not wait for longer than a collective operation may take. Errors as for :func:`from_all`.
    """
    done = False

    def round_of_work() -> bool:
        nonlocal done
        until = time.monotonic() + ROUND_SECONDS
        while not done:
            done = next(work, True) is True
            if time.monotonic() >= until:
                break
        return done

    try:
        while not all(from_all(accelerator, round_of_work)):
            pass
    finally:
        work.close()


def gathered(accelerator: Any, value: _T) -> list[_T]:
    """Returns the value of every process, in every process."""
    from accelerate.utils import gather_object

    found: list[_T] = gather_object([value])
    return found


def is_collective(error: BaseException) -> bool:
    """Whether an error comes from communication between processes, which does not go on after one."""
    from torch import distributed

    known = distributed.is_available() and isinstance(error, distributed.DistError)
    return known or _of_gloo(error) is not None


def lost_connection(error: BaseException) -> str:
    """Returns a one-line message if another process no longer answers; "" for any other error.

    Other errors of communication, as a port in use or a wrong setting of NCCL, are none of this.

    Args:
        error: that ended a process, which may be the only sign that it has of another one's end.
    """
    if not is_collective(error):
        return ""
    gloo = _of_gloo(error)
    text = " ".join(str(error).split()) if gloo is None else re.split(r"\. [A-Z]", gloo)[0]
    if not _LOST.search(text):
        return ""
    return (
        f"the connection to the other processes is lost ({text.rstrip('.')}): another process failed (see its own "
        "error), was killed, or did not answer within training.ddp_timeout"
    )


def _of_gloo(error: BaseException) -> str | None:
    """Returns the message of an error of gloo, which has no class of its own, without the place in its source.

    "[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:431. …"
    """
    found = re.match(r"\[\S*gloo/\S+\] (.*)", " ".join(str(error).split())) if type(error) is RuntimeError else None
    return None if found is None else found[1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory or the host's does not suffice."""
    import torch

    # The CPU's allocator has no class of its own.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
