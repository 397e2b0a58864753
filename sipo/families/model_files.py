"""A model's folder: found on disk or on the hub, and its files checked before any library reads them.

Nothing is unpickled. diffusers and transformers look for safetensors, but read a pickle where a safetensors index names
one; they would also load code shipped with the weights, an adapter, or a class from another package. All of it is
refused here, by what the folder holds. Of a model on the hub only the files that are read are downloaded, and before
anything else: afterwards no library asks the hub anything.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import nn

from sipo.files import FileError, check_regular, check_safetensors, one_line, read_object

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Options of ``from_pretrained`` that say where a file comes from, and not how weights are read."""

HUB_TIMEOUT = 10.0
"""Seconds that the hub has to answer."""

_LIBRARIES = ("diffusers", "transformers")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(?=[.-]).*(\.safetensors|\.index\..*json)")
_AUTO = re.compile("Auto(?!encoder)")  # such a class would take another from the folder's code
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_SINGLE_FILES = (".safetensors", ".gguf", *_PICKLES)
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # what a pipeline reads beside weights


class _Found(NamedTuple):
    """Of a hub model: its snapshot in the local cache; commit and names of its files, where the hub has answered."""

    folder: Path
    commit: str | None
    names: list[str]


_found: dict[tuple[Any, ...], _Found] = {}  # the hub is asked once for each model


def find_model_folder(path: str | Path, options: Mapping[str, Any], expected: str, index: str = MODEL_INDEX) -> Path:
    """The folder of a model: ``path`` itself, or a hub id's in the local cache with all but its weights.

    Args:
        path: a folder, or the id of a model on the hub.
        options: of ``from_pretrained``; those of ``HUB_OPTIONS`` are used.
        expected: its class, for messages.
        index: the file that says that it is one.

    Raises:
        FileNotFoundError: no such folder, and no hub id that answers; after one request, and none for what can only be
            a folder.
        ValueError: a single file in place of a folder.
    """
    place = Path(path)
    if place.is_dir():
        if not (place / index).is_file():
            raise FileNotFoundError(f"{path}: has no {index}, expected a folder with {with_article(expected)}")
        return place
    if place.is_file():
        if index != MODEL_INDEX:
            raise ValueError(f"{path}: is a file, expected a folder with {with_article(expected)}")
        raise ValueError(
            f"{path}: is a file, expected a folder with {with_article(expected)}; of a single-file checkpoint "
            f"`diffusers.{expected}.from_single_file(FILE).save_pretrained(FOLDER)` makes one"
        )
    if _only_a_path(path):
        kind = "file" if str(path).endswith(_SINGLE_FILES) else "folder"
        raise FileNotFoundError(
            f"{path}: no such {kind}, expected a folder or hub id (owner/name) with {with_article(expected)}"
        )
    key = _key(path, options)
    if key not in _found:
        _found[key] = _ask(str(path), options, expected, index)
    return _found[key].folder


def fetch_weights(path: str | Path, options: Mapping[str, Any], components: Iterable[str], variant: str | None) -> None:
    """Downloads the weights of a hub model's components that are not in the cache, safetensors alone.

    Args:
        path: as for :func:`find_model_folder`, which has been called with it.
        options: likewise.
        components: names of subfolders; "" is the folder itself.
        variant: of the weights.

    Raises:
        FileNotFoundError: the hub does not answer.
    """
    found = _found.get(_key(path, options))
    if found is None or found.commit is None:
        return  # a folder, or all that the cache has
    wanted = []
    for component in components:
        names = [name for name in found.names if name.rpartition("/")[0] == component]
        wanted += [name for name in weight_files(names, variant) if name.endswith(".safetensors")]
    if wanted:
        _download(str(path), found.commit, wanted, options)


def weight_files(names: Iterable[str], variant: str | None) -> list[str]:
    """Of the files in a component's folder those that hold its weights, and their index.

    Args:
        names: with or without their folder.
        variant: whose files are taken where there are any; else those of none.
    """
    weights = [name for name in sorted(names) if _WEIGHTS.fullmatch(PurePosixPath(name).name)]
    return [name for name in weights if _variant(name) == variant] or [n for n in weights if _variant(n) is None]


def check_model(folder: Path, index: Mapping[str, Any], components: Sequence[str], variant: str | None) -> None:
    """Refuses components that hold anything but weights in safetensors, or that would run code of the folder.

    Args:
        folder: of :func:`find_model_folder`.
        index: the pipeline's, from library and class by component.
        components: those that will be loaded.
        variant: of the weights.

    Raises:
        FileNotFoundError: no weights in safetensors.
        FileError: a damaged file, or one that is something else.
        ValueError: a class of another library.
    """
    for name in components:
        entry = index.get(name)
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
        if library not in _LIBRARIES or not isinstance(class_name, str):
            raise ValueError(
                f"{folder}: its {name} is {class_name!r} of {library!r}, whose code is not run here: expected a class "
                f"of {' or '.join(_LIBRARIES)}"
            )
        kind = getattr(importlib.import_module(library), class_name, None)
        if kind is None or _AUTO.match(class_name):
            raise ValueError(f"{folder}: its {name} is {class_name!r}, expected one of the classes of {library}")
        for file in sorted((folder / name).glob("*")):
            if file.exists() and not file.is_dir():
                check_regular(file)
        if is_module(library, class_name):
            check_weights(folder / name, class_name, variant)
        elif not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name}: no such folder, expected {with_article(class_name)}")
        elif hasattr(kind, "vocab_files_names"):
            check_tokenizer(folder / name, class_name, kind.vocab_files_names)


def with_article(name: str) -> str:
    """Returns a class's name with its article: "an" before A, E, I and O, "a" before all else, as in "a UNet"."""
    return f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"


def is_module(library: str, class_name: str) -> bool:
    """Whether a component has weights."""
    kind = getattr(importlib.import_module(library), class_name, None)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def load_module(
    folder: Path, library: str, class_name: str, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """Loads a component of a folder that :func:`check_model` has let pass, in eval mode.

    Args:
        folder: the component's.
        library: "diffusers" or "transformers".
        class_name: of the component.
        dtype: of its weights.
        variant: whose weights are taken where there are any.

    Raises:
        FileError: weights that lack a tensor, in whose place there would be random numbers.
        Exception: the library's.
    """
    kind: Any = getattr(importlib.import_module(library), class_name)
    options = _typed(library, dtype)
    chosen = weight_files([path.name for path in folder.iterdir()], variant)
    if variant is not None and any(_variant(name) == variant for name in chosen):
        options["variant"] = variant
    module, found = kind.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileError(f"{folder}: its weights have no {missing[0]}{others}, expected those of a whole {class_name}")
    loaded: nn.Module = module.eval()
    return loaded


def _typed(library: str, dtype: torch.dtype) -> dict[str, Any]:
    """The type to load weights in, under the name that the installed library has for it."""
    import diffusers

    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"torch_dtype" if library == "diffusers" and release < (0, 40) else "dtype": dtype}


def check_tokenizer(folder: Path, class_name: str, files: Mapping[str, str] | None = None) -> None:
    """Refuses a tokenizer without its vocabulary, in whose place transformers makes an empty one.

    Args:
        folder: the tokenizer's.
        class_name: for the message.
        files: its class's ``vocab_files_names``, where the class is known.

    Raises:
        FileNotFoundError: no file with a vocabulary.
    """
    own = {name for kind, name in (files or {}).items() if kind in ("vocab_file", "merges_file")}
    sets = [{"tokenizer.json"}, own or {"vocab.json", "merges.txt"}]
    names = {path.name for path in folder.iterdir()}
    if not any(each <= names for each in sets) and not any(name.endswith(".model") for name in names):
        wanted = " or ".join(" and ".join(sorted(each, reverse=True)) for each in sets)
        raise FileNotFoundError(f"{folder}: has no vocabulary, expected {wanted} of {with_article(class_name)}")


def check_vocabulary(folder: Path, tokenizer: Any, vocab_size: Any) -> None:
    """Refuses a tokenizer that has less than half of the tokens of its text encoder: each unknown word is the same.

    Real ones have as many, or some that are reserved less (T5 28, UMT5 84).

    Args:
        folder: the tokenizer's, for the message.
        tokenizer: loaded.
        vocab_size: of the text encoder's configuration.

    Raises:
        FileError: it has.
    """
    if isinstance(vocab_size, int) and 2 * len(tokenizer) < vocab_size:
        raise FileError(
            f"{folder}: its vocabulary has {len(tokenizer)} tokens, expected about the {vocab_size} of its text encoder"
        )


def check_weights(folder: Path, class_name: str, variant: str | None) -> None:
    """Refuses a component as :func:`check_model` does, by every file that a library would take weights from."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected {with_article(class_name)}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: has no {CONFIG}, expected {with_article(class_name)}")
    config = read_object(folder / CONFIG)
    if kernel := _hub_kernel(config):
        raise FileError(f"{folder / CONFIG}: names {kernel!r}, code of the hub, which is not run here")
    named = config.get("transformers_weights")
    if named is not None or (folder / "adapter_config.json").exists():
        found = "adapter_config.json" if named is None else f"transformers_weights={named!r} in its {CONFIG}"
        raise FileError(f"{folder}: has {found}, expected {with_article(class_name)} alone, without an adapter")
    names = [path.name for path in folder.iterdir()]
    for name in names:
        if ".safetensors.index." in name:
            _check_index(folder / name)
    chosen = weight_files(names, variant)
    if not any(name.endswith(".safetensors") for name in chosen):
        raise FileNotFoundError(_no_weights(folder, class_name, names))
    for name in chosen:
        if name.endswith(".safetensors"):
            check_safetensors(folder / name)


def _hub_kernel(value: Any, key: str = "") -> str | None:
    """What a configuration asks transformers to load from the hub and run, as for its attention; None for nothing."""
    if isinstance(value, str):
        return value if key.endswith("_implementation") and "/" in value else None
    if not isinstance(value, dict):
        return None
    # One implementation may be named for each part of a model.
    parts = (_hub_kernel(inner, key if key.endswith("_implementation") else name) for name, inner in value.items())
    return next((found for found in parts if found), None)


def _check_index(file: Path) -> None:
    """An index of shards may name safetensors beside it, and nothing else."""
    weights = read_object(file).get("weight_map")
    if not isinstance(weights, dict):
        raise FileError(f"{file}: has no weight_map, expected the names of safetensors files")
    for name in dict.fromkeys(map(str, weights.values())):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise FileError(f"{file}: names {name!r}, expected safetensors beside it: nothing is unpickled")
        check_safetensors(file.with_name(name))


def _no_weights(folder: Path, class_name: str, names: Sequence[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return (
            f"{folder}: holds {pickles[0]}, a pickle, which is not read here, expected safetensors: where you trust "
            f"the file, `{class_name}.from_pretrained(FOLDER).save_pretrained(FOLDER)` writes them"
        )
    variants = sorted({str(_variant(name)) for name in names if _WEIGHTS.fullmatch(name)})
    if variants:
        return f"{folder}: has weights of variant {', '.join(variants)} alone, expected model.variant to name it"
    return f"{folder}: has no weights in safetensors, expected those of {with_article(class_name)}"


def _variant(name: str) -> str | None:
    """The variant: "fp16" of ``model.fp16-00001-of-00002.safetensors`` and of ``model.safetensors.index.fp16.json``."""
    inner = {_SHARD.sub("", part) for part in PurePosixPath(name).name.split(".")[1:-1]} - {"safetensors", "index"}
    return inner.pop() if inner else None


# ---- The hub ----


def _only_a_path(path: str | Path) -> bool:
    """Whether a path can be no hub id, which is a name, or an owner and a name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        return True
    try:
        validate_repo_id(path)
    except HFValidationError:
        return True
    return path.endswith(_SINGLE_FILES)


def _key(path: str | Path, options: Mapping[str, Any]) -> tuple[Any, ...]:
    return (str(path), *(str(options.get(name)) for name in HUB_OPTIONS))


def _ask(path: str, options: Mapping[str, Any], expected: str, index: str) -> _Found:
    """One request for commit and files. A model that is in the local cache needs no hub."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    revision, place = options.get("revision"), {"cache_dir": options.get("cache_dir")}
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "local files only"
    if not constants.HF_HUB_OFFLINE and not options.get("local_files_only"):
        try:
            info = HfApi(token=options.get("token")).model_info(path, revision=revision, timeout=HUB_TIMEOUT)
        except GatedRepoError as error:
            text = f"{path}: is gated: accept its terms on the hub, then run `hf auth login`"
            raise FileNotFoundError(text) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"{path}: the hub has no revision {revision!r} of it") from error
        except RepositoryNotFoundError:
            problem = "not found; a private one needs `hf auth login`"
        except Exception as error:  # httpx's, in whichever version
            problem = one_line(error)
        else:
            names = [sibling.rfilename for sibling in info.siblings or []]
            if index not in names:
                raise FileNotFoundError(f"{path}: has no {index} on the hub, expected {with_article(expected)}")
            folder = _download(path, revision, _SMALL, options)  # by the revision's name, which is kept for later
            return _Found(folder, folder.name, names)
    cached = try_to_load_from_cache(path, index, revision=revision, **place)
    if not isinstance(cached, str):
        raise FileNotFoundError(
            f"{path}: no such folder, and no hub id that answers ({problem}), expected {with_article(expected)}"
        )
    return _Found(Path(cached).parent, None, [])


def _download(path: str, revision: str | None, patterns: Sequence[str], options: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    place = {name: options[name] for name in HUB_OPTIONS if name in options and name != "revision"}
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns), **place))
    except Exception as error:  # of the hub's, of httpx, of the disk
        raise FileNotFoundError(f"{path}: not downloaded from the hub: {one_line(error)}") from error
