"""The cache of latents and text embeddings: its files, how they are written, and how they are read.

A cache is a folder. A shard is a safetensors file with a JSON file of the same name beside it:

    latents-00000.safetensors   <row>.chosen, <row>.rejected and <row>.own.<name> (both halves') of some of the pairs
    text-00000.safetensors      <key>.<name> for the prompts that no earlier shard has; trailing rows of zeros left out
    unconditional.safetensors   <name> of what caption dropout puts in a prompt's place
    index.json                  what the content depends on, and the size, hash and content of every shard
    files.json                  names of the source's files, and a digest of their sizes and times
    weights.json                hashes of the model's files, so that each is read once (weights.py)
    references/                 errors of the reference (references.py)

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sipo.families.base import Condition
from sipo.files import FileError, file_hash, parse_json, read_text, save_tensors, write_aside

# Changes whenever the layout of the files changes, or how pixels and text are encoded.
FORMAT = 4
INDEX = "index.json"
FILES = "files.json"
LATENTS, TEXT, UNCONDITIONAL = "latents", "text", "unconditional"
MAX_PAIRS = "data.max_pairs"  # in a fingerprint


_WHOLE = {"path", "state", "pairs", "records", "ties", "skipped", "text_shapes", "text", "latents"}  # in an index
_SEAL = '{"sha256_below": "%s", '  # a JSON file's begin
_OPEN_SHARDS = 32  # that a process keeps open: there may be more shards than file handles
_REMEDY = "`sipo precompute` rebuilds it"


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
        """For JSON."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, **self.facts}


def shard_name(kind: str, number: int) -> str:
    """``latents-00000``."""
    return f"{kind}-{number:05d}"


def text_key(prompt: str) -> str:
    """What a prompt's embeddings are stored under: 128 bits of its SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes a JSON object aside, its hash before it, and renames it.

    Args:
        path: of the file.
        value: not empty.
        indent: ``None`` for what is as large as the data set.
    """
    rest = json.dumps(value, indent=indent)[1:] + "\n"
    write_aside(path, _seal(path, rest) + rest)


def read_json(path: Path) -> dict[str, Any] | None:
    """What :func:`write_json` wrote; ``None`` where there is no such file.

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
        raise DamagedError(f"{error}; {_REMEDY}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path}: holds {type(value).__name__}, expected an object; {_REMEDY}")
    hashed = value.pop("sha256_below", None)
    begin = _SEAL % hashed
    sealed = begin == _seal(path, text[len(begin) :])
    if path.name == INDEX and value.get("format") != FORMAT and (sealed or hashed is None):
        raise CacheError(
            f"{path}: cache format {value.get('format')!r}, expected {FORMAT}: it was written by another version of "
            "sipo; use another folder, or delete this one, and the pairs are encoded anew"
        )
    if not sealed:
        raise DamagedError(f"{path}: not as it was written (its SHA-256 is another); {_REMEDY}")
    return value


def _seal(path: Path, rest: str) -> str:
    """What a JSON file begins with: the hash of its name, so that no other is taken for it, and of the rest of it."""
    return _SEAL % hashlib.sha256(f"{path.name} {rest}".encode()).hexdigest()


def write_shard(folder: Path, name: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Shard:
    """Writes a file of tensors and then its JSON file.

    Args:
        folder: the cache's; exists.
        name: without an ending.
        tensors: any types and devices.
        facts: JSON values that go into the JSON file.
    """
    path = folder / f"{name}.safetensors"
    # Copies: safetensors refuses tensors that share memory, as a pair's two halves do.
    save_tensors(path, {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()})
    shard = Shard(name, path.stat().st_size, file_hash(path), facts)
    write_json(folder / f"{name}.json", shard.as_dict())
    return shard


def remove_shards(folder: Path, kinds: Sequence[str], count: int) -> None:
    """Removes shards beyond the first so many of each kind, which a longer source had."""
    for path in folder.iterdir():
        kind, _, number = path.name.partition(".")[0].rpartition("-")
        if kind in kinds and number.isdecimal() and int(number) >= count:
            path.unlink()


def read_shard(folder: Path, name: str) -> Shard | None:
    """What a shard's JSON file says; ``None`` if there is none that can be read. The tensors are not looked at."""
    try:
        shard = _as_shard(read_json(folder / f"{name}.json"))
    except CacheError:
        return None
    return shard if shard is not None and shard.name == name else None  # not another's, renamed


def intact_shard(folder: Path, name: str) -> Shard | None:
    """The shard if it is there with the size and hash that its JSON file gives."""
    shard = read_shard(folder, name)
    if shard is None:
        return None
    path = folder / shard.file
    try:
        whole = path.stat().st_size == shard.bytes and file_hash(path) == shard.sha256
    except (OSError, FileError):  # none there, or one that cannot be read
        return None
    return shard if whole else None


def check_sizes(folder: Path, shards: Sequence[Shard]) -> None:
    """Compares every file's size with what is known of it.

    Raises:
        CacheError: the first file that is absent or of another size.
    """
    for shard in shards:
        path = folder / shard.file
        found = path.stat().st_size if path.is_file() else None
        if found != shard.bytes:
            what = "is missing" if found is None else f"has {found} bytes, expected {shard.bytes}"
            raise DamagedError(f"{path}: {what}; {_REMEDY}")


def check_fingerprint(where: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares what a content depends on.

    Raises:
        OtherSettingsError: the first key, in the order of ``wanted``, that differs, with both values.
    """
    from sipo.cache.weights import is_weights, weights_change

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


def other_path(where: Path, found: Any, wanted: str, why: str) -> CacheError:
    """The error of a cache of another ``data.dataset_name``, whose pairs are other ones or cannot be compared."""
    return CacheError(
        f"{where}: made with data.dataset_name={json.dumps(found)}, this run has {json.dumps(wanted)}, {why}: use "
        "another "
        "data.cache, or the path it was made with"
    )


def trim(tensor: Tensor) -> Tensor:
    """A sequence ``[L, ...]`` without its last rows, as far as they are all zeros (+0); :func:`pad` undoes it."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    filled = ((tensor != 0) | torch.signbit(tensor)).flatten(1).any(1).nonzero()
    return tensor[: int(filled[-1]) + 1 if len(filled) else 0]


def pad(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of zeros up to ``shape``."""
    if tensor.ndim < 2 or tensor.shape[0] == shape[0]:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.shape[0], *tensor.shape[1:])])


class ShardReader:
    """Tensors of shards, opened when first asked for and mapped rather than read; may be sent to another process.

    Args:
        folder: where the shards are.
        shards: all of them.
        check_hashes: read a shard once in each process, before its first tensor is used, and compare its hash.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], check_hashes: bool = True) -> None:
        self.folder = folder
        self.shards = {shard.name: shard for shard in shards}
        self.check_hashes = check_hashes
        self._checked: dict[str, tuple[int, ...]] = {}  # by name, the file as it was when it was compared
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": {}, "_open": OrderedDict()}

    def tensor(self, name: str, key: str) -> Tensor:
        """A tensor of a shard, on the CPU; not to be written to.

        Raises:
            CacheError: the shard is absent, damaged, or has no such tensor.
        """
        try:
            return self._file(name).get_tensor(key)
        except SafetensorError as error:
            raise DamagedError(f"{self._path(name)}: no tensor {key!r}; {_REMEDY}") from error

    def _file(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path, shard = self._path(name), self.shards[name]
        try:
            if self.check_hashes and self._checked.get(name) != _identity(path):
                self._check(path, shard)
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path}: not readable ({' '.join(str(error).split())}); {_REMEDY}") from error
        self._open[name] = file
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return file

    def _check(self, path: Path, shard: Shard) -> None:
        """Compares a file's hash, also of one that was closed meanwhile and written by another run."""
        before, found = _identity(path), None if not path.is_file() else file_hash(path)
        if found != shard.sha256:
            now = read_shard(self.folder, shard.name)
            if found is not None and now is not None and now.sha256 == found:
                raise CacheError(
                    f"{path}: encoded anew by another run since this one opened the cache, expected one data set to a "
                    "cache: give each its own data.cache"
                )
            check_sizes(self.folder, [shard])
            raise DamagedError(f"{path}: changed since it was written (its SHA-256 is another); {_REMEDY}")
        self._checked[shard.name] = before

    def _path(self, name: str) -> Path:
        return self.folder / self.shards[name].file


def _identity(path: Path) -> tuple[int, ...]:
    """What is another where a file has been replaced; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Cache:
    """A finished cache, for reading: ``N`` pairs in the order of their rows. Made by :func:`open_cache`.

    Attributes:
        folder: where it is.
        fingerprint: what its content depends on.
        path: ``data.dataset_name`` of its pairs, as it was when they were last compared.
        skipped: by reason, how many pairs were left out because they could not be used.
        rows: ``[N]`` int64, each pair's row in the source.
        shapes: the shapes that latents have.
        shape_of: ``[N]`` int64, each pair's place in ``shapes``.
        prompt_keys: one for each distinct prompt (:func:`text_key`).
        prompt_of: ``[N]`` int64, each pair's place in ``prompt_keys``.
        shard_of: ``[N]`` int64, each pair's place in ``latents``.
        latents: the shards of latents, by number.
    """

    def __init__(self, folder: Path, index: dict[str, Any], check_hashes: bool = True) -> None:
        self.folder = folder
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.path: str = index["path"]
        self.skipped: dict[str, int] = index["skipped"]
        latents = [shard_from_entry(entry) for entry in index["latents"]]
        text = [shard_from_entry(entry) for entry in index["text"]]
        # All of this is copied into every worker process: pairs in tensors, and no facts that nobody asks for again.
        self.latents = [replace(shard, facts={"own": shard.facts["own"]}) for shard in latents]
        self._reader = ShardReader(folder, [*self.latents, *(replace(shard, facts={}) for shard in text)], check_hashes)
        self._text_shapes: dict[str, list[int]] = index["text_shapes"]
        self.prompt_keys = [key for shard in text for key in shard.facts["prompts"]]
        self._text_names = [shard.name for shard in text]
        self._text_shard_of = torch.tensor([n for n, shard in enumerate(text) for _ in shard.facts["prompts"]])
        place_of_text = {key: n for n, key in enumerate(self.prompt_keys)}
        place_of_shape: dict[tuple[int, ...], int] = {}
        table = [
            (row, n, place_of_text[key], place_of_shape.setdefault(tuple(shape), len(place_of_shape)))
            for n, shard in enumerate(latents)
            for row, key, shape in shard.facts["pairs"]
        ]
        columns = torch.tensor(table).reshape(-1, 4).unbind(1)
        self.rows, self.shard_of, self.prompt_of, self.shape_of = (column.clone() for column in columns)
        self.shapes = list(place_of_shape)
        self._starts = [0, *accumulate(len(shard.facts["pairs"]) for shard in latents)]

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> tuple[Tensor, Tensor, Condition]:
        """Chosen sample's and rejected sample's latents as stored, and what each is told beside its prompt, ``[2, "
        "...]`` by name."""
        shard, row = self.latents[int(self.shard_of[index])], int(self.rows[index])
        own = {name: self._reader.tensor(shard.name, f"{row}.own.{name}") for name in shard.facts["own"]}
        chosen, rejected = (self._reader.tensor(shard.name, f"{row}.{half}") for half in ("chosen", "rejected"))
        return chosen, rejected, own

    def text(self, index: int) -> Condition:
        """The text embeddings of a pair's prompt, in their full length."""
        place = int(self.prompt_of[index])
        return self._text(self._text_names[int(self._text_shard_of[place])], f"{self.prompt_keys[place]}.")

    def unconditional(self) -> Condition:
        """The text embeddings that stand for no prompt."""
        return self._text(UNCONDITIONAL, "")

    def shard_places(self, number: int) -> range:
        """Where in the cache the pairs of a shard of latents are."""
        return range(self._starts[number], self._starts[number + 1])

    def shard_digest(self, number: int) -> str:
        """What everything computed from one shard of latents depends on: its bytes, and which prompt is whose."""
        places = self.shard_places(number)
        prompts = self.prompt_of[places.start : places.stop]
        used = self._text_shard_of[prompts].unique().tolist()
        names = [self.latents[number].name, UNCONDITIONAL, *(self._text_names[n] for n in used)]
        return digest([[self._reader.shards[name].sha256 for name in names], self._pairs(places.start, places.stop)])

    def content_hash(self) -> str:
        """Of all that training reads: tensors, rows and prompts; not of where and when they were encoded."""
        shards = {name: shard.sha256 for name, shard in self._reader.shards.items()}
        return digest([shards, self._pairs(0, len(self))])

    def _pairs(self, start: int, stop: int) -> list[tuple[int, str]]:
        """Rows and prompts' keys."""
        prompts = self.prompt_of[start:stop].tolist()
        return [(row, self.prompt_keys[n]) for row, n in zip(self.rows[start:stop].tolist(), prompts, strict=True)]

    def _text(self, shard: str, prefix: str) -> Condition:
        return {
            name: pad(self._reader.tensor(shard, f"{prefix}{name}"), shape) for name, shape in self._text_shapes.items()
        }


def open_cache(folder: str | Path, fingerprint: Mapping[str, Any] | None = None, *, check_hashes: bool = True) -> Cache:
    """Opens a cache for reading, after checking its index and the size of each of its files.

    Args:
        folder: the cache's.
        fingerprint: what its content is expected to depend on (:func:`sipo.cache.precompute.fingerprint`);
            ``None`` takes it as it is.
        check_hashes: compare each shard's hash too, when a process first uses it.

    Raises:
        CacheError: no cache, an unfinished one, one of other settings, a file cut short.
    """
    folder = Path(folder)
    index = read_pairs_index(folder, fingerprint)
    if index is None:
        raise CacheError(f"{folder}: no cache there, expected {INDEX}; `sipo precompute` makes one")
    if not index["complete"]:
        raise CacheError(f"{folder}: a cache that is not finished; `sipo precompute` goes on where it stopped")
    try:
        cache = Cache(folder, index, check_hashes)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"not a whole index ({type(error).__name__}: {error})"
        raise DamagedError(f"{folder / INDEX}: {problem}; {_REMEDY}") from error
    check_sizes(folder, list(cache._reader.shards.values()))
    return cache


def pairs_are_whole(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a finished cache of these settings is there, with every file of the size that it should have."""
    try:
        index = read_pairs_index(folder, fingerprint)
        if index is None or not index["complete"]:
            return False
        check_sizes(folder, [shard_from_entry(entry) for entry in (*index["latents"], *index["text"])])
    except (CacheError, KeyError, TypeError):
        return False
    return True


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index, finished or not; ``None`` where there is none.

    Raises:
        CacheError: not an index, or one of another format.
    """
    index = read_json(folder / INDEX)
    if index is not None and not {"fingerprint", "complete"} <= index.keys():
        raise DamagedError(f"{folder / INDEX}: not an index of a cache; {_REMEDY}")
    return index


def read_pairs_index(folder: Path, fingerprint: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The same of pairs, compared with what they are expected to depend on.

    Raises:
        CacheError: as for :func:`read_index`, or a cache of other settings. One that is not finished may take another
            ``data.max_pairs``, on which no pair's content depends.
    """
    index = read_index(folder)
    if index is None:
        return None
    if fingerprint is not None:
        found = index["fingerprint"]
        if not index["complete"] and MAX_PAIRS in fingerprint:
            found = found | {MAX_PAIRS: fingerprint[MAX_PAIRS]}
        check_fingerprint(folder, found, fingerprint)
    missing = sorted((_WHOLE if index["complete"] else {"path"}) - index.keys())
    if missing:
        raise DamagedError(f"{folder / INDEX}: not a whole index, {missing[0]!r} is missing; {_REMEDY}")
    return index


def _as_shard(entry: dict[str, Any] | None) -> Shard | None:
    try:
        return None if entry is None else shard_from_entry(entry)
    except (KeyError, TypeError):
        return None


def shard_from_entry(entry: dict[str, Any]) -> Shard:
    """Undoes :meth:`Shard.as_dict`."""
    facts = {key: value for key, value in entry.items() if key not in ("file", "bytes", "sha256")}
    return Shard(str(entry["file"]).removesuffix(".safetensors"), int(entry["bytes"]), str(entry["sha256"]), facts)
