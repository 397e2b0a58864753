"""The files of a cache of latents and text embeddings: how they are written, checked and read.

A cache is a folder. A shard is a safetensors file with a JSON file of the same name beside it:

    latents-00000.safetensors   <row>.chosen, <row>.rejected, <row>.own.<name> (both samples'), <row>.image.<name> (of
                                the condition image) and <row>.error_mask of some of the pairs
    text-00000.safetensors      <key>.<name> for the prompts that no earlier shard has, or for these pairs where text
                                depends on the condition image; trailing rows of zeros left out;
                                of ragged tensors (batch.py) every row is kept
    unconditional.safetensors   <name> of what caption dropout puts in a prompt's place
    index.json                  what the content depends on, and the size, hash and content of every shard
    files.json                  names of the source's files, and a digest of their sizes and times
    weights.json                hashes of the model's files, so that each is read once (weights.py)
    references/                 errors of the reference (reference_errors.py)

The JSON file of a shard of latents also has the rows and the files that it was made of (changes.py); the index, which
is read at every start, has one digest of them for each shard.

Each JSON file begins with the hash of its name and of the rest of it, so that damage is found. Each file is written
under another name and renamed, the index's ``complete`` comes last, and a row's content depends on the row and the
settings alone. So a cache that was interrupted is continued where it stopped, and of a damaged one only the damaged
shards are replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sipo.files import FileError, file_hash, parse_json, read_text, save_tensors, write_aside

# Changes whenever the layout of the files changes, or how pixels and text are encoded.
FORMAT = 8
INDEX = "index.json"
FILES = "files.json"
LATENTS, TEXT, UNCONDITIONAL = "latents", "text", "unconditional"

_SEAL = '{"sha256_below": "%s", '  # a JSON file's begin
_OPEN_SHARDS = 32  # that a process keeps open: there may be more shards than file handles
REMEDY = "`sipo precompute` rebuilds it"


class CacheError(ValueError):
    """A cache that is absent, unfinished, damaged or of other settings, in one line that names file or setting."""


class DamagedError(CacheError):
    """A file of a cache that is missing, cut short or changed: precomputing again replaces it, and nothing else."""


class OtherSettingsError(CacheError):
    """A cache of other settings or weights, sound in itself."""


@dataclass(frozen=True)
class Shard:
    """One file of tensors.

    Attributes:
        name: without the ending.
        bytes: size of the file.
        sha256: of the file, in hexadecimal.
        facts: what its writer says about the content; JSON values.
    """

    name: str
    bytes: int
    sha256: str
    facts: dict[str, Any]

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.safetensors"

    def as_dict(self) -> dict[str, Any]:
        """Returns the shard as JSON values."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, **self.facts}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Shard:
        """Makes a shard from the JSON values of :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: not a shard's.
        """
        facts = {key: value for key, value in entry.items() if key not in ("file", "bytes", "sha256")}
        return cls(str(entry["file"]).removesuffix(".safetensors"), int(entry["bytes"]), str(entry["sha256"]), facts)


def shard_name(kind: str, number: int) -> str:
    """Names a shard: ``latents-00000``."""
    return f"{kind}-{number:05d}"


def digest(value: Any) -> str:
    """Hashes a JSON value with SHA-256; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes a JSON object, preceded by its hash, under another name and renames it.

    Args:
        path: of the file.
        value: not empty.
        indent: ``None`` for what is as large as the data set.
    """
    rest = json.dumps(value, indent=indent)[1:] + "\n"
    write_aside(path, _seal(path, rest) + rest)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads what :func:`write_json` wrote; ``None`` if there is no such file.

    Raises:
        DamagedError: a file that cannot be read, or is not as it was written.
        CacheError: a file of another format.
    """
    try:
        text = read_text(path)
        value = parse_json(text, path)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise DamagedError(f"{error}; {REMEDY}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: holds {type(value).__name__}, expected an object; {REMEDY}")
    hashed = value.pop("sha256_below", None)
    begin = _SEAL % hashed
    sealed = begin == _seal(path, text[len(begin) :])
    if path.name == INDEX and value.get("format") != FORMAT and (sealed or hashed is None):
        raise CacheError(
            f"{path}: cache format {value.get('format')!r}, expected {FORMAT}: it was written by another version of "
            "sipo; use another folder, or delete this one, and the pairs are encoded again"
        )
    if not sealed:
        raise DamagedError(f"{path}: not as it was written (its SHA-256 is another); {REMEDY}")
    return value


def _seal(path: Path, rest: str) -> str:
    """Gives the start of a JSON file: the hash of its name, so that no other passes for it, and of its rest."""
    return _SEAL % hashlib.sha256(f"{path.name} {rest}".encode()).hexdigest()


class ShardFolder:
    """A folder of shards with an index, as they are written and checked.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Shard:
        """Writes a file of tensors and then its JSON file.

        Args:
            name: without an ending.
            tensors: any types and devices.
            facts: JSON values that go into the JSON file.
        """
        path = self.path / f"{name}.safetensors"
        # Copies: safetensors refuses tensors that share memory, as the two samples of a pair do.
        save_tensors(path, {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()})
        shard = Shard(name, path.stat().st_size, file_hash(path), facts)
        self.write_facts(shard)
        return shard

    def write_facts(self, shard: Shard) -> None:
        """Writes a shard's JSON file alone."""
        write_json(self.path / f"{shard.name}.json", shard.as_dict())

    def read(self, name: str) -> Shard | None:
        """Reads a shard's JSON file, not its tensors; ``None`` if there is none that can be read."""
        try:
            shard = Shard.from_dict(read_json(self.path / f"{name}.json") or {})
        except (CacheError, KeyError, TypeError):
            return None
        return shard if shard.name == name else None  # not another shard's, renamed

    def read_intact(self, name: str) -> Shard | None:
        """Reads a shard's JSON file; ``None`` unless the file of tensors has the size and hash given there."""
        shard = self.read(name)
        if shard is None:
            return None
        path = self.path / shard.file
        try:
            whole = path.stat().st_size == shard.bytes and file_hash(path) == shard.sha256
        except (OSError, FileError):  # none there, or one that cannot be read
            return None
        return shard if whole else None

    def require(self, name: str) -> Shard:
        """Reads the JSON file of a shard that must be there.

        Raises:
            DamagedError: it is missing or cannot be read.
        """
        shard = self.read(name)
        if shard is None:
            raise DamagedError(
                f"{self.path / name}.json: missing or damaged; {REMEDY} (of several processes, all must see one folder)"
            )
        return shard

    def check_sizes(self, shards: Iterable[Shard]) -> None:
        """Compares the size of each file with what is known of it.

        Raises:
            DamagedError: the first file that is absent or of another size.
        """
        for shard in shards:
            path = self.path / shard.file
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found} bytes, expected {shard.bytes}"
                raise DamagedError(f"{path}: {what}; {REMEDY}")

    def remove_beyond(self, kinds: Sequence[str], count: int) -> None:
        """Removes all but the first ``count`` shards of each kind: those of a source that was longer."""
        for path in self.path.iterdir():
            kind, _, number = path.name.partition(".")[0].rpartition("-")
            if kind in kinds and number.isdecimal() and int(number) >= count:
                path.unlink()

    def read_index(self) -> dict[str, Any] | None:
        """Reads the index, finished or not; ``None`` if there is none.

        Raises:
            CacheError: not an index, or one of another format.
        """
        index = read_json(self.path / INDEX)
        if index is not None and not {"fingerprint", "complete"} <= index.keys():
            raise DamagedError(f"{self.path / INDEX}: not an index of a cache; {REMEDY}")
        return index

    def write_index(self, fingerprint: Mapping[str, Any], content: Mapping[str, Any], *, complete: bool) -> None:
        """Writes the index.

        Args:
            fingerprint: what the content of the folder depends on.
            content: further JSON values.
            complete: whether all shards are written; nothing reads a folder that is not complete.
        """
        index = {"format": FORMAT, "complete": complete, "fingerprint": fingerprint, **content}
        write_json(self.path / INDEX, index, indent=None if complete and LATENTS in content else 1)


class ShardReader:
    """Reads tensors of shards, which it opens when first needed and maps into memory; may be sent to other processes.

    Each process reads a shard once, before it uses its first tensor, and compares its hash.

    Args:
        folder: where the shards are.
        shards: all of them.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.shards = {shard.name: shard for shard in shards}
        self._checked: dict[str, tuple[int, ...]] = {}  # by name, the file as it was when it was compared
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": {}, "_open": OrderedDict()}

    def tensor(self, name: str, key: str) -> Tensor:
        """Reads a tensor of a shard, on the CPU; it must not be written to.

        Raises:
            CacheError: the shard is absent, damaged, or has no such tensor.
        """
        try:
            return self._file(name).get_tensor(key)
        except SafetensorError as error:
            raise DamagedError(f"{self._path(name)}: no tensor {key!r}; {REMEDY}") from error

    def _file(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path, shard = self._path(name), self.shards[name]
        try:
            if self._checked.get(name) != _identity(path):
                self._check(path, shard)
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path}: not readable ({' '.join(str(error).split())}); {REMEDY}") from error
        self._open[name] = file
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return file

    def _check(self, path: Path, shard: Shard) -> None:
        """Compares a file's hash; also finds a file that another run has written since it was last open."""
        before, found = _identity(path), None if not path.is_file() else file_hash(path)
        if found != shard.sha256:
            now = ShardFolder(self.folder).read(shard.name)
            if found is not None and now is not None and now.sha256 == found:
                raise CacheError(
                    f"{path}: encoded again by another run since this one opened the cache, expected one data set to a "
                    "cache: give each its own data.cache"
                )
            ShardFolder(self.folder).check_sizes([shard])
            raise DamagedError(f"{path}: changed since it was written (its SHA-256 is another); {REMEDY}")
        self._checked[shard.name] = before

    def _path(self, name: str) -> Path:
        return self.folder / self.shards[name].file


def _identity(path: Path) -> tuple[int, ...]:
    """Gives what differs once a file has been replaced; empty if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def text_key(prompt: str) -> str:
    """Gives the key of a prompt's embeddings: 128 bits of its SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def trim(tensor: Tensor) -> Tensor:
    """Removes the rows at the end of a sequence ``[L, ...]`` that are all zeros (+0).

    :func:`sipo.batch.padded` undoes it.
    """
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    filled = ((tensor != 0) | torch.signbit(tensor)).flatten(1).any(1).nonzero()
    return tensor[: int(filled[-1]) + 1 if len(filled) else 0]
