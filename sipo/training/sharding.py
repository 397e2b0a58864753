"""Gathers weights and optimiser state that FSDP2 has sharded over the processes, and shards them again.

Every function here also serves one device and plain data parallelism, where nothing is sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``training.mixed_precision`` computes in, by its name; "no" has none."""


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process may hold only a part of the weights."""
    return bool(accelerator.is_fsdp2)


def is_compiled(model: nn.Module) -> bool:
    """Whether a network is ``torch.compile``'s wrapper of another, told without importing the compiler."""
    return "_orig_mod" in model._modules


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the network inside the wrappers of DDP and ``torch.compile``.

    accelerate's own function takes DDP out of the compiled wrapper for good, with the ``no_sync`` that accumulation
    needs, or stops at that wrapper, whose names of parameters begin with ``_orig_mod.``.
    """
    while True:
        if is_compiled(model):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, DistributedDataParallel):
            model = model.get_submodule("module")
        else:
            return model


def plain_name(name: str) -> str:
    """Returns a parameter's name without what ``torch.compile`` adds if a part of a network is compiled."""
    return name.replace("_orig_mod.", "")


def whole_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Returns the type that FSDP2 rounds all of a policy's weights to, even norms, which autocast leaves alone.

    ``None``: they stay as they are.
    """
    if not accelerator.is_fsdp2:
        return None
    precision: Any = accelerator.state.fsdp_plugin.mixed_precision_policy
    return None if precision is None else precision.param_dtype


def round_whole(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Rounds a reference's weights, in place, as :func:`whole_dtype` says, or it and the policy would start apart."""
    dtype = whole_dtype(accelerator)
    if dtype is not None:
        for parameter in reference.parameters():
            parameter.data = parameter.data.to(dtype)
    return reference


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor's full value. Every process calls it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def local_part(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor, to be changed in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shards a full value as ``other`` is. Every process calls it, with the same value."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Ends a forward pass that no backward pass will follow.

    FSDP2 keeps the outermost weights together until then; left so, they would miss the next optimiser step.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Returns what training changes, by name: trainable parameters and stored buffers, no frozen weights.

    Names are those of the network without wrappers (:func:`unwrapped`), compiled or not.
    """
    model = unwrapped(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    # named_parameters gives a tied weight once, where state_dict gives it once per name.
    tensors: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors.update({n: t for n, t in model.state_dict().items() if n not in parameters and n not in frozen})
    return {plain_name(name): tensor for name, tensor in tensors.items()}


def host_copy(tensor: Tensor) -> Tensor:
    """Copies a tensor for safetensors: whole, contiguous, on the CPU, sharing no memory with another."""
    return whole(tensor).to("cpu", copy=True, memory_format=torch.contiguous_format)


def gather_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Returns :func:`trained`, whole, in copies on the CPU; nothing without ``keep``. Every process calls it.

    This gets the trained weights of a policy under FSDP2, which stays sharded after training.
    """
    return _gathered(trained(model), keep)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads the weights of :func:`gather_weights` into a network."""
    with torch.no_grad():
        for name, tensor in trained(model).items():
            tensor.copy_(shard_like(weights[name], tensor))


def gather_optimizer(optimizer: Any, keep: bool = True) -> dict[str, Any]:
    """Returns an optimiser's ``state_dict`` in whole copies on the CPU. Called as :func:`gather_weights` is."""
    state = optimizer.state_dict()
    return state | {"state": {number: _gathered(values, keep) for number, values in state["state"].items()}}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads the state of :func:`gather_optimizer`; tensors shaped as a parameter are sharded as it is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dealt = {
        number: {k: _dealt(v, parameters[int(number)]) for k, v in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": dealt})


def _gathered(values: dict[str, Any], keep: bool) -> dict[str, Any]:
    copies = {}
    for name, value in values.items():  # one at a time: without keep, no more than one is whole
        if isinstance(value, dict):
            copy: Any = _gathered(value, keep)
        else:
            copy = host_copy(value) if isinstance(value, Tensor) else value
        if keep:
            copies[name] = copy
    return copies


def _dealt(value: Any, parameter: Tensor) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return shard_like(value, parameter)
    return value
