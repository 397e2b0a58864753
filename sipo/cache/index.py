"""The index of a cache of pairs: what its content depends on, and what it holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sipo.cache.format import (
    FILES,
    INDEX,
    LATENTS,
    REMEDY,
    TEXT,
    UNCONDITIONAL,
    CacheError,
    DamagedError,
    OtherSettingsError,
    Shard,
    ShardFolder,
    shard_name,
    write_json,
)
from sipo.cache.source import FileRecord, files_digest
from sipo.cache.weights import PLACE, is_weights, weights_change
from sipo.data.config import DataConfig
from sipo.data.records import row_name
from sipo.families.config import ModelConfig

MAX_PAIRS = "data.max_pairs"
"""The key that an unfinished cache may change: no pair's content depends on it."""

ROWS_FACT, FILES_FACT = "rows", "files"
"""Facts of a shard of latents that its own JSON file has, and the index leaves out."""

MASK_FACT = "error_mask"
"""Fact of a shard of latents: rows whose pairs have an error mask; also its tensors' name."""

IMAGE_LENGTH = "image_length"
"""Fact of the unconditional shard where text depends on the condition image: tokens of text without a prompt."""

_OF_MODEL = ("family", "dtype")
_OF_DATA = (
    *("format", "dataset_split_name", "sizes", "frames", "fps", "center_crop", "random_flip", "latents"),
    *("enable_tiling", "vae_dtype", "dtype", "max_pairs", "seed", "shard_pairs"),
)


def pairs_fingerprint(model: ModelConfig, data: DataConfig, weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Lists what a cache's content depends on, apart from the pairs, as JSON values by the names of settings.

    Where pairs and weights are stored is not part of it.

    Args:
        model: where the encoders come from.
        data: how pairs are encoded.
        weights: the encoders' files (:func:`sipo.cache.weights.weight_hashes`); without them the model's path, revision
            and variant are used.
    """
    if weights is None:
        weights = {name: getattr(model, name) for name in PLACE}
    marks = {name: getattr(model, name) for name in _OF_MODEL} | dict(weights)
    return {f"model.{name}": value for name, value in marks.items()} | {
        f"data.{name}": getattr(data, name) for name in _OF_DATA
    }


def check_fingerprint(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares two fingerprints.

    Raises:
        OtherSettingsError: the first key, in the order of ``wanted``, that differs, with both values.
    """
    made, remedy = "encoded", "use another data.cache"
    if any(key.startswith("reference.") for key in wanted):
        made, remedy = "computed", "start another run"
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they did in the file
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        if found.get(key) == wanted.get(key):
            continue
        if is_weights(key):
            change = weights_change(key, found.get(key), wanted.get(key))
            raise OtherSettingsError(f"{where}: {made} with other weights: {change}, or {remedy}")
        raise OtherSettingsError(
            f"{where}: made with {key}={json.dumps(found.get(key))}, expected this run's "
            f"{json.dumps(wanted.get(key))}: use another folder, or the settings it was made with"
        )


def no_pairs(path: str, records: int, why: str) -> CacheError:
    """Makes the error of a source none of whose rows is a pair that can be used."""
    return CacheError(f"{path}: none of {records} rows is a pair that can be used ({why})")


def other_path(where: Path, found: Any, wanted: str, why: str) -> CacheError:
    """Makes the error of a cache of another ``data.dataset_name``, whose pairs are other ones or cannot be compared."""
    return CacheError(
        f"{where}: made with data.dataset_name={json.dumps(found)}, this run has {json.dumps(wanted)}, {why}: use "
        "another data.cache, or the path it was made with"
    )


@dataclass(frozen=True)
class PairsIndex:
    """What the index of a cache of pairs says.

    Attributes:
        fingerprint: what the content depends on (:func:`pairs_fingerprint`).
        complete: whether the cache is finished; all that follows ``path`` is empty until it is.
        path: ``data.dataset_name`` of the pairs.
        state: what the source said of itself, by which it is known again; JSON.
        pairs: that can be trained on.
        records: rows of the source that were looked at.
        ties: rows without a preference.
        skipped: by reason, how many pairs were left out because they could not be used.
        text_shapes: of a prompt's embeddings, by name; the length of a ragged tensor is ``None``.
        text: shards of text, that of the empty prompt first.
        latents: shards of latents, by number.
    """

    fingerprint: dict[str, Any]
    complete: bool
    path: str
    state: Any = None
    pairs: int = 0
    records: int = 0
    ties: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    text_shapes: dict[str, list[int | None]] = field(default_factory=dict)
    text: list[Shard] = field(default_factory=list)
    latents: list[Shard] = field(default_factory=list)

    @property
    def shards(self) -> list[Shard]:
        """All of them, latents first."""
        return [*self.latents, *self.text]


_CONTENT = ("state", "pairs", "records", "ties", "skipped", "text_shapes", "text", "latents")


def read_pairs_index(folder: Path, fingerprint: Mapping[str, Any] | None = None) -> PairsIndex | None:
    """Reads a cache's index and compares it with what the content is expected to depend on; ``None`` if there is none.

    Raises:
        CacheError: as for :meth:`ShardFolder.read_index`, or a cache of other settings. One that is not finished may
            take another ``data.max_pairs``, on which no pair's content depends.
    """
    index = ShardFolder(folder).read_index()
    if index is None:
        return None
    complete = index["complete"]
    if fingerprint is not None:
        found = index["fingerprint"]
        if not complete and MAX_PAIRS in fingerprint:
            found = found | {MAX_PAIRS: fingerprint[MAX_PAIRS]}
        check_fingerprint(folder, found, fingerprint)
    try:
        content = {name: index[name] for name in _CONTENT} if complete else {}
        for name in content.keys() & {"text", "latents"}:
            content[name] = [Shard.from_dict(entry) for entry in content[name]]
        return PairsIndex(index["fingerprint"], complete, index["path"], **content)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"not a whole index ({type(error).__name__}: {error})"
        raise DamagedError(f"{folder / INDEX}: {problem}; {REMEDY}") from error


def pairs_are_whole(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether there is a finished cache of these settings, with every file of the size that it should have."""
    try:
        index = read_pairs_index(folder, fingerprint)
        if index is None or not index.complete:
            return False
        ShardFolder(folder).check_sizes(index.shards)
    except CacheError:
        return False
    return True


def write_pairs_index(
    shards: ShardFolder, fingerprint: dict[str, Any], path: str, state: Any, *, count: int, records: int, ties: int
) -> None:
    """Writes the index of a cache whose shards are all written; see :class:`PairsIndex`.

    Args:
        shards: the cache's.
        fingerprint, path, state, records, ties: as the index has them.
        count: shards of latents.

    Raises:
        CacheError: a shard is missing, shapes of text embeddings differ, or there are no pairs.
    """
    latents = [shards.require(shard_name(LATENTS, n)) for n in range(count)]
    text = [shards.require(name) for name in (UNCONDITIONAL, *(shard_name(TEXT, n) for n in range(count)))]
    shapes: dict[str, list[int | None]] = text[0].facts["shapes"]
    for shard in text:
        if shard.facts["shapes"] and shard.facts["shapes"] != shapes:
            raise CacheError(
                f"{shards.path / shard.file}: text embeddings of shapes {shard.facts['shapes']}, expected "
                f"{shapes} as for the empty prompt"
            )
    pairs = sum(len(shard.facts["pairs"]) for shard in latents)
    skipped = [entry for shard in latents for entry in shard.facts["skipped"]]
    if pairs == 0:
        raise no_pairs(path, records, f"{row_name(skipped[0][0])}: {skipped[0][2]}" if skipped else f"ties: {ties}")
    content = {
        "path": path,
        "state": state,
        "pairs": pairs,
        "records": records,
        "ties": ties,
        "skipped": dict(sorted(Counter(kind for _, kind, _ in skipped).items())),
        "text_shapes": shapes,
        "text": [shard.as_dict() for shard in text],
        # Without rows and files, which are large and needed only where something has changed.
        "latents": [
            {key: value for key, value in shard.as_dict().items() if key not in (ROWS_FACT, FILES_FACT)}
            for shard in latents
        ],
    }
    _write_files(shards.path, latents)  # before the index: nothing relies on them without it
    shards.write_index(fingerprint, content, complete=True)
    shards.remove_beyond((LATENTS, TEXT), count)


def _write_files(folder: Path, latents: Iterable[Shard]) -> None:
    """Writes the names of the source's files and a digest of their stamps, by which a change is found at a start."""
    files: dict[str, FileRecord] = {}
    for shard in latents:
        for name, record in shard.facts[FILES_FACT].items():
            files.setdefault(name, record)  # written to between two shards, it differs from what the first recorded
    seen = files_digest(record[:-1] for record in files.values())
    write_json(folder / FILES, {"digest": seen, "names": list(files)}, indent=None)
