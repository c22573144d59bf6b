"""Networks that rank 0 alone has in full: its values are shared with the other ranks, or divided over all of them.

Elsewhere such a network may be on the meta device, shapes without values. One module's own tensors are whole at a
time. (`deepspeed.zero.Init` around a constructor would do it without rank 0, and lose what timm's initialisation does
after a submodule is made.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdscale.training.engine import Connection, gather_lists, quiet_deepspeed


def share(modules: Iterable[nn.Module], connection: Connection) -> None:
    """Put rank 0's values of these modules' own parameters and buffers on every rank's device."""
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_from_first(parameter.data, connection), parameter.requires_grad))
        _share_buffers(module, connection)


def divide(
    network: nn.Module, deepspeed_json: Mapping[str, Any], connection: Connection, dtype: torch.dtype | None = None
) -> None:
    """Divide rank 0's parameters over the ranks, as the JSON's ZeRO-3 engine would; buffers become whole everywhere.

    Parameters are cast to `dtype` first where it is given: an engine leaves the type of divided ones alone. Those
    already divided stay as they are.
    """
    _assert_alike(network, connection)
    made: dict[nn.Parameter, nn.Parameter] = {}  # of meta ones: a parameter that two modules share stays one
    divided = next((parameter for parameter in network.parameters() if is_divided(parameter)), None)
    for module in network.modules():
        _share_buffers(module, connection)
        names = [name for name, parameter in module.named_parameters(recurse=False) if not is_divided(parameter)]
        own = [_hold(module, name, made, dtype, connection.device) for name in names]
        new = [parameter for parameter in own if not is_divided(parameter)]
        if divided is not None:
            divided.convert_to_zero_parameters(param_list=new)  # type: ignore[attr-defined]
        elif new:
            quiet_deepspeed().zero.Init(module=nn.ParameterList(new), config_dict_or_path=dict(deepspeed_json))
            divided = new[0]


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether a parameter's values are divided over the ranks: it is empty itself, `ds_shape` is its shape."""
    return hasattr(parameter, "ds_id")


def _hold(
    module: nn.Module,
    name: str,
    made: dict[nn.Parameter, nn.Parameter],
    dtype: torch.dtype | None,
    device: torch.device,
) -> nn.Parameter:
    """One parameter of a module in the type it will have, its values yet to come where it was on meta."""
    parameter: nn.Parameter = getattr(module, name)
    kept = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    if not parameter.is_meta:
        parameter.data = parameter.data.to(kept).contiguous()
        return parameter
    if parameter not in made:
        empty = torch.empty(parameter.shape, dtype=kept, device=device)
        made[parameter] = nn.Parameter(empty, parameter.requires_grad)
    setattr(module, name, made[parameter])
    return made[parameter]


def _share_buffers(module: nn.Module, connection: Connection) -> None:
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, _from_first(buffer, connection))


def _from_first(tensor: Tensor, connection: Connection) -> Tensor:
    """Rank 0's values, on this rank's device; on the others only a tensor's shape and type count."""
    if connection.rank.is_main:
        whole = tensor.to(connection.device).contiguous()
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=connection.device)
    if whole.numel():
        dist.broadcast(whole.view(-1).view(torch.uint8), 0)  # not every backend knows every type
    return whole


def _assert_alike(network: nn.Module, connection: Connection) -> None:
    """All ranks have the same names, shapes and types, and no tensor on meta that is neither parameter nor buffer."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    outline = [(name, tuple(getattr(t, "ds_shape", t.shape)), t.dtype) for name, t in tensors]
    outlines = gather_lists([hashlib.sha256(repr(outline).encode()).hexdigest()], connection)
    assert len(set(outlines)) == 1, f"{type(network).__name__} has other tensors on the meta device"
    loose = [
        f"{name}.{key}"
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    loose = gather_lists(loose, connection)
    assert not loose, f"{type(network).__name__} holds tensors that are no buffers: {', '.join(loose[:3])}"
