"""Small checkpoints in the layouts that the official implementations write, made from timm's networks."""

from __future__ import annotations

import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from fdscale.students.swin_v2 import SwinV2Block
from fdscale.students.window_attention import windows_of

StateDict = dict[str, Tensor]
GOLDEN = Path(__file__).parent.parent / "golden"
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
CLASSES = 5


def perturbed(network: nn.Module) -> nn.Module:
    """Noise on every parameter: SwinV2's norms start near zero, where every block is the identity."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


def original_swin(network: nn.Module, rpe: bool = False) -> StateDict:
    """Microsoft's names: merging at a stage's end, persistent buffers, the head; `rpe_mlp` where it is SimMIM's."""
    state: StateDict = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("k_bias"):
            continue
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        name = name.replace("head.fc.", "head.")
        state[name.replace("cpb_mlp", "rpe_mlp") if rpe else name] = tensor.detach().clone()
    return state | _masks(network)


def _masks(network: nn.Module) -> StateDict:
    """The masks of shifted blocks, buffers of the original's, which blocks of ours do not hold."""
    masks: StateDict = {}
    for name, block in network.named_modules():
        if isinstance(block, SwinV2Block) and any(block.shift_size):
            high, wide = block.input_resolution
            windows = windows_of((high, wide), block.window_size, block.shift_size, False, torch.device("cpu"))
            masks[f"{name}.attn_mask"] = windows.masks[list(windows.kinds)]
    return masks


def original_vit(network: Beit) -> StateDict:
    """BEiT's names: timm's, with index buffers."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named if not name.endswith("k_bias")}


def wrapped(state: StateDict) -> StateDict:
    return {f"encoder.{name}": tensor for name, tensor in state.items()}


def swin_v2(**changes: Any) -> SwinTransformerV2:
    arguments = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return perturbed(SwinTransformerV2(num_classes=CLASSES, **{**arguments, **changes}))


def swin(**changes: Any) -> SwinTransformer:
    arguments = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return perturbed(SwinTransformer(num_classes=CLASSES, **{**arguments, **changes}))


def vit(**changes: Any) -> Beit:
    arguments: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4}
    arguments |= {"init_values": 0.1, "use_abs_pos_emb": False, "num_classes": 0, "global_pool": "token"}
    return perturbed(Beit(**{**arguments, **changes}))


@pytest.fixture
def yacs_node(tmp_path: Path) -> Iterator[Callable[..., object]]:
    """A class like yacs' node, which is gone when the checkpoint is read."""
    source = tmp_path / "yacs_config.py"
    source.write_text("class CfgNode(dict):\n    pass\n")
    spec = importlib.util.spec_from_file_location("yacs_config", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["yacs_config"] = module
    yield module.CfgNode
    sys.modules.pop("yacs_config", None)


@pytest.fixture
def checkpoint(tmp_path: Path, yacs_node: Callable[..., object]) -> Callable[..., Path]:
    """`checkpoint(state)` writes what Swin's, SimMIM's and feature distillation's code saves; `beit=True` BEiT's."""

    def write(state: StateDict, beit: bool = False) -> Path:
        path = tmp_path / "checkpoint.pth"
        moments = {0: {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
        rest: dict[str, Any] = {"optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}, "epoch": 7}
        rest |= {"args": Namespace(model="beit")} if beit else {"config": yacs_node(MODEL=yacs_node(TYPE="vit"))}
        torch.save({"model": state, **rest}, path)
        sys.modules.pop("yacs_config")
        return path

    return write


@pytest.fixture(scope="session")
def layouts() -> Any:
    """The functions above, for test modules that cannot import this one."""
    return Namespace(
        original_swin=original_swin,
        original_vit=original_vit,
        wrapped=wrapped,
        swin=swin,
        swin_v2=swin_v2,
        vit=vit,
        images=IMAGES,
        golden=GOLDEN,
    )
