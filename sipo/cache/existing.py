"""Compares the shards that a cache already has with the source."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from sipo.cache.format import (
    FILES,
    LATENTS,
    TEXT,
    CacheError,
    DamagedError,
    Shard,
    ShardFolder,
    digest,
    read_json,
    shard_name,
)
from sipo.cache.index import FILES_FACT, MAX_PAIRS, ROWS_FACT, PairsIndex, other_path, read_pairs_index
from sipo.cache.source import (
    RowFacts,
    ShardSource,
    are_absent,
    compare_files,
    files_digest,
    first_row_change,
    path_named,
    prefix_of,
    row_of,
    stamps_of,
)
from sipo.data.check import SKIPPED
from sipo.data.config import DataConfig
from sipo.data.load import BadPairError
from sipo.data.records import PairReader, row_name


class ExistingCache:
    """The content of a cache's folder, compared with the records that it was made from.

    Attributes:
        index: of the cache, if it has one that can be read.
        finished: whether the cache was finished when it was opened.
        source: digest of what a shard's content depends on, apart from its pairs.
        changes: the first change in each shard that no longer agrees with the source.
        absent: number of shards of latents whose files are all gone.
        begun: whether the index says that the cache is being written.
        stale: whether the index has to be written again.

    Args:
        folder: the cache's.
        settings: how pairs are encoded.
        fingerprint: what the content depends on.
        check_hashes, verify, refuse_changes: see :func:`sipo.cache.precompute.precompute_pairs`.

    Raises:
        CacheError: a cache of other settings, or of another format.
    """

    def __init__(
        self,
        folder: Path,
        settings: DataConfig,
        fingerprint: dict[str, Any],
        *,
        check_hashes: bool,
        verify: bool,
        refuse_changes: bool,
    ) -> None:
        self.shards = ShardFolder(folder)
        self.settings = settings
        self.fingerprint = fingerprint
        self.check_hashes = check_hashes
        self.verify = verify
        self.refuse_changes = refuse_changes
        self.source = digest({key: value for key, value in fingerprint.items() if key != MAX_PAIRS})
        self.index: PairsIndex | None = None
        with contextlib.suppress(DamagedError):  # the shards' own files show what exists
            self.index = read_pairs_index(folder, fingerprint)
        self.finished = self.index is not None and self.index.complete
        self.path = settings.dataset_name if self.index is None else self.index.path  # of the pairs that are encoded
        self.known = {} if self.index is None else {shard.name: shard for shard in self.index.shards}
        self.changes: list[str] = []
        self.absent = 0
        self.begun = self.stale = not self.finished

    def is_unchanged(self, reader: PairReader, state: Any) -> bool:
        """Whether a finished cache agrees with its source as far as the source's state and files' stamps tell.

        Raises:
            BadPairError: it has left out pairs, which ``data.skip_bad=false`` no longer allows.
        """
        index = self.index
        if index is None or not self.finished or self.check_hashes or self.verify or state is None:
            return False
        if index.state != state or index.path != self.settings.dataset_name:
            return False
        if any(self._is_limit_raised(shard) for shard in index.latents):
            return False
        files = read_files(self.shards.path)
        if files is None:
            return False
        prefix = prefix_of(reader)
        with ThreadPoolExecutor(8, "stat") as pool:
            stamps = stamps_of([path_named(name, prefix) for name in files["names"]], pool)
            if files_digest(stamps) != files["digest"]:
                return False
        for shard in index.latents:
            self._stop_at_skipped(shard)
        return True

    def begin(self) -> None:
        """Marks the cache as unfinished, before any of its content changes."""
        self.shards.write_index(self.fingerprint, {"path": self.path}, complete=False)

    def begin_change(self) -> None:
        """Marks a finished cache as unfinished while it changes, so that no run opens it meanwhile."""
        if not self.begun:
            self.begin()
        self.begun = self.stale = True

    def find(self, name: str) -> Shard | None:
        """Finds a whole shard, by the finished index or its own JSON file."""
        if self.check_hashes:
            found = self.shards.read_intact(name)
            known = self.known.get(name)
            if found is not None and known is not None and found.sha256 != known.sha256:
                self.stale = True  # the index describes another file, for example one that was restored since
            return found
        shard = self.known.get(name) or self.shards.read(name)
        try:
            self.shards.check_sizes([] if shard is None else [shard])
        except DamagedError:
            return None
        return shard

    def compare(self, part: ShardSource, pool: ThreadPoolExecutor) -> None:
        """Checks whether the shards of these records exist, are whole, and still agree with the source."""
        part.read_rows(self.source, pool)
        text = self.find(shard_name(TEXT, part.number))
        facts = {} if text is None else text.facts
        part.needs_text = facts.get("source") != self.source or facts.get("prompts") != part.new_keys
        name = shard_name(LATENTS, part.number)
        latents = self.find(name)
        if latents is not None and self._is_limit_raised(latents):
            part.change = f"{row_name(part.rows[0][0])} or one behind it: data.max_pixels allows for it now"
            self._changed(part.change)
            latents = None
        if latents is None or not (latents.facts.get("seen") == part.seen and not self.verify):
            self._compare_latents(part, latents, pool)
        else:
            part.needs_latents = False
        same_source = part.needs_text and facts.get("source") == self.source
        if same_source and not self.changes and not self._is_recut(facts["prompts"], part.new_keys):
            self._changed(f"{row_name(part.rows[0][0])} or one behind it: another prompt")  # of a pair that is left out
        if latents is not None and not part.needs_latents:
            self._stop_at_skipped(latents)

    def find_gone(self, parts: int) -> None:
        """Records a change if the source has become shorter.

        Args:
            parts: number of shards that the source has now.
        """
        gone = self.known.get(shard_name(LATENTS, parts))
        if gone is not None:
            row = min(row for row, *_ in [*gone.facts["pairs"], *gone.facts["skipped"]])
            self._changed(f"{row_name(row)}: no longer a pair")

    def _compare_latents(self, part: ShardSource, shard: Shard | None, pool: ThreadPoolExecutor) -> None:
        """Compares records with the rows and files of their shard of latents; records new stamps and prompts."""
        name = shard_name(LATENTS, part.number)
        shard = None if shard is None else self.shards.read(name)  # the index has neither rows nor files
        if shard is None:
            if self.finished and name not in self.known:
                self._changed(f"{row_name(part.rows[0][0])}: a new pair")
            return
        facts = shard.facts
        if facts["source"] != self.source:
            return

        def path_of(file: str) -> Path:
            return Path(path_named(file, part.prefix))

        if facts[ROWS_FACT] != part.rows:
            part.change = first_row_change(facts[ROWS_FACT], part.rows)
            recut = self._is_recut(facts[ROWS_FACT], part.rows)
            if not recut:
                self._changed(part.change)
            if are_absent(facts[FILES_FACT], path_of, pool):  # encoded again, every pair would be lost
                raise CacheError(
                    f"{self.settings.dataset_name}: {part.change}, since {self.shards.path} was encoded, and none of "
                    f"the images or clips of {_rows(facts[ROWS_FACT])} exists any more: expected these files, or the "
                    "row as it was"
                )
            part.change = "" if recut else part.change
            return
        found = compare_files(facts[FILES_FACT], path_of, pool, self.verify)
        if found.change:
            part.change = f"{row_name(row_of(part.rows, found.name))}: {found.name} {found.change}"
            self._changed(part.change)
            return
        if found.absent and self.verify:
            raise CacheError(
                f"{self.settings.dataset_name}: none of the images or clips of {_rows(part.rows)} exists, "
                "expected them all to verify their content"
            )
        self.absent += found.absent
        part.needs_latents = False
        keys = {row[0]: key for row, key in zip(part.rows, part.keys, strict=True)}
        other = [row for row, key, _ in facts["pairs"] if keys[row] != key]
        if other:
            self._changed(f"{row_name(other[0])}: another prompt")
            self.begin_change()
        pairs = [[row, keys[row], shape] for row, _, shape in facts["pairs"]]
        now = facts | {FILES_FACT: found.files, "pairs": pairs}
        if not found.absent:
            now["seen"] = part.seen
        try:
            if now != facts:
                self.shards.write_facts(replace(shard, facts=now))
        except OSError:
            if other:
                raise
            return  # a read-only cache: the new times are compared again next time
        self.stale |= not found.absent

    def _is_recut(self, before: list[Any], now: list[Any]) -> bool:
        """Whether a shard of an unfinished cache has only more or fewer pairs, as the last under another max_pairs."""
        common = min(len(before), len(now))
        return not self.finished and self.path == self.settings.dataset_name and before[:common] == now[:common]

    def _is_limit_raised(self, shard: Shard) -> bool:
        """Whether pairs were left out of a shard because of a ``data.max_pixels`` that is higher now."""
        limit: int = shard.facts.get("max_pixels", self.settings.max_pixels)
        return limit < self.settings.max_pixels

    def _stop_at_skipped(self, shard: Shard) -> None:
        """Raises for the first pair that was left out under ``data.skip_bad=true``, where it is false now."""
        if not self.settings.skip_bad:
            for row, kind, reason in shard.facts["skipped"]:
                raise bad_pair(row, kind, reason)

    def _changed(self, change: str) -> None:
        """Records a change for the report, or refuses it."""
        if self.path != self.settings.dataset_name:
            raise other_path(
                self.shards.path, self.path, self.settings.dataset_name, f"whose pairs are others ({change})"
            )
        if self.refuse_changes:
            raise CacheError(
                f"{self.settings.dataset_name}: {change}, since {self.shards.path} was encoded: expected the data that "
                "the run has been trained on; another training.output_dir starts over with this"
            )
        self.changes.append(change)


def _rows(rows: list[RowFacts]) -> str:
    return row_name(rows[0][0]) if len(rows) == 1 else f"rows {rows[0][0] + 1} to {rows[-1][0] + 1}"


def bad_pair(row: int, kind: str, reason: str, change: str = "") -> BadPairError:
    """Makes the error of a pair that cannot be used and may not be left out.

    Args:
        row: the pair's.
        kind: of the fault.
        reason: what is wrong with it.
        change: why it is encoded again, if it is.
    """
    before = f"the data has changed ({change}) and is encoded again, but " if change else ""
    listed = "; `sipo data check` lists them" if kind in SKIPPED else ""
    remedy = f"(rows count from 1; data.skip_bad=true leaves such pairs out and counts them{listed})"
    return BadPairError(kind, f"{before}{row_name(row)}: {reason} {remedy}")


def read_files(folder: Path) -> dict[str, Any] | None:
    """Reads the names and stamps of a source's files; ``None`` if they are missing or damaged."""
    try:
        return read_json(folder / FILES)
    except CacheError:
        return None
