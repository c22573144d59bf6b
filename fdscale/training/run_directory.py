"""The run directory: what ran is kept there, and only the same run may go on in it."""

from __future__ import annotations

import json
import os
import platform
import tomllib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe, to_toml
from fdscale.config.settings import RunSettings

# What may change between two starts of one run; everything else decides what is learned.
MAY_CHANGE = {
    "recipe": "a name",
    "run_dir": "the folder may be moved or named in another way",
    "deepspeed": "another file, whose contents are compared",
    "data.shards": "another place for the same shards, whose index is compared",
    "eval.shards": "likewise",
    "data.further_shards.*.shards": "likewise",
    "data.cache": "where shards are kept that were fetched",
    "data.cache_gib": "how many of them",
    "data.allow_pipe": "how they are fetched",
    **dict.fromkeys(("data.folder", "eval.folder", "data.annotations", "eval.annotations"), "likewise"),
    **dict.fromkeys(("data.images", "eval.images"), "another place for the same images"),
    "eval.overlays": "pictures",
    "epochs": "upward: more of the same",
    "steps": "likewise",
    "max_steps": "where to stop this time",
    "student.activation_checkpointing": "the same gradients, recomputed or kept",
    "student.skip_dropped": "the same branches, computed for fewer samples",
    "teacher.placement": "the same tokens, wherever the frozen weights lie",
    "further_teachers.*.placement": "likewise",
    "data.workers": "how many processes decode",
    "data.max_bad_ratio": "how many undecodable images are tolerated",
    "eval.every": "cadence",
    "checkpoint.every": "cadence",
    "checkpoint.keep": "retention",
    "checkpoint.keep_every": "retention",
    "checkpoint.verify_every": "cadence",
    "guards.*": "what ends a run, not what it learns",
    "log.*": "what is told, and where, not what it learns",
}
# Which bytes they name is compared, not how they name them; until something was trained they may be corrected.
HELD_BY_HASH = ("weights", "revision")
NETWORKS = ("student", "head", "teacher", "further_teachers.*")
MAY_CHANGE_IN_JSON = {
    "train_micro_batch_size_per_gpu": "the global batch stays: accumulation changes with it",
    **dict.fromkeys(
        (
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "comms_logger",
            "flops_profiler",
            "timers",
            "dump_state",
            "log_level",
            "csv_monitor",
            "tensorboard",
            "wandb",
            "comet",
        ),
        "logging",
    ),
    "bf16.immediate_grad_update": "the same sums of gradients, made earlier",
}
LOGS = "logs"  # what the launcher writes there before a run begins: one file for each life of a SLURM job
PACKAGES = ("fdscale", "torch", "torchvision", "deepspeed", "timm", "open_clip_torch", "fairscale", "webdataset")


class RunDirectory:
    """Paths of a run, and whether it is new, goes on, or is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe, self.deepspeed = folder / "recipe.toml", folder / "deepspeed.json"
        self.metrics, self.attempts = folder / "metrics.jsonl", folder / "attempts"
        self.student = folder / "student.safetensors"
        self.complete_marker = folder / "complete.json"
        self.versions, self.data = folder / "versions.json", folder / "data.json"
        self.weights = folder / "weights.json"

    def completed_steps(self) -> int | None:
        """The step at which this run was completed, or None."""
        return json.loads(self.complete_marker.read_text())["step"] if self.complete_marker.exists() else None

    def check(self, settings: RunSettings, deepspeed_json: Mapping[str, Any]) -> None:
        """Raise UserError, with the differences, when the folder holds something else than this run."""
        if any((self.folder / "checkpoints").glob("step_*")) and not self.attempts.exists():
            older = f"mkdir -p {self.attempts} && mv {self.folder}/checkpoints {self.attempts}/0000"
            raise UserError(f"run_dir: {self.folder} was written by an older version; to go on in it: {older}")
        if not self.recipe.exists():
            if self.folder.exists() and _names(self.folder) - {self.attempts.name, LOGS}:
                raise UserError(f"run_dir: {self.folder} is not empty and not a run; name a new folder with run_dir=…")
            return
        before, now = self._recorded_recipe(), tomllib.loads(to_toml(settings))
        problems = differences(before, now, {*MAY_CHANGE, *self._held_by_hash()})
        json_before = json.loads(self.deepspeed.read_text()) if self.deepspeed.exists() else deepspeed_json
        problems += differences(json_before, deepspeed_json, MAY_CHANGE_IN_JSON)
        problems += _shorter(before, now) if self._has_trained() else []
        if problems:
            listed = "\n  ".join(problems)
            raise UserError(
                f"run_dir: {self.folder} holds another run:\n  {listed}\nname a new folder with run_dir=…, "
                "or take these changes back"
            )

    def _recorded_recipe(self) -> dict[str, Any]:
        """What this run began with; settings that are newer than the run have their defaults there."""
        try:
            return tomllib.loads(to_toml(load_recipe(str(self.recipe))))
        except UserError:  # of another version, which had settings that are gone: they are told as differences
            return tomllib.loads(self.recipe.read_text())

    def _held_by_hash(self) -> set[str]:
        """Settings that need not be equal, since `check_weights` compares what they name with what is recorded."""
        networks = self._recorded_weights() if self._has_trained() else NETWORKS
        return {f"{network}.{setting}" for network in networks for setting in HELD_BY_HASH}

    def _has_trained(self) -> bool:
        """Whether there is something that another setting would contradict."""
        return any(self.attempts.glob("[0-9]*/step_*"))

    def _recorded_weights(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.weights.read_text()) if self.weights.exists() else {}

    def begin(self, settings: RunSettings) -> None:
        """Make the folder this run's, before anything else is put there."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        if not self.recipe.exists():
            write_text(self.recipe, to_toml(settings))

    def check_data(self, fingerprints: Mapping[str, str]) -> None:
        """Raise UserError when the data are not those that this run began with; `fingerprints` by setting."""
        before = json.loads(self.data.read_text()) if self.data.exists() else fingerprints
        changed = [name for name in fingerprints if before.get(name, fingerprints[name]) != fingerprints[name]]
        if any(_read_as(before[name]) != _read_as(fingerprints[name]) for name in changed):
            raise UserError(
                f"run_dir: {self.folder} began under another version of fdscale, which reads {' and '.join(changed)} "
                "otherwise: samples would change in the middle; finish it with that version, or name a new run_dir=…"
            )
        if changed:
            raise UserError(
                f"run_dir: {self.folder} began with other data than {' and '.join(changed)} now holds: "
                "its order of samples would change in the middle; bring the old ones back, or name a new run_dir=…"
            )

    def check_weights(self, weights: Mapping[str, Mapping[str, str | None]]) -> None:
        """Raise UserError when a network does not start from the bytes that this run began with.

        `weights`: {"student" or a teacher's setting: {"path", "sha256", "revision", …}}, `sha256` None for random ones.
        """
        before = self._recorded_weights() if self._has_trained() else {}
        changed = [name for name in weights if name in before and _differ(before[name], weights[name])]
        if changed:
            listed = "\n  ".join(
                f"{name}.weights: {_described(before[name])} there, {_described(weights[name])} now" for name in changed
            )
            raise UserError(
                f"run_dir: {self.folder} began with other weights:\n  {listed}\nbring the old ones back, or name a new "
                "folder with run_dir=…"
            )

    def record_weights(self, weights: Mapping[str, Mapping[str, str | None]]) -> None:
        """Write what the networks start from; of the same bytes it stays known from which revision they came."""
        recorded = self._recorded_weights()
        for name, now in weights.items():
            before = recorded.get(name, now)
            known = before if before["sha256"] == now["sha256"] else now
            recorded[name] = {**known, **{key: value for key, value in now.items() if value is not None}}
        write_text(self.weights, json.dumps(recorded, indent=2) + "\n")

    def record(self, settings: RunSettings, deepspeed_json: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
        """Write what runs, now that it has been built and resumed."""
        write_text(self.recipe, to_toml(settings))
        write_text(self.deepspeed, json.dumps(deepspeed_json, indent=2) + "\n")
        write_text(self.versions, json.dumps(versions(), indent=2) + "\n")
        write_text(self.data, json.dumps(dict(fingerprints), indent=2) + "\n")
        self.complete_marker.unlink(missing_ok=True)  # a longer run than before is not complete

    def changed_versions(self) -> list[str]:
        """What has another version than when this run was last started."""
        before = json.loads(self.versions.read_text()) if self.versions.exists() else {}
        now = versions()
        return [f"{name} {old} -> {now.get(name)}" for name, old in before.items() if now.get(name) != old]

    def mark_complete(self, step: int) -> None:
        """Say that the run is done and its student file is whole."""
        write_text(self.complete_marker, json.dumps({"step": step}) + "\n")


def _read_as(fingerprint: str) -> str:
    """How data are read, where a fingerprint says that before it says what they are."""
    return fingerprint.rpartition(":")[0]


def _shorter(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is wrong with a run's new length; epochs and steps cannot be told from each other without the data."""
    lengths = [name for name in ("epochs", "steps") if name in before]
    if lengths != [name for name in ("epochs", "steps") if name in now]:
        return [f"{lengths[0]}: the run's length was given in these, {before[lengths[0]]}; give it in them again"]
    shrunk = [name for name in lengths if now[name] < before[name]]
    return [f"{name}: {before[name]} there, {now[name]} now; it may only grow" for name in shrunk]


def _names(folder: Path) -> set[str]:
    """What a folder holds, but for what a start that was cut short leaves: hidden files, and texts not yet in place."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".") and path.suffix != ".new"}


def _differ(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> bool:
    """Whether the bytes are others, or what stands beside them: a student's geometry, mean and std."""
    described = before.get("description", now.get("description"))
    return before["sha256"] != now["sha256"] or described != now.get("description")


def _described(weights: Mapping[str, str | None]) -> str:
    """A file of weights by its bytes first: paths may lead elsewhere now."""
    if weights["sha256"] is None:
        return str(weights["path"])
    revision = f", teacher.revision={weights['revision']}" if weights.get("revision") else ""
    return f"SHA-256 {weights['sha256']} ({weights['path']}{revision})"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Settings whose values differ and may not: 'dotted.path: X there, Y now'; * in `allowed` stands for any name."""
    old, new = flatten(before), flatten(now)
    changed = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
    return [
        f"{path}: {old.get(path, 'unset')!r} there, {new.get(path, 'unset')!r} now"
        for path in changed
        if not any(fnmatchcase(path, key) or path.startswith(f"{key}.") for key in allowed)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted path: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)
