"""The summary of a cache: what it holds and what was done to it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds, and what this call did to it.

    Attributes:
        pairs: that can be trained on.
        records: rows of the source that were looked at.
        ties: rows without a preference, which are no pairs to train on.
        skipped: by reason, how many pairs were left out because they could not be used.
        skipped_rows: their rows, with what is wrong with each.
        prompts: distinct ones.
        bytes: of all files of tensors.
        written: shards of pairs that this process encoded.
        kept: shards of pairs that were there and whole.
        seconds: that this call took.
        changes: the first change in each shard that was there and is not what the source says any more.
        texts: shards of text that this process encoded.
        absent: shards of pairs none of whose files is there any more, so that they could not be compared.
    """

    pairs: int
    records: int
    ties: int
    skipped: dict[str, int]
    skipped_rows: list[tuple[int, str]]
    prompts: int
    bytes: int
    written: int
    kept: int
    seconds: float
    changes: list[str] = field(default_factory=list)
    texts: int = 0
    absent: int = 0

    def news(self) -> list[str]:
        """Describes what has changed since the pairs were encoded, and what could not be compared, one line each."""
        lines, shards = [], self.written + self.kept
        if self.changes:
            more = len(self.changes) - 1
            others = f", and in {more} more shard{'s' * (more > 1)}" if more else ""
            lines.append(
                f"the data has changed ({self.changes[0]}{others}): "
                f"{self.written} of {shards} shards of latents and {self.texts} of text encoded anew, {self.kept} kept"
            )
        if self.absent:
            lines.append(
                f"{self.absent} of {shards} shards could not be checked: their images or clips are missing; the "
                "encoded data is used unchanged"
            )
        return lines

    def describe(self) -> str:
        """Two lines for a terminal."""
        return (
            f"{self.pairs} pairs, {self.prompts} prompts, {self.bytes / 1e6:.1f} MB "
            f"({self.written} shards written, {self.kept} kept, {self.seconds:.0f} s)\n"
            f"rows: {self.records}, ties: {self.ties}, left out: {sum(self.skipped.values())}"
        )
