"""Each family's original file, through `build_teacher`, gives the tokens of an independently written forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.teachers import from_open_clip, from_timm
from fdscale.teachers.layouts import to_open_clip, to_timm
from fdscale.teachers.table import TeacherSpec, Value, teacher_geometry
from fdscale.teachers.teacher import Teacher, build_teacher
from fdscale.teachers.weights import load_strictly, read_state_dict

State = dict[str, Tensor]

TOLERANCE = 1e-5
LEFT_BEHIND = re.compile(
    r"^(text|transformer|token_embedding|positional_embedding|ln_final|logit|input_resolution|context_length|vocab_size)"
    r"|^params/t|^params/b|visual_projection|^visual.proj$|(^|[./])head[./]|^head_dense|MAPHead_0|attn_pool"
    r"|mask_token|^decoder_(?!embed.weight)|local_cls_norm|freqs_|relative_position_index|attn_mask"
)


def built(teacher: str, weights: str, geometry: Mapping[str, Value]) -> Teacher:
    return build_teacher(teacher_geometry(teacher, weights, overrides=geometry), weights)


def expected(references: ModuleType, row: NamedTuple, state: State, pixels: Tensor) -> Tensor:
    """The reference's tokens, computed in double precision."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in row.statistics)
    state, images = {key: value.double() for key, value in state.items()}, (pixels.double() - mean) / std
    if row.reference == "swin":
        return references.swin(state, images, row.geometry["depths"], row.geometry["num_heads"], 4)
    return references.vit(references.FAMILIES[row.reference], state, images, row.geometry["num_heads"])


def pixels(row: NamedTuple) -> Tensor:
    size = row.geometry["image_size"]
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def test_an_original_file_gives_the_references_tokens(
    row: NamedTuple, files: ModuleType, references: ModuleType, tmp_path: Path
) -> None:
    state = files.filled(row.shapes)
    tokens = built(row.teacher, files.written(row, state, tmp_path), row.geometry)(pixels(row))
    wanted = expected(references, row, state, pixels(row))
    assert tokens.dtype == torch.float32
    assert wanted.std() > 0.5, "tokens that say nothing"
    torch.testing.assert_close(tokens.double(), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("golden", ["clip", "dino", "esvit"])
def test_the_references_give_the_official_targets(
    golden: str, files: ModuleType, references: ModuleType, request: pytest.FixtureRequest
) -> None:
    recorded = request.getfixturevalue(golden)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (files.CLIP if golden == "clip" else files.IMAGENET))
    state = {key.removeprefix("visual."): value for key, value in recorded.state.items()}
    images = (recorded.pixels - mean) / std
    match golden:
        case "clip":
            tokens = references.vit(references.FAMILIES["clip"], state, images, heads=1)
        case "dino":
            tokens = references.vit(references.FAMILIES["vit"], state, images, heads=3)
        case _:
            tokens = references.swin(state, images, [1, 2], [2, 4], 4)
    whitened = F.layer_norm(tokens, tokens.shape[-1:])
    torch.testing.assert_close(whitened, recorded.target, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("teacher", "network"),
    [("clip_vit_b16", "laion_clip_vit_b16"), ("siglip2_vit_b16", "timm:vit_base_patch16_siglip_gap_224")],
)
def test_a_plain_gelu_is_caught(
    teacher: str, network: str, files: ModuleType, references: ModuleType, tmp_path: Path
) -> None:
    row = files.row_of(teacher)._replace(file="file.pt", wrapped=files.bare)
    state = files.filled(row.shapes)
    prefix = "visual." if teacher.startswith("clip") else "vision_model."  # and no word of OpenAI
    weights = files.written(row, {prefix + key: value for key, value in state.items()}, tmp_path)
    wanted = expected(references, row, state, pixels(row))
    assert (built(teacher, weights, row.geometry)(pixels(row)) - wanted).abs().max() < TOLERANCE
    assert (built(network, weights, row.geometry)(pixels(row)) - wanted).abs().max() > 50 * TOLERANCE


def test_dinov3s_biases_of_q_and_v_are_not_lost(files: ModuleType, references: ModuleType, tmp_path: Path) -> None:
    """A network without them takes the file only where they are zero: the distilled models' case."""
    row, plain = files.row_of("dinov3_vit_l16"), "timm:vit_large_patch16_dinov3"
    state = files.filled(row.shapes)
    zeroed = {key: value * 0 if key.endswith("qkv.bias") else value for key, value in state.items()}
    wanted = expected(references, row, zeroed, pixels(row))
    weights = files.written(row, state, tmp_path)
    assert (built(row.teacher, weights, row.geometry)(pixels(row)) - wanted).abs().max() > 1000 * TOLERANCE
    with pytest.raises(UserError, match=r"pth does not fit .*unexpected \(blocks\.0\.attn\.q_bias, .*v_bias"):
        built(plain, weights, row.geometry)
    tokens = built(plain, files.written(row, zeroed, tmp_path), row.geometry)(pixels(row))
    torch.testing.assert_close(tokens.double(), wanted, atol=TOLERANCE, rtol=0)


def test_a_bias_of_k_without_its_mask_is_refused(files: ModuleType, tmp_path: Path) -> None:
    row = files.row_of("dinov3_vit_l16")
    state = {key: value for key, value in files.filled(row.shapes).items() if not key.endswith("bias_mask")}
    with pytest.raises(UserError, match=r"2 unexpected \(blocks\.0\.attn\.k_bias, blocks\.1\.attn\.k_bias\)"):
        built(row.teacher, files.written(row, state, tmp_path), row.geometry)


def test_dinov3s_periods_are_the_files_whatever_the_dtype(
    files: ModuleType, references: ModuleType, tmp_path: Path
) -> None:
    row = files.row_of("dinov3_vit_l16")
    state, name = files.filled(row.shapes), "rope_embed.periods"
    exact = expected(references, row, state | {name: 100 ** (torch.arange(4) / 4)}, pixels(row))
    rounding = expected(references, row, state, pixels(row)) - exact
    assert rounding.abs().max() > 10 * TOLERANCE, "why the file's are taken"
    teacher = built(row.teacher, files.written(row, state, tmp_path), row.geometry).to(torch.bfloat16)
    assert torch.equal(teacher.backbone.rope.periods, state[name].float())
    with pytest.raises(UserError, match=r"1 unexpected \(rope_embed\.periods\)"):
        built(row.teacher, files.written(row, state | {name: torch.ones(4)}, tmp_path), row.geometry)


def loader(spec: TeacherSpec, path: Path) -> tuple[str, Callable[[State], None]]:
    """The empty network's name, and what loads a state of its layout into it."""
    if spec.source == "open_clip":
        tower = from_open_clip._tower(spec)
        return "open_clip", lambda state: load_strictly(tower, to_open_clip(state), path, "open_clip")
    model = timm.create_model(spec.model, num_classes=0, **from_timm._arguments(spec))
    return spec.model, lambda state: load_strictly(model, to_timm(state, model, False), path, spec.model)


def test_every_key_of_a_file_is_needed_or_named_as_left_behind(
    row: NamedTuple, files: ModuleType, tmp_path: Path
) -> None:
    """One key less, or one more: refused in a sentence, whatever the key; never an exception of another kind."""
    weights = files.written(row, files.filled(row.shapes), tmp_path)
    spec = teacher_geometry(row.teacher, weights, overrides=row.geometry)
    network, load = loader(spec, Path(weights))
    state = read_state_dict(Path(weights), spec.checkpoint_key)
    load(state)
    for key in state:
        less = {name: value for name, value in state.items() if name != key}
        if LEFT_BEHIND.search(key):
            load(less)
        else:
            with pytest.raises(UserError, match=rf"{row.file} does not fit {network}: \d+ (missing|unexpected)"):
                load(less)
    needed = next(key for key in state if not LEFT_BEHIND.search(key))
    for stranger in (f"{needed}_too", "stranger.weight"):
        with pytest.raises(UserError, match=r": 1 unexpected \(.*(_too|stranger\.weight)\); the file is of"):
            load({**state, stranger: torch.ones(1)})
