"""Identifies a model's weights, so that a file that was replaced under the same path is noticed.

A local folder's files are identified by their hashes, which are kept in the cache so that each file is read once, and
again where its size, times or inode have changed. A hub model is identified by its commit.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sipo.cache.format import CacheError, digest, read_json, write_json
from sipo.cache.source import FileRecord, record_file, stamp
from sipo.families.base import Family
from sipo.families.config import ModelConfig
from sipo.families.model_files import CONFIG, MODEL_INDEX, weight_files

PLACE = ("pretrained_model_name_or_path", "revision", "variant")
"""Keys of a model's configuration that say where weights come from: the weights themselves stand in for them."""

RECORDS = "weights.json"
_DIGITS = 16  # of a hash that is kept as a mark
_OF_TOKENIZER = {  # beside weights and config.json what from_pretrained reads
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
_ABOUT_FILES = ("_name_or_path", "name_or_path", "_diffusers_version", "transformers_version")


def weight_hashes(
    family: Family, path: str, model: ModelConfig, cache: Path, *, network: bool, verify: bool = False
) -> dict[str, str]:
    """Identifies weights.

    Args:
        family: the model's.
        path: of the model: ``model.pretrained_model_name_or_path``, or where a toy is.
        model: gives revision and variant.
        cache: folder that hashes are kept in, in ``weights.json``.
        network: of the network that is trained; else of what encodes: VAE, text encoders and tokenizers.
        verify: read every file, also one whose size, times and inode are as they were.

    Returns:
        The first 16 hexadecimal digits of each file's SHA-256 by its path in the folder, of a configuration without
        what says where it comes from; of a hub ``path`` and ``commit``, and the variant where there is one.
    """
    folder = Path(path)
    if not folder.is_dir():
        variant = {} if model.variant is None else {"variant": model.variant}
        return {"pretrained_model_name_or_path": path, "commit": _commit(path, model.revision), **variant}
    kept = _kept(cache)
    records: dict[str, FileRecord] = {}
    used = [_used(folder, part, model.variant) for part in _parts(family, folder, network)]
    names = {name: file for files in used for name, file in files}
    doubtful = [name for name, file in names.items() if verify or kept.get(name, [])[:-1] != stamp(file)]
    with ThreadPoolExecutor(4, "hash") as pool:
        records.update(zip(doubtful, pool.map(_record, [names[name] for name in doubtful]), strict=True))
    if records and cache.is_dir():
        with contextlib.suppress(OSError):  # a read-only cache
            write_json(cache / RECORDS, kept | records)
    found = {name: records.get(name) or kept.get(name) or [] for name in sorted(names)}
    return {name: str(record[-1])[:_DIGITS] for name, record in found.items() if record}


def is_weights(name: str) -> bool:
    """Tells whether a key of a run's identity or a fingerprint names a file of a model."""
    return "/" in name


def weights_change(name: str, was: str | None, now: str | None) -> str:
    """Describes how a model's file has changed.

    Args:
        name: its path in the model's folder, with or without "model." or "reference." before it.
        was: its hash, ``None`` where there was no such file.
        now: likewise.
    """
    file = name.removeprefix("model.").removeprefix("reference.")
    if was is None:
        return f"{file} is new (hash {now}): remove that file"
    if now is None:
        return f"{file} is missing (hash {was}): restore that file"
    return f"{file} has changed (hash {was}, now {now}): restore that file"


def _kept(cache: Path) -> dict[str, FileRecord]:
    try:
        return read_json(cache / RECORDS) or {}
    except CacheError:  # it only saves time
        return {}


def _record(path: Path) -> FileRecord:
    """Records a file; a configuration by its content, so that a model that was only saved again stays the same."""
    found = record_file(path)
    if found and path.name.endswith(CONFIG):
        with contextlib.suppress(OSError, ValueError):  # what is no JSON, loading the model says better
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict):
                found[-1] = digest({key: item for key, item in value.items() if key not in _ABOUT_FILES})
    return found


def _parts(family: Family, folder: Path, network: bool) -> list[str]:
    """Returns the names of the pipeline's components, which are its subfolders."""
    if network:
        return list(family.networks)
    index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
    left_out = {*family.networks, *family._without, "scheduler"}  # noise levels are no part of what is encoded
    return [name for name, value in index.items() if isinstance(value, list) and all(value) and name not in left_out]


def _used(folder: Path, part: str, variant: str | None) -> list[tuple[str, Path]]:
    """Returns the files of a component that are read: its configuration, and the variant's weights if there are any."""
    files = [path for path in sorted((folder / part).glob("*")) if path.is_file()]
    weights = weight_files([path.name for path in files], variant)
    chosen = [path for path in files if path.name in weights]
    chosen += [path for path in files if path.name == CONFIG or path.name in _OF_TOKENIZER]
    return [(path.relative_to(folder).as_posix(), path) for path in chosen]


def _commit(path: str, revision: str | None) -> str:
    """Returns the commit of a hub model in the local cache, which opening its pipeline has brought up to date."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, MODEL_INDEX, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else "unknown"
