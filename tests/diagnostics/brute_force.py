"""Attention and its measures in plain NumPy loops, from weights and formulas alone: what the tests compare with."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Place = tuple[float, float] | None  # (y, x) in pixels; None for prefix tokens and padding
Region = tuple[int, int]
Key = tuple[str, int | None]  # measure, head


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def layer_norm(tokens: Array, norm: Any) -> Array:
    centred = tokens - tokens.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    return scaled * array(norm.weight) + array(norm.bias)


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def query_and_key(tokens: Array, weight: Array, bias: Array, heads: int) -> tuple[list[Array], list[Array]]:
    """By head (N, C/H), of projections whose first third of rows is the query's and second third the key's."""
    width = weight.shape[1]
    projected = tokens @ weight.T + bias
    parts = [projected[:, start : start + width // heads] for start in range(0, 2 * width, width // heads)]
    return parts[:heads], parts[heads:]


def vit_attention(block: Any, tokens: Array) -> Array:
    """(H, N, N) of a timm block."""
    attention = block.attn
    q, k = query_and_key(
        layer_norm(tokens, block.norm1), array(attention.qkv.weight), array(attention.qkv.bias), attention.num_heads
    )
    return np.stack([softmax(q[h] @ k[h].T / math.sqrt(q[h].shape[1])) for h in range(attention.num_heads)])


def clip_attention(block: Any, tokens: Array) -> Array:
    """(H, N, N) of an open_clip block."""
    attention = block.attn
    q, k = query_and_key(
        layer_norm(tokens, block.ln_1),
        array(attention.in_proj_weight),
        array(attention.in_proj_bias),
        attention.num_heads,
    )
    return np.stack([softmax(q[h] @ k[h].T / math.sqrt(q[h].shape[1])) for h in range(attention.num_heads)])


def beit_attention(block: Any, tokens: Array, table: Array, side: int) -> Array:
    """(H, N, N) of a Beit block whose CLS comes first; `table` has a row per offset, then CLS to, from and itself."""
    attention = block.attn
    bias = np.concatenate([array(attention.q_bias), 0 * array(attention.q_bias), array(attention.v_bias)])
    q, k = query_and_key(layer_norm(tokens, block.norm1), array(attention.qkv.weight), bias, attention.num_heads)
    logits = np.stack([q[h] @ k[h].T / math.sqrt(q[h].shape[1]) for h in range(attention.num_heads)])
    for i, j in np.ndindex(len(tokens), len(tokens)):
        if i and j:
            down = (i - 1) // side - (j - 1) // side
            across = (i - 1) % side - (j - 1) % side
            row = (down + side - 1) * (2 * side - 1) + across + side - 1
        else:
            row = {(True, False): -3, (False, True): -2, (True, True): -1}[i == 0, j == 0]
        logits[:, i, j] += table[row]
    return softmax(logits)


def swin_v2_attention(
    block: Any, tokens: Array, pads_first: bool
) -> tuple[list[Array], list[list[Place]], list[list[Region]]]:
    """By window (H, n, n), its tokens' (row, column) on the map (h, w, C), None for padding, and their regions."""
    height, width, _ = tokens.shape
    (high, wide), (down, across) = block.window_size, block.shift_size
    whole = (math.ceil(height / high) * high, math.ceil(width / wide) * wide)
    maps, places, parts = [], [], []
    for top, left in itertools.product(range(0, whole[0], high), range(0, whole[1], wide)):
        members = [(top + y, left + x) for y in range(high) for x in range(wide)]
        rows = [_before(y, down, height, whole[0], pads_first) for y, _ in members]
        columns = [_before(x, across, width, whole[1], pads_first) for _, x in members]
        found: list[Place] = [None if y is None or x is None else (y, x) for y, x in zip(rows, columns, strict=True)]
        inside = np.stack([0 * tokens[0, 0] if at is None else tokens[int(at[0]), int(at[1])] for at in found])
        regions = [
            (_region(y, whole[0], high, down), _region(x, whole[1], wide, across)) if down or across else (0, 0)
            for y, x in members
        ]
        maps.append(_cosine_attention(block.attn, inside, regions))
        places.append(found)
        parts.append(regions)
    return maps, places, parts


def _before(at: int, shift: int, length: int, padded: int, pads_first: bool) -> int | None:
    """Where on the map what is at `at` of the shifted one came from."""
    if pads_first:
        origin = (at + shift) % padded
        return origin if origin < length else None
    return (at + shift) % length if at < length else None


def _region(at: int, length: int, window: int, shift: int) -> int:
    """Tokens of different regions were not neighbours before the shift."""
    return 0 if at < length - window else 1 if at < length - shift else 2


def _cosine_attention(attention: Any, tokens: Array, regions: list[tuple[int, int]]) -> Array:
    bias = np.concatenate([array(attention.q_bias), 0 * array(attention.q_bias), array(attention.v_bias)])
    q, k = query_and_key(tokens, array(attention.qkv.weight), bias, attention.num_heads)
    scale = np.exp(np.minimum(array(attention.logit_scale).ravel(), math.log(100)))
    logits = np.empty((attention.num_heads, len(tokens), len(tokens)))
    for i, j in np.ndindex(len(tokens), len(tokens)):
        near = _position_bias(attention, i, j)
        for h in range(attention.num_heads):
            norms = np.linalg.norm(q[h][i]) * np.linalg.norm(k[h][j])
            alike = q[h][i] @ k[h][j] / norms if norms else 0.0  # the key of padding is zero
            logits[h, i, j] = scale[h] * alike + near[h] - (100 if regions[i] != regions[j] else 0)
    return softmax(logits)


def _position_bias(attention: Any, i: int, j: int) -> Array:
    wide = attention.window_size[1]
    offset = np.array([i // wide - j // wide, i % wide - j % wide], float)
    offset *= 8 / (np.array(attention.window_size) - 1)
    offset = np.sign(offset) * np.log2(1 + np.abs(offset)) / 3
    first, _, second = attention.cpb_mlp
    hidden = np.maximum(array(first.weight) @ offset + array(first.bias), 0)
    return 16 / (1 + np.exp(-array(second.weight) @ hidden))


def measures(
    images: list[list[Array]], places: list[list[Place]], prefix: int, regions: Sequence[Sequence[object]] | None = None
) -> dict[Key, float]:
    """Every measure of one block; `images` are by image and window (H, n, n), `places` by window and token.

    Tokens of different `regions`, likewise by window and token, do not see each other: each region is as a window.
    """
    if regions is not None:
        images, places = _apart(images, places, regions)
    heads = len(images[0][0])
    patches = [[i for i, place in enumerate(window) if place is not None] for window in places]
    kept = [
        [[_patches_alone(maps[h], own) for h in range(heads)] for maps, own in zip(image, patches, strict=True)]
        for image in images
    ]
    found: dict[Key, float] = {}
    for h in range(heads):
        of_head = [[window[h] for window in image] for image in kept]
        found["attention_distance", h] = _mean(
            sum(row[j] * math.dist(_at(window[i]), _at(window[key])) for j, key in enumerate(own))
            for image in of_head
            for window, own, averaged in zip(places, patches, image, strict=True)
            for i, row in zip(own, averaged, strict=True)
        )
        found["attention_entropy", h] = _mean(entropy(row) for image in of_head for map_ in image for row in map_)
        found["attention_information", h] = _mean(
            _mean(information(map_) for map_ in image if len(map_) > 1) for image in of_head
        )
        if prefix:
            found["attention_on_prefix", h] = _mean(
                image[0][h][i, :prefix].sum() for image in images for i in patches[0]
            )
    if heads > 1:
        found["head_similarity", None] = _mean(
            cosine(_flat(image, one), _flat(image, other))
            for image in kept
            for one, other in itertools.combinations(range(heads), 2)
        )
    return found | _of_averages(kept, places, patches)


def _apart(
    images: list[list[Array]], places: list[list[Place]], regions: Sequence[Sequence[object]]
) -> tuple[list[list[Array]], list[list[Place]]]:
    """Windows taken apart into their regions."""
    parts = [
        (window, [token for token, region in enumerate(of_tokens) if region == wanted])
        for window, of_tokens in enumerate(regions)
        for wanted in dict.fromkeys(of_tokens)
    ]
    maps = [[image[window][:, own][:, :, own] for window, own in parts] for image in images]
    return maps, [[places[window][token] for token in own] for window, own in parts]


def _of_averages(
    kept: list[list[list[Array]]], places: list[list[Place]], patches: list[list[int]]
) -> dict[Key, float]:
    diagonal, column, offset = [], [], []
    for window, own in enumerate(patches):
        if len(own) < 2:
            continue
        average = np.mean([map_ for image in kept for map_ in image[window]], axis=0)
        n, around = len(average), average - 1 / len(average)
        diagonal.append((np.trace(average) / n - 1 / n) / (1 - 1 / n))
        by_key, by_offset = np.zeros_like(around), np.zeros_like(around)
        groups: dict[tuple[float, ...], list[tuple[int, int]]] = defaultdict(list)
        for i, j in np.ndindex(n, n):
            by_key[i, j] = _mean(around[:, j])
            here, there = _at(places[window][own[i]]), _at(places[window][own[j]])
            groups[round(there[0] - here[0], 3), round(there[1] - here[1], 3)].append((i, j))
        for pairs in groups.values():
            for i, j in pairs:
                by_offset[i, j] = _mean(around[pair] for pair in pairs)
        column.append((by_key**2).sum() / (around**2).sum())
        offset.append((by_offset**2).sum() / (around**2).sum())
    return {
        ("attention_diagonality", None): _mean(diagonal),
        ("attention_column_share", None): _mean(column),
        ("attention_offset_share", None): _mean(offset),
    }


def _patches_alone(map_: Array, own: list[int]) -> Array:
    part = map_[np.ix_(own, own)]
    return part / part.sum(-1, keepdims=True)


def _flat(image: list[list[Array]], head: int) -> Array:
    return np.concatenate([window[head].ravel() for window in image])


def _at(place: Place) -> tuple[float, float]:
    assert place is not None
    return place


def _mean(values: Any) -> float:
    return float(np.mean(list(values) or [math.nan]))


def cosine(one: Array, other: Array) -> float:
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def entropy(probabilities: Any) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def information(map_: Array) -> float:
    """I(q; k) / sqrt(H(q) H(k)), from the joint distribution of a uniform query and the key that it looks at."""
    joint = map_ / len(map_)
    of_query, of_key = joint.sum(1), joint.sum(0)
    shared = sum(p * math.log(p / (of_query[i] * of_key[j])) for (i, j), p in np.ndenumerate(joint) if p > 0)
    return shared / math.sqrt(entropy(of_query) * entropy(of_key))
