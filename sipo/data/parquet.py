"""Reads rows of parquet files one row group at a time, from disk or from the hub, whose connection may break."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sipo.data.records import DataError, row_name
from sipo.files import check_regular, one_line

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each retry of a row group. The count starts again with each row that was read."""

_BATCH = 64  # rows converted at a time
_PERMANENT = (400, 401, 403, 404, 410, 416)  # HTTP: a retry is of no use
_HUB = "hf://"


class ConnectionWarning(UserWarning):
    """A connection to the hub broke and is retried."""


def read_rows(
    files: Sequence[str | Path], columns: Sequence[str], needed: Sequence[str]
) -> Iterator[dict[str, Any] | str]:
    """Yields the rows of all files; for a row that cannot be read, what is wrong with it.

    If the connection to the hub breaks, a file is opened again and read on from the same row group.

    Args:
        files: paths, or ``hf://`` addresses.
        columns: columns to read, if a file has them.
        needed: those of them that every file must have.

    Raises:
        DataError: a file is not a parquet file, lacks a column, or cannot be read even after several attempts.
    """
    row = 0
    for file in files:
        for value in _read_file(file, columns, needed, row):
            yield value
            row += 1


def rows_of(table: Any, columns: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Yields the rows of a pyarrow table; for a row that cannot be converted, what is wrong with it."""
    present = {name: table.column(name) for name in columns if name in table.schema.names}
    for index in range(table.num_rows):
        value: dict[str, Any] = {}
        problem = ""
        for name, column in present.items():
            try:
                value[name] = column[index].as_py()
            except (ValueError, OverflowError, NotImplementedError) as error:  # text that is not UTF-8, dates
                problem = f"{name} cannot be read: {_reason(error)}"
        yield problem or value


def _read_file(
    file: str | Path, columns: Sequence[str], needed: Sequence[str], first_row: int
) -> Iterator[dict[str, Any] | str]:
    import pyarrow.parquet as pq

    remote = str(file).startswith(_HUB)
    group = done = 0  # where to continue: row group, and rows of it already yielded
    row, attempt = first_row, 0
    while True:
        try:
            with _open(file) as stream:
                parquet = pq.ParquetFile(stream, pre_buffer=remote)
                names = parquet.schema_arrow.names
                missing = [name for name in needed if name not in names]
                if missing:
                    raise DataError(f"{file}: has no column {missing[0]!r}, expected Pick-a-Pic's columns")
                wanted = [name for name in columns if name in names]
                while group < parquet.num_row_groups:
                    skip = done
                    for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=wanted):
                        for value in rows_of(batch.slice(skip), wanted):
                            yield value
                            attempt, done, row = 0, done + 1, row + 1
                        skip = max(0, skip - batch.num_rows)
                    group, done = group + 1, 0
            return
        except DataError:
            raise
        except Exception as error:  # from pyarrow, the hub's library, its HTTP library or the network
            if not remote or _is_permanent(error) or attempt == len(WAITS):
                raise DataError(f"{file}: cannot be read from {row_name(row)} on: {_reason(error)}") from error
            text = f"{file}: {_reason(error)}; again in {WAITS[attempt]:g} s, from {row_name(row)} on"
            warnings.warn(text, ConnectionWarning, stacklevel=2)
            time.sleep(WAITS[attempt])
            attempt += 1


def _open(file: str | Path) -> Any:
    if str(file).startswith(_HUB):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(str(file), "rb")
    check_regular(Path(file))
    return open(file, "rb")


def _is_permanent(error: Exception) -> bool:
    from pyarrow import ArrowInvalid  # not a parquet file, or a damaged one

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, (ArrowInvalid, FileNotFoundError, PermissionError)) or status in _PERMANENT


def _reason(error: Exception) -> str:
    """Returns an error's message in one line of bounded length, or its type if it has none (time-outs)."""
    text = one_line(error)
    return text if len(text) < 300 else f"{type(error).__name__}: {text[:300]}"
