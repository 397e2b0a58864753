"""Prepares networks for training, makes references from them, and saves and loads trained weights."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sipo.families.base import Family
from sipo.families.config import LoraConfig
from sipo.families.lora_files import Adapter, read_adapter, scaled, write_adapter
from sipo.families.network import evaluating, inner_network
from sipo.files import aside, load_tensors
from sipo.processes import is_out_of_memory

ADAPTER = "default"
"""Name of the adapter inside the network, which is peft's default."""

# Modules that consist of one operator that autocast runs in lower precision.
_AUTOCAST = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def prepare_lora(
    network: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str],
    gradient_checkpointing: bool = False,
) -> None:
    """Freezes a diffusers network and adds a LoRA adapter, whose weights alone are trained, in float32.

    The adapter is zero at first, so predictions do not change; its first factor is drawn from torch's global generator.

    Args:
        network: in any dtype.
        rank: rank of the adapter, at least 1.
        alpha: the adapter is scaled by ``alpha / rank``; ``None`` is ``rank``.
        dropout: dropout of the adapter's input, in training.
        target_modules: names, or last parts of names, of linear layers and convolutions.
        gradient_checkpointing: whether to trade time for memory in the backward pass.

    Raises:
        TypeError, ValueError: rank, alpha or dropout is not as it should be, or a target matches no such module.
    """
    import peft
    from diffusers.training_utils import cast_training_params

    LoraConfig(rank, alpha, dropout)  # refuses values that no adapter can have
    check_targets(network, target_modules)
    network.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type] # declared int, and only divided
        lora_dropout=dropout,
        target_modules=list(target_modules),
    )
    network.add_adapter(config, ADAPTER)  # type: ignore[operator] # diffusers' PeftAdapterMixin
    cast_training_params(network, torch.float32)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator] # diffusers' ModelMixin


def prepare_full(network: nn.Module, *, gradient_checkpointing: bool = False) -> None:
    """Makes all weights of a diffusers network trainable, in float32 (the training loop does mixed precision)."""
    # diffusers' own to() warns that a cast rounds modules kept in float32, even if the cast is to float32.
    nn.Module.to(network, torch.float32).requires_grad_(True)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator] # diffusers' ModelMixin


def freeze(network: nn.Module) -> nn.Module:
    """Makes a network a reference: not trainable, in eval mode."""
    return network.requires_grad_(False).eval()


def frozen_copy(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes a frozen copy whose predictions equal those of ``network`` under ``torch.autocast(dtype=dtype)`` bitwise.

    Autocast rounds the weights of linear layers and convolutions before it multiplies by them, so the copy holds only
    these rounded. Norms, embeddings, tables and buffers keep their dtype, because autocast does not round them. Biases,
    which it does round, are kept too, being small, as are weights that another kind of module or a subclass also holds
    (an embedding tied to the last layer).

    Networks in which a module turns autocast off and multiplies by a linear layer's weight cannot be copied so.

    Args:
        network: in float32, or in any dtype without ``dtype``.
        dtype: dtype of autocast; ``None`` rounds nothing.

    Returns:
        A network that shares no tensor with the first.
    """
    # Parameters in the memo are not copied: a large network is never in memory twice in float32.
    rounded: dict[int, Any] = {}
    if dtype is not None:
        modules = list(network.modules())
        others = (module for module in modules if type(module) not in _AUTOCAST)
        kept = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
        for module in modules:
            weight = module._parameters.get("weight") if type(module) in _AUTOCAST else None
            if weight is not None and id(weight) not in kept:
                rounded[id(weight)] = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
    return freeze(copy.deepcopy(network, rounded))


class adapter_off:  # noqa: N801 (used like a function, as contextlib.suppress is)
    """Turns a network's adapter off inside the context, in eval mode: the network is then the reference.

    Afterwards, even after an error, the adapter, ``requires_grad`` and the mode of every module are restored. Autograd
    graphs made before stay valid. A context may be entered repeatedly, but not nested: listing the modules of a large
    network takes a while.

    Args:
        network: wrapped or not, prepared by :func:`prepare_lora`.

    Raises:
        ValueError: the network has no adapter.
    """

    reusable = True

    def __init__(self, network: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._modules = list(network.modules())
        self._layers: list[Any] = [module for module in self._modules if isinstance(module, BaseTunerLayer)]
        if not self._layers:
            name = type(inner_network(network)).__name__
            raise ValueError(f"{name} has no adapter to turn off: expected prepare_lora's")

    def __enter__(self) -> None:
        self._before = [layer._disable_adapters for layer in self._layers]
        self._direct: list[dict[str, Any]] = []
        self._evaluating = evaluating(self._modules)
        self._evaluating.__enter__()
        try:
            self._turn_off()
        except BaseException:
            self.__exit__()
            raise

    def _turn_off(self) -> None:
        for layer in self._layers:
            # Set directly: peft's enable_adapters() also switches requires_grad of every weight of the adapter, which
            # takes longer than everything else here.
            layer._disable_adapters = True
            # A disabled layer first checks several cases, in 30 of a small layer's 100 microseconds, so its base layer
            # is called directly, unless its forward has been replaced (by accelerate's hooks).
            if "forward" not in layer.__dict__ and not layer.merged:
                layer.__dict__["forward"] = layer.base_layer.__call__
                self._direct.append(layer.__dict__)
        if not self._layers[0].disable_adapters:
            raise RuntimeError("the adapter stayed on: expected a peft whose layers have _disable_adapters")

    def __exit__(self, *error: Any) -> None:
        for attributes in self._direct:
            del attributes["forward"]
        for layer, disabled in zip(self._layers, self._before, strict=True):
            layer._disable_adapters = disabled
        self._evaluating.__exit__(None, None, None)


def save_lora(
    family: Family, network: nn.Module, folder: str | Path, *, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes the adapter as ``pytorch_lora_weights.safetensors``, for ``pipeline.load_lora_weights(folder)``.

    The second of two experts has its file in a subfolder of its name (:func:`lora_file`).
    The scale alpha / rank is multiplied into the weights (``lora_files.py`` says why).

    Args:
        family: the network's family.
        network: wrapped or not, prepared by :func:`prepare_lora`.
        folder: created if it is missing; the file is written aside and renamed.
        state: the network's tensors by name, if the network itself holds only a part of them (FSDP).

    Returns:
        The path of the file; of the first network's, if there are several.
    """
    from peft.utils import get_peft_model_state_dict

    inner = inner_network(network)
    if not hasattr(inner, "peft_config"):
        raise ValueError(f"{type(inner).__name__} has no adapter to save: expected prepare_lora's")
    for name, part in family.networks_in(inner).items():
        layers = get_peft_model_state_dict(part, state_dict=_part_of(state, family, name), adapter_name=ADAPTER)
        config = inner.peft_config[ADAPTER]
        options = {"target_modules": config.target_modules, "dropout": config.lora_dropout}
        adapter = Adapter.of_tensors(layers, config.lora_alpha / config.r, **options)
        file = lora_file(family, folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(family, adapter, file)
    return lora_file(family, folder, family.network)


def lora_file(family: Family, folder: str | Path, name: str) -> Path:
    """Returns the file of one network's adapter: in the folder itself, or in a subfolder for an expert at low noise."""
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

    return Path(folder) / ("" if name == family.network else name) / LORA_WEIGHT_NAME_SAFE


def _part_of(state: Mapping[str, Tensor] | None, family: Family, name: str) -> dict[str, Tensor] | None:
    """Returns the tensors of one of a family's networks."""
    if state is None:
        return None
    start = f"{name}." if family.experts else ""
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}


def save_full(
    family: Family, network: nn.Module, folder: str | Path, *, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes all weights of a network without adapters to ``folder/<family.network>/``, as diffusers does.

    ``Network.from_pretrained(folder, subfolder=family.network)`` loads them. Arguments are as for :func:`save_lora`.

    Returns:
        The path of the component's folder.
    """
    import diffusers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = family.networks_in(inner_network(network))
    for name, whole in parts.items():
        tensors = _part_of(state, family, name)
        if tensors is not None:  # an empty network of the original class takes the gathered tensors
            with torch.device("meta"):
                whole = getattr(diffusers, family.network_class).from_config(whole.config)
            whole.load_state_dict(tensors, assign=True)
        with aside(folder / name, durable=True) as place:
            whole.save_pretrained(place, safe_serialization=True)
    return folder / family.network


def load_saved(family: Family, network: nn.Module, folder: str | Path) -> None:
    """Loads weights of :func:`save_lora` or :func:`save_full` into a network that is prepared for training.

    An adapter keeps the strength it had when it was saved, for any alpha of the network. Its second factors are exact
    up to float32 rounding, because alpha / rank was multiplied in and is divided out; exact if it is a power of two.

    Args:
        family: the network's family.
        network: prepared by :func:`prepare_lora`, with the same rank and targets, or by :func:`prepare_full`.
        folder: folder of the saved weights.

    Raises:
        FileNotFoundError: the folder has no such weights.
        ValueError: the weights are of another network, adapter or rank, or a file is damaged.
    """
    for name, part in family.networks_in(network).items():
        if hasattr(network, "peft_config"):
            _load_lora(family, part, lora_file(family, folder, name))
        else:
            _load_full(part, Path(folder) / name)


def _load_lora(family: Family, network: Any, file: Path) -> None:
    from peft.utils import set_peft_model_state_dict

    adapter, config = read_adapter(family, file), network.peft_config[ADAPTER]
    tensors = {}
    for module, (a, b) in adapter.layers.items():
        tensors[f"{module}.lora_A.weight"] = a
        tensors[f"{module}.lora_B.weight"] = scaled(b, config.r / config.lora_alpha)
    with _naming_file(file):
        keys: Any = set_peft_model_state_dict(network, tensors, adapter_name=ADAPTER)
        wrong = keys.unexpected_keys or [name for name in keys.missing_keys if "lora_" in name]
        if wrong:
            raise RuntimeError(f"{wrong[0]} is in one of them alone")


def _load_full(network: nn.Module, folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        expected = "expected the weights of a run with full tuning"
        raise FileNotFoundError(f"{folder.parent}: no {folder.name}/*.safetensors, {expected}")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_tensors(file)
    with _naming_file(files[0]):
        network.load_state_dict(state)


@contextmanager
def _naming_file(file: Path) -> Iterator[None]:
    """Shortens torch's errors, which have a line for each tensor that differs, to the first, and names the file."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        first, *others = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = others[0].rstrip(".") if others else first
        raise ValueError(f"{file}: {reason}, expected weights of this model") from error


def check_targets(network: nn.Module, target_modules: Sequence[str]) -> None:
    """Refuses targets of LoRA that a network does not have; needs no weights.

    Raises:
        ValueError: there is no target, or one is not a linear layer or convolution.
    """
    if not target_modules:
        raise ValueError(f"target_modules={list(target_modules)}: expected at least one name")
    known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    names = [name for name, module in network.named_modules() if isinstance(module, known)]
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2)}
            close = difflib.get_close_matches(target, sorted(ends), n=3)
            hint = f", such as {', '.join(close)}" if close else ""
            raise ValueError(
                f"target_modules: {target!r} is no linear layer or convolution of {type(network).__name__}{hint}"
            )
