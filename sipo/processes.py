"""Work that processes of one run share: an error of one is every process's, and nobody waits for who has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


class OtherProcessError(RuntimeError):
    """Another process of the run has failed; the message is its error's, and which it was."""


def everywhere(accelerator: Any, work: Callable[[], _T]) -> _T:
    """Runs ``work`` in every process, and goes on in all of them or in none.

    Every process calls it. ``work`` must not wait for other processes.

    Returns:
        What this process's ``work`` returned.

    Raises:
        Exception: this process's own, once the others know of it.
        OtherProcessError: another's, where this one's ``work`` succeeded.
    """
    if accelerator.num_processes == 1:
        return work()
    failed: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failed = error
    messages = gathered(accelerator, "" if failed is None else " ".join(str(failed).split()) or type(failed).__name__)
    if failed is not None:
        raise failed
    for rank, message in enumerate(messages):
        if message:
            raise OtherProcessError(f"process {rank}: {message}")
    return result


def on_main(accelerator: Any, work: Callable[[], _T]) -> _T | None:
    """Runs ``work`` in the main process alone; the others wait for it. Errors as for :func:`everywhere`.

    Returns:
        What ``work`` returned; ``None`` in the other processes.
    """
    return everywhere(accelerator, lambda: work() if accelerator.is_main_process else None)


def gathered(accelerator: Any, value: _T) -> list[_T]:
    """Every process's value, in every process."""
    from accelerate.utils import gather_object

    found: list[_T] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return found
