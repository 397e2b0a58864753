"""Finds a model's folder on disk or on the hub, and checks its files before any library reads them.

Nothing is unpickled. diffusers and transformers prefer safetensors, but read a pickle if a safetensors index names one;
they also load code shipped with the weights, adapters, and classes of other packages. A folder with any of these is
refused. Only the files that are needed are downloaded from the hub, in advance: afterwards no library contacts it.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import nn

from sipo.files import FileError, check_regular, check_safetensors, one_line, read_object

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"

HUB_TIMEOUT = 10.0
"""Seconds to wait for an answer of the hub."""

_LIBRARIES = ("diffusers", "transformers")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(?=[.-]).*(\.safetensors|\.index\..*json)")
_AUTO = re.compile("Auto(?!encoder)")  # such a class would select another one from the folder's code
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_SINGLE_FILES = (".safetensors", ".gguf", *_PICKLES)
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # files that a pipeline reads beside weights


class _Snapshot(NamedTuple):
    """A hub model in the local cache, with its commit and the names of its files if the hub has answered."""

    folder: Path
    commit: str | None
    names: list[str]


_snapshots: dict[tuple[str, str | None], _Snapshot] = {}  # by path and revision: the hub is asked once for each


def find_model_folder(path: str | Path, expected: str, index: str = MODEL_INDEX, revision: str | None = None) -> Path:
    """Finds the folder of a model: ``path`` itself, or a snapshot in the local cache with everything but the weights.

    Args:
        path: a folder, or the id of a model on the hub.
        expected: the model's class, for messages.
        index: name of the file that such a folder must have.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: neither the folder nor such a model on the hub exists, or the hub does not answer. The hub is
            asked once, and never for a path that cannot be a hub id.
        ValueError: ``path`` is a single file.
    """
    folder, model = Path(path), with_article(expected)
    if folder.is_dir():
        if not (folder / index).is_file():
            raise FileNotFoundError(f"{path}: has no {index}, expected a folder with {model}")
        return folder
    if folder.is_file():
        remedy = f"`diffusers.{expected}.from_single_file(FILE).save_pretrained(FOLDER)` makes one"
        remedy = f"; of a single-file checkpoint {remedy}" if index == MODEL_INDEX else ""
        raise ValueError(f"{path}: is a file, expected a folder with {model}{remedy}")
    if _cannot_be_hub_id(path):
        kind = "file" if str(path).endswith(_SINGLE_FILES) else "folder"
        raise FileNotFoundError(f"{path}: no such {kind}, expected a folder or hub id (owner/name) with {model}")
    key = (str(path), revision)
    if key not in _snapshots:
        _snapshots[key] = _ask_hub(str(path), revision, model, index)
    return _snapshots[key].folder


def fetch_weights(
    path: str | Path, components: Iterable[str], revision: str | None = None, variant: str | None = None
) -> None:
    """Downloads the safetensors of a hub model's components that are not in the cache.

    Args:
        path, revision: as :func:`find_model_folder` has been called with.
        components: names of subfolders; "" is the folder itself.
        variant: variant of the weights.

    Raises:
        FileNotFoundError: the hub does not answer.
    """
    snapshot = _snapshots.get((str(path), revision))
    if snapshot is None or snapshot.commit is None:
        return  # a folder, or a cached model while the hub is not available
    wanted = []
    for component in components:
        names = [name for name in snapshot.names if name.rpartition("/")[0] == component]
        wanted += [name for name in weight_files(names, variant) if name.endswith(".safetensors")]
    if wanted:
        _download(str(path), snapshot.commit, wanted)


def weight_files(names: Iterable[str], variant: str | None) -> list[str]:
    """Selects the files that hold a component's weights, and their index.

    Args:
        names: names of the files in its folder, with or without the folder.
        variant: its files are selected if there are any, else those without a variant.
    """
    weights = [name for name in sorted(names) if _WEIGHTS.fullmatch(PurePosixPath(name).name)]
    return [name for name in weights if _variant(name) == variant] or [n for n in weights if _variant(n) is None]


def check_model(folder: Path, index: Mapping[str, Any], components: Sequence[str], variant: str | None) -> None:
    """Refuses components without sound weights in safetensors, and components that would run code of the folder.

    Args:
        folder: from :func:`find_model_folder`.
        index: content of the pipeline's index: library and class of each component.
        components: those that will be loaded.
        variant: variant of the weights.

    Raises:
        FileNotFoundError: there are no weights in safetensors.
        FileError: a file is damaged or of another kind.
        ValueError: a class is of another library.
    """
    for name in components:
        entry = index.get(name)
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
        if library not in _LIBRARIES or not isinstance(class_name, str):
            expected = f"expected a class of {' or '.join(_LIBRARIES)}"
            raise ValueError(
                f"{folder}: its {name} is {class_name!r} of {library!r}, whose code is not run here: {expected}"
            )
        kind = getattr(importlib.import_module(library), class_name, None)
        if kind is None or _AUTO.match(class_name):
            raise ValueError(f"{folder}: its {name} is {class_name!r}, expected one of the classes of {library}")
        if type(kind).__name__ == "DummyObject":  # what stands in for a class that needs another package
            needed = " and ".join(sorted(kind._backends))
            raise ValueError(f"{folder}: its {name} is {with_article(class_name)}, expected {needed} installed")
        for file in sorted((folder / name).glob("*")):
            if file.exists() and not file.is_dir():
                check_regular(file)
        if is_module(library, class_name):
            check_weights(folder / name, class_name, variant)
        elif not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder / name}: no such folder, expected {with_article(class_name)}")
        elif hasattr(kind, "vocab_files_names"):
            check_tokenizer(folder / name, class_name, kind.vocab_files_names)
        else:
            parts: list[str] = getattr(kind, "get_attributes", list)()  # of a processor of images and texts
            if "tokenizer" in parts:
                check_tokenizer(folder / name, class_name)
            if "video_processor" in parts and importlib.util.find_spec("torchvision") is None:
                raise ValueError(f"{folder}: its {name} is {with_article(class_name)}, expected torchvision installed")


def with_article(name: str) -> str:
    """Returns a class's name with its article: "an" before A, E, I and O, else "a", as in "a UNet"."""
    return f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"


def is_module(library: str, class_name: str) -> bool:
    """Tells whether a component has weights."""
    kind = getattr(importlib.import_module(library), class_name, None)
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def load_module(
    folder: Path, library: str, class_name: str, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """Loads a component, in eval mode.

    Args:
        folder: the component's, checked by :func:`check_model`.
        library: "diffusers" or "transformers".
        class_name: the component's class.
        dtype: of its weights.
        variant: its weights are loaded if there are any.

    Raises:
        FileError: the weights lack a tensor, for which the library would put in random numbers.
        Exception: any error of the library.
    """
    import diffusers

    kind: Any = getattr(importlib.import_module(library), class_name)
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    options: dict[str, Any] = {"torch_dtype" if library == "diffusers" and release < (0, 40) else "dtype": dtype}
    chosen = weight_files([path.name for path in folder.iterdir()], variant)
    if variant is not None and any(_variant(name) == variant for name in chosen):
        options["variant"] = variant
    module, info = kind.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileError(f"{folder}: its weights have no {missing[0]}{others}, expected those of a whole {class_name}")
    loaded: nn.Module = module.eval()
    return loaded


def check_tokenizer(folder: Path, class_name: str, files: Mapping[str, str] | None = None) -> None:
    """Refuses a tokenizer without its vocabulary: transformers would make an empty one.

    Args:
        folder: the tokenizer's.
        class_name: for the message.
        files: ``vocab_files_names`` of its class, if the class is known.

    Raises:
        FileNotFoundError: there is no file with a vocabulary.
    """
    own = {name for kind, name in (files or {}).items() if kind in ("vocab_file", "merges_file")}
    sets = [{"tokenizer.json"}, own or {"vocab.json", "merges.txt"}]
    names = {path.name for path in folder.iterdir()}
    if not any(each <= names for each in sets) and not any(name.endswith(".model") for name in names):
        wanted = " or ".join(" and ".join(sorted(each, reverse=True)) for each in sets)
        raise FileNotFoundError(f"{folder}: has no vocabulary, expected {wanted} of {with_article(class_name)}")


def check_vocabulary(folder: Path, tokenizer: Any, vocab_size: Any) -> None:
    """Refuses a tokenizer with less than half as many tokens as its text encoder: all unknown words would be the same.

    Real ones have as many, or only the reserved ones less (T5 28, UMT5 84).

    Args:
        folder: the tokenizer's, for the message.
        tokenizer: the loaded tokenizer.
        vocab_size: value in the text encoder's configuration.

    Raises:
        FileError: the tokenizer is refused.
    """
    if isinstance(vocab_size, int) and 2 * len(tokenizer) < vocab_size:
        raise FileError(
            f"{folder}: its vocabulary has {len(tokenizer)} tokens, expected about the {vocab_size} of its text encoder"
        )


def check_weights(folder: Path, class_name: str, variant: str | None) -> None:
    """Checks every file that a library would take a component's weights from; raises as :func:`check_model`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected {with_article(class_name)}")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: has no {CONFIG}, expected {with_article(class_name)}")
    config = read_object(folder / CONFIG)
    if kernel := _hub_kernel(config):
        raise FileError(f"{folder / CONFIG}: names {kernel!r}, code of the hub, which is not run here")
    named = config.get("transformers_weights")
    if named is not None or (folder / "adapter_config.json").exists():
        adapter = "adapter_config.json" if named is None else f"transformers_weights={named!r} in its {CONFIG}"
        raise FileError(f"{folder}: has {adapter}, expected {with_article(class_name)} alone, without an adapter")
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
    """Finds code that a configuration asks transformers to load from the hub and run, for attention for example."""
    if isinstance(value, str):
        return value if key.endswith("_implementation") and "/" in value else None
    if not isinstance(value, dict):
        return None
    # Each part of a model may have an implementation of its own.
    parts = (_hub_kernel(inner, key if key.endswith("_implementation") else name) for name, inner in value.items())
    return next(filter(None, parts), None)


def _check_index(file: Path) -> None:
    """Refuses an index of shards that names anything but safetensors beside it."""
    weights = read_object(file).get("weight_map")
    if not isinstance(weights, dict):
        raise FileError(f"{file}: has no weight_map, expected the names of safetensors files")
    for name in dict.fromkeys(map(str, weights.values())):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise FileError(f"{file}: names {name!r}, expected safetensors beside it: nothing is unpickled")
        check_safetensors(file.with_name(name))


def _no_weights(folder: Path, class_name: str, names: Sequence[str]) -> str:
    """Says what a folder without weights in safetensors has in their place."""
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
    """Returns "fp16" for ``model.fp16-00001-of-00002.safetensors`` and ``model.safetensors.index.fp16.json``."""
    inner = {_SHARD.sub("", part) for part in PurePosixPath(name).name.split(".")[1:-1]} - {"safetensors", "index"}
    return inner.pop() if inner else None


# ---- The hub ----


def _cannot_be_hub_id(path: str | Path) -> bool:
    """Tells whether a path cannot be a hub id, which is a name, or an owner and a name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        return True
    try:
        validate_repo_id(path)
    except HFValidationError:
        return True
    return path.endswith(_SINGLE_FILES)


def _ask_hub(path: str, revision: str | None, model: str, index: str) -> _Snapshot:
    """Asks the hub for commit and files of a model; a model in the local cache is found without the hub."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    problem = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(path, revision=revision, timeout=HUB_TIMEOUT)
        except GatedRepoError as error:
            text = f"{path}: is gated: accept its terms on the hub, then run `hf auth login`"
            raise FileNotFoundError(text) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"{path}: the hub has no revision {revision!r} of it") from error
        except RepositoryNotFoundError:
            problem = "not found; a private one needs `hf auth login`"
        except Exception as error:  # from any version of httpx
            problem = one_line(error)
        else:
            names = [sibling.rfilename for sibling in info.siblings or []]
            if index not in names:
                raise FileNotFoundError(f"{path}: has no {index} on the hub, expected {model}")
            folder = _download(path, revision, _SMALL)  # by the revision's name, which the cache then knows
            return _Snapshot(folder, folder.name, names)
    cached = try_to_load_from_cache(path, index, revision=revision)
    if not isinstance(cached, str):
        raise FileNotFoundError(f"{path}: no such folder, and no hub id that answers ({problem}), expected {model}")
    return _Snapshot(Path(cached).parent, None, [])


def _download(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # from the hub's library, httpx or the disk
        raise FileNotFoundError(f"{path}: not downloaded from the hub: {one_line(error)}") from error
