"""Reads pairs in Pick-a-Pic's columns from parquet files, on disk or on the hub."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sipo.data.parquet import read_rows, rows_of
from sipo.data.records import (
    DataError,
    PairRecord,
    bad_row,
    check_data_file,
    has_unpaired_surrogate,
    is_finite_number,
    states,
)
from sipo.files import one_line, short

_COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
_EXTRA = ("has_label", "are_different", "best_image_uid", "image_0_uid", "image_1_uid")
_HUB_SECONDS = 10.0  # to wait for an answer


@dataclass(frozen=True)
class PickapicReader:
    """Reads Pick-a-Pic v1 and v2 as published: ``jpg_0``, ``jpg_1`` (bytes), ``label_0``, ``label_1``, ``caption``.

    A label of 0.5 for both is a tie. ``has_label``, ``are_different``, ``best_image_uid``, ``image_0_uid`` and
    ``image_1_uid`` are compared with the labels if a data set has them. Local files are read in place, row group by row
    group. Files on the hub are downloaded first, or with ``streaming`` also read row group by row group.
    """

    path: str
    split: str = "train"
    streaming: bool = False

    def __iter__(self) -> Iterator[PairRecord]:
        for row, value in enumerate(self._rows()):
            yield bad_row(row, value) if isinstance(value, str) else _record(row, value)

    def state(self) -> Any:
        """Lists names, sizes, times and inodes of local files, or names and git hashes on the hub; reads no images.

        Raises:
            DataError: the path does not exist, and the hub has no such data set or cannot be reached.
        """
        place = Path(self.path)
        if os.path.exists(place):
            return states(place, [place] if place.is_file() else sorted(place.rglob("*.parquet")))
        from huggingface_hub import HfApi
        from huggingface_hub.utils import RepositoryNotFoundError

        try:
            info = HfApi().dataset_info(self.path, timeout=_HUB_SECONDS, files_metadata=True)
            # Not the commit: a changed README alone would then cause every image to be downloaded again.
            blobs = {file.rfilename: file.blob_id for file in info.siblings or []}
            files = {name: blob for name, blob in blobs.items() if name.endswith(".parquet")}
            configs = info.card_data.get("configs") if info.card_data is not None else None
            return {"files": files or info.sha, "configs": configs}
        except Exception as error:  # from the hub's library, its HTTP library or the network
            missing = isinstance(error, RepositoryNotFoundError)
            problem = "not found; a private one needs `hf auth login`" if missing else one_line(error)
            raise DataError(f"{self.path}: no such file or folder, and no hub id that answers ({problem})") from error

    def count(self) -> int | None:
        """Counts the rows of local files from their footers; ``None`` on the hub, and if a file cannot be read."""
        from pyarrow import parquet

        place = Path(self.path)
        if not os.path.exists(place):
            return None
        try:
            return sum(parquet.read_metadata(file).num_rows for file in self._files(place))
        except (DataError, OSError, ValueError):  # reading gives a better message
            return None

    def _rows(self) -> Iterator[dict[str, Any] | str]:
        """Yields the rows; for one that cannot be read, what is wrong with it."""
        wanted = (*_COLUMNS, *_EXTRA)
        place = Path(self.path)
        if self.streaming or os.path.exists(place):
            yield from read_rows(self._files(place), wanted, _COLUMNS)
            return
        from datasets import config, load_dataset

        # A downloaded data set is read without the hub. Otherwise ask first: the library retries for half a minute.
        if not (Path(config.HF_DATASETS_CACHE) / self.path.replace("/", "___")).exists():
            self.state()
        try:
            data = load_dataset(self.path, split=self.split)
            missing = [name for name in _COLUMNS if name not in data.column_names]
            if missing:
                raise DataError(f"{self.path}: has no column {missing[0]!r}, expected Pick-a-Pic's columns")
            # As tables, so that images stay encoded, and a row that cannot be converted affects no other row.
            for table in data.with_format("arrow").iter(batch_size=64):
                yield from rows_of(table, wanted)
        except DataError:
            raise
        except Exception as error:  # from the hub's library, its HTTP library, pyarrow or the network
            raise DataError(f"{self.path}: split {self.split!r} cannot be read: {one_line(error)}") from error

    def _files(self, place: Path) -> list[str]:
        """Lists the split's parquet files in order: paths, or ``hf://`` addresses of one revision."""
        if place.is_dir():
            for path in place.rglob("*.parquet"):
                check_data_file(path)
        elif os.path.exists(place):
            return [str(place)]
        else:
            self.state()  # as above
        from datasets import load_dataset_builder

        try:
            splits = load_dataset_builder(self.path).config.data_files or {}
        except Exception as error:  # as above
            raise DataError(f"{self.path}: cannot be read: {one_line(error)}") from error
        if self.split not in splits:
            names = ", ".join(map(str, splits)) or "none"
            raise DataError(f"{self.path}: split {self.split!r} cannot be read: expected one of {names}")
        files = [str(name) for name in splits[self.split]]
        for name in files:
            if not name.endswith(".parquet"):
                raise DataError(f"{self.path}: {name} is no parquet file, expected Pick-a-Pic's files")
        return files


def _record(row: int, value: Mapping[str, Any]) -> PairRecord:
    prompt = value["caption"]
    if not isinstance(prompt, str) or has_unpaired_surrogate(prompt):
        return bad_row(row, f"caption={short(prompt)}: expected text")
    if value.get("has_label") is False:
        return bad_row(row, "has_label=False: nobody has compared this pair", prompt)
    labels = [value["label_0"], value["label_1"]]
    if not all(is_finite_number(label) and label >= 0 for label in labels) or not math.isclose(sum(labels), 1.0):
        return bad_row(row, f"label_0={short(labels[0])}, label_1={short(labels[1])}: expected a sum of 1", prompt)
    tie = math.isclose(labels[0], labels[1])
    best = 0 if labels[0] >= labels[1] else 1
    named, uids = value.get("best_image_uid"), [value.get("image_0_uid"), value.get("image_1_uid")]
    if named and all(uids):
        expected = "tie" if tie else uids[best]
        if named != expected:
            return bad_row(row, f"best_image_uid={named}: expected {expected}, which the labels name", prompt)
    if value.get("are_different") is False:
        return bad_row(row, "are_different=False: both images are one", prompt)
    images = [_encoded(value[name]) for name in ("jpg_0", "jpg_1")]
    for name, image in zip(("jpg_0", "jpg_1"), images, strict=True):
        if not image:
            return bad_row(row, f"{name} is empty: expected an encoded image", prompt)
    return PairRecord(row, prompt, images[best], images[1 - best], labels[best], labels[1 - best], tie)


def _encoded(value: Any) -> bytes:
    """Returns an image's bytes, from a binary column or from a column of encoded images."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""
