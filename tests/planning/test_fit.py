"""The nearest configuration: changes in the order of their price, and none that is not needed."""

from __future__ import annotations

from fdscale.planning.fit import Configuration, nearest_fit

START = Configuration(
    nodes=1,
    checkpointing="none",
    deepspeed_json={"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}},
    placements={"teacher": "replicated"},
)


def test_checkpointing_comes_first() -> None:
    found = nearest_fit(START, lambda configuration: configuration.checkpointing == "blocks")
    assert found is not None
    assert found[1] == ["student.activation_checkpointing=blocks"]


def test_what_is_not_needed_is_taken_back() -> None:
    found = nearest_fit(START, lambda configuration: configuration.micro_batch <= 2)
    assert found is not None
    configuration, changes = found
    assert changes == ["train_micro_batch_size_per_gpu 2 in the DeepSpeed JSON"]
    assert (configuration.checkpointing, configuration.placements) == ("none", {"teacher": "replicated"})


def test_changes_add_up_to_offload_and_more_nodes() -> None:
    def fits(configuration: Configuration) -> bool:
        zero = configuration.deepspeed_json["zero_optimization"]
        return configuration.nodes >= 4 and zero["stage"] == 3 and zero.get("offload_optimizer") == {"device": "cpu"}

    found = nearest_fit(START, fits)
    assert found is not None
    assert found[1] == [
        "zero_optimization.stage 3 in the DeepSpeed JSON",
        "zero_optimization.offload_optimizer to cpu",
        "--nodes 4",
    ]


def test_where_nothing_fits_nothing_is_named() -> None:
    assert nearest_fit(START, lambda _: False) is None
    assert START.deepspeed_json["zero_optimization"] == {"stage": 1}
