"""A process of its own that loads exported folders as their users would; fdscale cannot be imported there.

`python -I reader.py WORK...`: each WORK has `job.json` (format, folder) and `images.safetensors` (`HxW`: uint8
(B, 3, H, W)); `outputs.safetensors` (`HxW`: features or logits) and `keys.json` (missing, unexpected) are put beside.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Forward = Callable[[Any, tuple[int, int]], Any]


class _NoFdscale:
    """An import hook: fdscale is not here, installed or not."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "fdscale":
            raise ImportError("fdscale is not installed here")


def _read(work: Path) -> None:
    job = json.loads((work / "job.json").read_text())
    sys.path += [entry for entry in job["path"] if entry not in sys.path]  # where the libraries are; fdscale is refused
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(job["folder"])
    keys: dict[str, list[str]] = {"missing": [], "unexpected": []}
    forward = {"timm": _timm, "transformers": _transformers}[job["format"]](folder, keys)
    images = load_file(work / "images.safetensors")
    with torch.no_grad():
        outputs = {name: forward(batch, (batch.shape[-2], batch.shape[-1])) for name, batch in images.items()}
    save_file({name: output.float().contiguous() for name, output in outputs.items()}, work / "outputs.safetensors")
    (work / "keys.json").write_text(json.dumps(keys))


def _timm(folder: Path, keys: dict[str, list[str]]) -> Forward:
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    kept: dict[int, Any] = {}  # a SwinV2's weights are the same for every size, so that it is loaded once

    def forward(batch: Any, size: tuple[int, int]) -> Any:
        model = kept.get(0) or _timm_model(folder, config, size)
        if "window_size" in config["model_args"]:
            kept[0] = model
            model.set_input_size(img_size=size, window_size=config["model_args"]["window_size"])
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        keys["missing"] += sorted(model.state_dict().keys() - stored)
        keys["unexpected"] += sorted(stored - model.state_dict().keys())
        mean, std = (torch.tensor(config["pretrained_cfg"][name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        pixels = (batch.float() / 255 - mean) / std
        features = config["num_classes"] == 0 and config["model_args"].get("global_pool")
        return model.forward_features(pixels) if features else model(pixels)

    return forward


def _timm_model(folder: Path, config: dict[str, Any], size: tuple[int, int]) -> Any:
    if (folder / f"{config['architecture']}.py").is_file():
        sys.path.insert(0, str(folder))
        sys.modules.pop(config["architecture"], None)
        model = __import__(config["architecture"]).load(folder)
        sys.path.remove(str(folder))
        return model
    import timm

    resized = {"img_size": size} if "img_size" in config["model_args"] else {}
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **resized).eval()


def _transformers(folder: Path, keys: dict[str, list[str]]) -> Forward:
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = transformers.AutoModelForImageClassification if "id2label" in config else transformers.AutoModel
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def forward(batch: Any, size: tuple[int, int]) -> Any:
        # a SwinV2 fits its windows to `image_size`, a ViT its position biases to the image
        side = size[0] if size[0] == size[1] else list(size)
        resized = {} if config["model_type"] == "beit" else {"image_size": side}
        trust = {"trust_remote_code": True} if "auto_map" in config else {}
        model, told = kind.from_pretrained(folder, output_loading_info=True, **resized, **trust)
        keys["missing"] += sorted(told["missing_keys"])
        keys["unexpected"] += sorted(told["unexpected_keys"])
        inputs = processor(list(batch), do_resize=False, do_center_crop=False, return_tensors="pt")
        outputs = model.eval()(**inputs)
        return outputs.logits if "id2label" in config else outputs.last_hidden_state

    return forward


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoFdscale())
    for argument in sys.argv[1:]:
        _read(Path(argument))
    assert "fdscale" not in sys.modules
