"""What pydantic and the recipes' neighbours find wrong, as sentences: where, got, allowed, next step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fdscale.config.errors import nearest

DEEPSPEED_JSON = "its home is the DeepSpeed JSON (recipe key 'deepspeed', files in ds_configs/)"
LAUNCHER = "its home is the launcher (`fdscale launch`, deepspeed --num_gpus, sbatch --nodes)"
HOMES = {
    **dict.fromkeys(("train_batch_size", "batch_size"), "its home is 'data.global_batch'"),
    "train_micro_batch_size_per_gpu": DEEPSPEED_JSON,
    **dict.fromkeys(
        ("micro_batch", "micro_batch_size"),
        f"{DEEPSPEED_JSON}, where it is called 'train_micro_batch_size_per_gpu'",
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulation", "accumulation_steps"),
        "it has no home: it is derived as global batch / (ranks x micro batch)",
    ),
    **dict.fromkeys(
        ("zero_optimization", "zero", "stage", "fp16", "bf16", "precision", "torch_autocast"), DEEPSPEED_JSON
    ),
    **dict.fromkeys(("offload_optimizer", "offload_param", "overlap_comm"), DEEPSPEED_JSON),
    **dict.fromkeys(("gradient_clipping", "clip_grad", "max_grad_norm"), "its home is 'optim.clip'"),
    **dict.fromkeys(("optimizer", "scheduler"), "the optimizer is AdamW under a cosine: see [optim]"),
    **dict.fromkeys(("nodes", "num_nodes", "ranks", "world_size", "gpus", "num_gpus"), LAUNCHER),
    **dict.fromkeys(("master_addr", "master_port", "hostfile", "partition"), LAUNCHER),
    "smoke": "it is the option --smoke of the command line",
}
TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": 'text (a number as text is written key="5")',
    "boolean": "true or false",
    "array": "a list",
    "object": "a table",
}
BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


def dotted_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted name of a settings class, tables included; NAME stands for what the user calls an entry."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if table := _table(field.annotation):
            yield from dotted_names(table, f"{prefix}{name}.")
        elif entry := _entry(field):
            yield from dotted_names(entry, f"{prefix}{name}.NAME.")


def setting_problems(
    tree: Mapping[str, Any], model: type[BaseModel], siblings: Mapping[str, type[BaseModel]]
) -> list[str]:
    """Every problem of a recipe's tree against its settings class; `siblings` are the other programs'."""
    try:
        model.model_validate(tree)
    except ValidationError as error:
        sentences = (_sentence(detail, model, siblings) for detail in error.errors())
        return list(dict.fromkeys(sentences))  # a union tells one mistake once per member
    return []


def _sentence(detail: ErrorDetails, model: type[BaseModel], siblings: Mapping[str, type[BaseModel]]) -> str:
    where = _dotted(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return unknown_setting(where, model, siblings)
    if detail["type"] == "missing" and not where.endswith("]"):
        return f"missing setting '{where}': {_allowed(where, model)}"
    if detail["type"] == "string_pattern_mismatch":
        where, allowed = where.removesuffix(".[key]"), "a name of small letters, digits and _"
    elif detail["type"] == "value_error":
        allowed = str(detail["ctx"]["error"])
    elif detail["type"] == "finite_number":
        allowed = "a finite number"
    else:
        allowed = _allowed(where, model)
    return f"{where}: got {_got(detail['input'])}, allowed: {allowed}"


def unknown_setting(where: str, model: type[BaseModel], siblings: Mapping[str, type[BaseModel]]) -> str:
    """The refusal of a name that is no setting: its right home, its program, or the nearest name."""
    key = where.rsplit(".", 1)[-1]
    if key in HOMES:
        return f"'{where}' is no recipe setting: {HOMES[key]}"
    for program, other in siblings.items():
        if where in dotted_names(other):
            return f"'{where}' is a setting of program = \"{program}\" only"
    return f"unknown setting '{where}'{nearest(where, dotted_names(model))}"


def _table(kind: object) -> type[BaseModel] | None:
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _entry(field: FieldInfo) -> type[BaseModel] | None:
    """The settings class of each entry, where a field is a table of tables that the user names."""
    return _table(get_args(field.annotation)[1]) if get_origin(field.annotation) is dict else None


def _dotted(loc: tuple[int | str, ...]) -> str:
    if "geometry" in loc:
        loc = loc[: loc.index("geometry") + 2]  # what follows names a union's member
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _got(value: object) -> str:
    if value is None:
        return "nothing"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _allowed(where: str, model: type[BaseModel]) -> str:
    if ".geometry." in where:
        return "a number or a list of whole numbers"
    schema: dict[str, Any] = model.model_json_schema()
    node = schema
    for part in where.split("[")[0].split("."):
        node = _resolve(_property(node, part), schema)
    if where.endswith("]"):
        index = int(where[where.index("[") + 1 : -1])
        node = _resolve(node["prefixItems"][index], schema)
    return _describe(node)


def _property(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema of a table's setting, or of an entry that the user named."""
    return node["properties"][name] if "properties" in node else next(iter(node["patternProperties"].values()))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in node:  # X | None: TOML cannot write None
        node = next(option for option in node["anyOf"] if option.get("type") != "null")
    return schema["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node


def _describe(node: Mapping[str, Any]) -> str:
    if "const" in node:
        return repr(node["const"])
    if "enum" in node:
        return " or ".join(repr(value) for value in node["enum"])
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}: each {_describe(node['prefixItems'][0])}"
    limits = [f"{word} {node[key]:g}" for key, word in BOUNDS.items() if key in node]
    if node.get("minItems"):
        limits.append(f"at least {node['minItems']} of them")
    if node.get("minLength"):
        limits.append("not empty")
    return ", ".join([TYPES[node["type"]], *limits])
