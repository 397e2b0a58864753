"""The index of a cache of pairs: read and compared with what it should be, and written at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sipo.cache.changes import FileRecord, files_digest, path_named, stamps_of
from sipo.cache.fingerprint import MAX_PAIRS, check_fingerprint
from sipo.cache.format import (
    FILES,
    INDEX,
    LATENTS,
    REMEDY,
    TEXT,
    UNCONDITIONAL,
    CacheError,
    DamagedError,
    Shard,
    ShardFolder,
    read_json,
    shard_from_entry,
    shard_name,
    write_json,
)
from sipo.cache.shard_sources import prefix_of
from sipo.data.records import PairReader

ROWS_FACT, FILES_FACT = "rows", "files"
"""Facts of a shard of latents that its own JSON file has, and the index leaves out."""

_WHOLE = {"path", "state", "pairs", "records", "ties", "skipped", "text_shapes", "text", "latents"}  # in an index


def read_pairs_index(folder: Path, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Reads a cache's index and compares it with what the content is expected to depend on; ``None`` if there is none.

    Raises:
        CacheError: as for :meth:`ShardFolder.read_index`, or a cache of other settings. One that is not finished may
            take another ``data.max_pairs``, on which no pair's content depends.
    """
    index = ShardFolder(folder).read_index()
    if index is None:
        return None
    if fingerprint is not None:
        found = index["fingerprint"]
        if not index["complete"] and MAX_PAIRS in fingerprint:
            found = found | {MAX_PAIRS: fingerprint[MAX_PAIRS]}
        check_fingerprint(folder, found, fingerprint)
    missing = sorted((_WHOLE if index["complete"] else {"path"}) - index.keys())
    if missing:
        raise DamagedError(f"{folder / INDEX}: not a whole index, {missing[0]!r} is missing; {REMEDY}")
    return index


def read_known(folder: Path, marks: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the index of a folder, as far as it is whole; refuses a cache of other settings."""
    try:
        index = read_pairs_index(folder, marks)
        if index is not None and index["complete"]:
            indexed_shards(index)
    except (DamagedError, KeyError, TypeError):
        return None  # the shards' own files say what there is
    return index


def indexed_shards(index: dict[str, Any]) -> list[Shard]:
    """Lists the shards of a finished index, latents first."""
    return [shard_from_entry(entry) for entry in (*index["latents"], *index["text"])]


def _indexed(shard: Shard) -> dict[str, Any]:
    """An entry of the index: without rows and files, which are large and needed only where something has changed."""
    return {key: value for key, value in shard.as_dict().items() if key not in (ROWS_FACT, FILES_FACT)}


def pairs_are_whole(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Tells whether there is a finished cache of these settings, with every file of the size that it should have."""
    try:
        index = read_pairs_index(folder, fingerprint)
        if index is None or not index["complete"]:
            return False
        ShardFolder(folder).check_sizes(indexed_shards(index))
    except (CacheError, KeyError, TypeError):
        return False
    return True


def is_unchanged(folder: Path, index: dict[str, Any], reader: PairReader, state: Any, path: str) -> bool:
    """Tells whether neither rows nor files of a finished cache have changed, as far as stamps tell."""
    if state is None or index["state"] != state or index["path"] != path:
        return False
    files = read_files(folder)
    if files is None:
        return False
    prefix = prefix_of(reader)
    with ThreadPoolExecutor(8, "stat") as pool:
        return files_digest(stamps_of([path_named(name, prefix) for name in files["names"]], pool)) == files["digest"]


def read_files(folder: Path) -> dict[str, Any] | None:
    """Reads what :func:`_write_files` wrote; ``None`` unless it is there and whole."""
    try:
        return read_json(folder / FILES)
    except CacheError:
        return None


def _write_files(folder: Path, latents: Iterable[Shard]) -> None:
    """Writes what :func:`is_unchanged` reads."""
    files: dict[str, FileRecord] = {}
    for shard in latents:
        for name, record in shard.facts[FILES_FACT].items():
            files.setdefault(name, record)  # written to between two shards, it differs from what the first recorded
    seen = files_digest(record[:-1] for record in files.values())
    write_json(folder / FILES, {"digest": seen, "names": list(files)}, indent=None)


def write_pairs_index(
    shards: ShardFolder, fingerprint: Mapping[str, Any], path: str, state: Any, *, count: int, records: int, ties: int
) -> None:
    """Writes the index of a cache whose shards are all there.

    Args:
        shards: the cache's.
        fingerprint: what its content depends on.
        path: ``data.dataset_name``.
        state: the source's, by which :func:`is_unchanged` knows it again; JSON.
        count: shards of latents.
        records: rows of the source that were looked at.
        ties: rows without a preference.

    Raises:
        CacheError: a shard is missing, shapes of text embeddings differ, or there are no pairs.
    """
    latents = [shards.require(shard_name(LATENTS, n)) for n in range(count)]
    text = [shards.require(name) for name in (UNCONDITIONAL, *(shard_name(TEXT, n) for n in range(count)))]
    shapes: dict[str, list[int]] = text[0].facts["shapes"]
    for shard in text:
        if shard.facts["prompts"] and shard.facts["shapes"] != shapes:
            raise CacheError(
                f"{shards.path / shard.file}: text embeddings of shapes {shard.facts['shapes']}, expected "
                f"{shapes} as for the empty prompt"
            )
    pairs = sum(len(shard.facts["pairs"]) for shard in latents)
    if pairs == 0:
        raise CacheError(f"{shards.path}: none of {records} rows is a pair that can be used")
    skipped = [entry for shard in latents for entry in shard.facts["skipped"]]
    content = {
        "path": path,
        "state": state,
        "pairs": pairs,
        "records": records,
        "ties": ties,
        "skipped": dict(sorted(Counter(kind for _, kind, _ in skipped).items())),
        "text_shapes": shapes,
        "text": [shard.as_dict() for shard in text],
        "latents": [_indexed(shard) for shard in latents],
    }
    _write_files(shards.path, latents)  # before the index: until it is there, nothing relies on them
    shards.write_index(fingerprint, content, complete=True)
    shards.remove_beyond((LATENTS, TEXT), count)
