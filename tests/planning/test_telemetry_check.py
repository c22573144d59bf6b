"""What the ways out of metrics ask of a machine is told in one go, before anything starts, where ranks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fdscale.config.errors import SettingsError
from fdscale.config.recipe import load_recipe
from fdscale.planning.check import check

JSON: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}


def problems(*overrides: str, local_ranks: int | None = 2, **blocks: Any) -> list[str]:
    given = ["data.shards=digits", "data.global_batch=8", "teacher.weights=random", *overrides]
    try:
        check(load_recipe("vit_b_clip_b", given), {**JSON, **blocks}, 2, local_ranks)
    except SettingsError as error:
        return error.problems
    return []


def test_files_of_the_endpoint_are_looked_at_where_the_ranks_are(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("user:word")
    (tmp_path / "password").chmod(0o604)
    secured = ["log.prometheus_certificate=/no/cert", f"log.prometheus_password_file={tmp_path}/password"]
    told = problems("log.prometheus_port=9101", *secured)
    assert [problem.split(":")[0] for problem in told] == ["log.prometheus_certificate", "log.prometheus_password_file"]
    assert problems("log.prometheus_port=9101", *secured, local_ranks=None) == []  # a login node plans for others
    (tmp_path / "password").chmod(0o600)
    assert len(problems("log.prometheus_port=9101", *secured)) == 1


def test_a_monitor_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(tensorboard={"enabled": True}, csv_monitor={"enabled": True}, wandb={"enabled": True}) == []
    (told,) = problems(comet={"enabled": True}, tensorboard={"enabled": True})
    assert told == (
        "comet.enabled in the DeepSpeed JSON needs the package comet_ml, which is not installed: pip install comet_ml, "
        "or take the block out"
    )
    assert problems(comet={"enabled": False}) == []
    assert problems(comet={"enabled": True}, local_ranks=None) == []
