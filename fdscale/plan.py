"""`fdscale plan`: whether a recipe fits before it is queued, what it takes, and what would make it fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdscale.cluster.gpus import visible_gpus
from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.config.dense_settings import DetectSettings
from fdscale.config.errors import UserError
from fdscale.config.programs import AnySettings, DenseSettings
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.data.index import load_index
from fdscale.planning.check import check
from fdscale.planning.cost import Cost, HostMemory, checkpoint_bytes, flops_per_image, host_memory, pace
from fdscale.planning.data_check import DIGITS
from fdscale.planning.dense_check import SCENE_CLASSES, SCENES, count_of, training_data
from fdscale.planning.dense_sizes import image_bytes
from fdscale.planning.engine_rules import engine_rules
from fdscale.planning.fit import Configuration, nearest_fit
from fdscale.planning.forecast import Forecast
from fdscale.planning.gpus import CPU, Gpu, gpu_named
from fdscale.planning.memory import machine_memory, memory_per_rank
from fdscale.planning.outlook import Machine, Nearest, Outlook
from fdscale.planning.placement import Placement, chosen_placements
from fdscale.teachers.table import OWN, STUDENT_FILE

if TYPE_CHECKING:
    from fdscale.build.outline import Outline, Traces

Outliner = Callable[[Any], "Outline"]  # of the program whose recipe it is
USUAL = {"distill": (1_281_167, "ImageNet-1K's"), "segment": (20_210, "ADE20K's"), "detect": (117_266, "COCO's")}
OBJECTS365 = (1_742_289, "Objects365's")  # v2: images to train on
OBJECTS365_CLASSES = 365
MODES = ("none", "blocks", "offload")


def plan(
    settings: AnySettings,
    outline: Outliner,
    recipe: str,
    nodes: int,
    gpus_per_node: int | None,
    gpu: str | None,
    efficiency: float,
) -> Outlook:
    """The outlook of a recipe on a cluster that need not be there, and whose data and weights need not be, either.

    `outline` builds what the program trains in shapes alone. Without `gpu` it is this machine's kind. Raises
    UserError for what does not fit together, and for networks given in Python, whose shapes are not known here.
    """
    known = gpu_named(gpu) if gpu is not None and gpu.lower() != CPU else None
    local_ranks = gpus_per_node or _ranks_here()
    machine = _machine(known, local_ranks, gpu)
    deepspeed_json = load_deepspeed_json(settings.deepspeed)
    shapes = _without_files(settings)
    checked = check(_with_scenes_classes(shapes), deepspeed_json, nodes * local_ranks)
    tracer = Tracer(shapes, outline, machine.on_gpu)
    start = Configuration(nodes, settings.student.activation_checkpointing, deepspeed_json, {})
    traces = tracer.of(start)
    start = replace(start, placements=_placements(shapes, traces, start, local_ranks, machine))
    foreseen = tracer.forecast(start, local_ranks)
    outlook = Outlook(
        recipe=recipe,
        program=settings.program,
        student=settings.student.name,
        names=_names(settings),
        machine=machine,
        nodes=nodes,
        gpus_per_node=local_ranks,
        micro_batch=start.micro_batch,
        accumulation=checked.accumulation,
        global_batch=checked.global_batch,
        zero_stage=deepspeed_json["zero_optimization"]["stage"],
        checkpointing=start.checkpointing,
        forecast=foreseen,
        activations={mode: tracer.of(replace(start, checkpointing=mode)).student.peak for mode in MODES},
        host=_host(shapes, traces, start, foreseen, local_ranks),
        cost=_cost(settings, traces, start, known, nodes * local_ranks, efficiency),
        nearest=None,
    )
    return outlook if outlook.fits else replace(outlook, nearest=_nearest(tracer, start, local_ranks, machine))


def _cost(
    settings: AnySettings, traces: Traces, start: Configuration, gpu: Gpu | None, ranks: int, efficiency: float
) -> Cost:
    rules = engine_rules(start.deepspeed_json)
    flops = flops_per_image(traces.student, traces.teachers, start.micro_batch)
    samples, samples_are = _samples(settings)
    steps_per_epoch = max(samples // settings.data.global_batch, 1)
    images = settings.total_steps(steps_per_epoch) * settings.data.global_batch
    return Cost(
        parameters=traces.student.parameters,
        checkpoint_bytes=checkpoint_bytes(traces.student.parameters, rules, settings.optim.ema_decay > 0),
        flops=flops,
        pace=None if gpu is None else pace(flops, gpu, ranks, rules, images, efficiency),
        epochs=settings.epochs or images / samples,
        samples=samples,
        samples_are=samples_are,
    )


@dataclass
class Tracer:
    """Traces and forecasts of one recipe under several configurations; what was traced is kept."""

    settings: AnySettings
    outline: Outliner
    cuda: bool
    _kept: dict[tuple[Any, ...], Traces] = field(default_factory=dict)

    def of(self, configuration: Configuration) -> Traces:
        """The traces of one micro batch in a configuration."""
        from fdscale.build.outline import traces_of

        zero3 = configuration.deepspeed_json["zero_optimization"]["stage"] == 3
        key = configuration.checkpointing, configuration.micro_batch, zero3
        if key not in self._kept:
            student = self.settings.student.model_copy(update={"activation_checkpointing": configuration.checkpointing})
            settings = self.settings.model_copy(update={"student": student})
            outlined = self.outline(settings)
            self._kept[key] = traces_of(
                outlined, settings, configuration.deepspeed_json, configuration.micro_batch, self.cuda
            )
        return self._kept[key]

    def forecast(self, configuration: Configuration, local_ranks: int) -> Forecast:
        """The memory of one rank in a configuration; raises UserError where the global batch does not divide."""
        from fdscale.build.foreseen import forecast_of

        ranks = configuration.nodes * local_ranks
        config, placements = configuration.deepspeed_json, configuration.placements
        return forecast_of(self.of(configuration), self.settings, config, placements, ranks)


def _batch_bytes(settings: AnySettings, traces: Traces, configuration: Configuration) -> int:
    """Bytes of one micro batch as loader workers hand it over."""
    return configuration.micro_batch * image_bytes(settings, traces.image_size)


def _nearest(tracer: Tracer, start: Configuration, local_ranks: int, machine: Machine) -> Nearest | None:
    def fits(configuration: Configuration) -> bool:
        try:
            return tracer.forecast(configuration, local_ranks).peak <= machine.usable
        except UserError:  # the global batch does not divide
            return False

    found = nearest_fit(start, fits)
    return None if found is None else Nearest(tuple(found[1]), tracer.forecast(found[0], local_ranks).peak)


def _placements(
    settings: AnySettings, traces: Traces, start: Configuration, local_ranks: int, machine: Machine
) -> dict[str, Placement]:
    """As a run would choose them on such a machine."""
    rules, ranks = engine_rules(start.deepspeed_json), start.nodes * local_ranks
    whole = {where: rules.frozen * trace.parameters for where, trace in traces.teachers.items()}
    ema = settings.optim.ema_decay > 0
    states = memory_per_rank(traces.student.parameters, 0, ranks, start.deepspeed_json, ema)
    chosen = chosen_placements(settings, whole, states.resident, machine.memory)
    return {where: choice.placement for where, choice in chosen.items()}


def _host(
    settings: AnySettings, traces: Traces, start: Configuration, foreseen: Forecast, local_ranks: int
) -> HostMemory:
    from fdscale.build.networks import WHOLE_UP_TO

    return host_memory(
        foreseen.states,
        traces.student,
        traces.teachers,
        {where: placement != "replicated" for where, placement in start.placements.items()},
        engine_rules(start.deepspeed_json),
        local_ranks,
        settings.data.workers,
        _batch_bytes(settings, traces, start),
        WHOLE_UP_TO,
    )


def _ranks_here() -> int:
    return len(visible_gpus(os.environ)) or 2


def _machine(gpu: Gpu | None, local_ranks: int, asked: str | None) -> Machine:
    if gpu is not None:
        return Machine(gpu.name, gpu.memory, on_gpu=True)
    here = machine_memory()
    on_gpu = bool(here.gpus) and asked is None
    memory = here.of_rank(local_ranks) if on_gpu else here.host // local_ranks
    return Machine("GPU of this machine" if on_gpu else "ranks on this machine's CPUs", memory, on_gpu, here.host)


def _without_files(settings: AnySettings) -> AnySettings:
    """The same run with embedded data and without weights files, which need not be on this machine.

    A student file stays, since it alone knows its network.
    """
    changes = _without_data(settings)
    if settings.student.name == OWN:
        raise UserError("student.name=own: a network given in Python is not known here; plan one like it by name")
    if settings.student.name != STUDENT_FILE:
        changes["student"] = settings.student.model_copy(update={"weights": None, "resize": False})
    if isinstance(settings, DistillSettings):
        changes["teacher"] = _shape_of(settings.teacher, "teacher")
        changes["further_teachers"] = {
            name: _shape_of(table, f"further_teachers.{name}") for name, table in settings.further_teachers.items()
        }
    return settings.model_copy(update=changes)


def _without_data(settings: AnySettings) -> dict[str, Any]:
    dense = isinstance(settings, DenseSettings)
    embedded = dict.fromkeys(("folder", "images", "annotations"), SCENES) if dense else {"shards": DIGITS}
    data = {name: value for name, value in embedded.items() if hasattr(settings.data, name)}
    none = dict.fromkeys(data) | {"every": 0}
    changes: dict[str, Any] = {"data": settings.data.model_copy(update=data)}
    changes["eval"] = settings.eval.model_copy(update=none)
    if isinstance(settings, FinetuneSettings | DetectSettings):
        changes["head"] = settings.head.model_copy(update={"weights": None})
    return changes


def _with_scenes_classes(settings: AnySettings) -> AnySettings:
    """As many classes as the embedded scenes have, which take the place of data that need not be here."""
    dense = isinstance(settings, DenseSettings)
    return settings.model_copy(update={"classes": SCENE_CLASSES[settings.program]}) if dense else settings


def _shape_of(table: Any, where: str) -> Any:
    if table.name == OWN:
        raise UserError(f"{where}.name=own: a network given in Python is not known here; plan one like it by name")
    if table.name == STUDENT_FILE:
        return table
    return table.model_copy(update={"weights": "random", "revision": None})


def _samples(settings: AnySettings) -> tuple[int, str]:
    """Samples of an epoch, and where the number comes from."""
    paths, read = _reader(settings)
    where = " with ".join(paths)
    if all(Path(path).exists() for path in paths):
        count, told = read(), f"counted in {where}"
    else:
        count, whose = _usual(settings)
        told = f"{whose}, since {where} is not on this machine"
    if isinstance(settings, FinetuneSettings) and settings.labelled:
        return min(settings.labelled, count), "labelled"
    return count, told


def _usual(settings: AnySettings) -> tuple[int, str]:
    """How many samples the program is usually trained on, and whose they are."""
    if isinstance(settings, DetectSettings) and settings.classes == OBJECTS365_CLASSES:
        return OBJECTS365
    return USUAL.get(settings.program, USUAL["distill"])


def _reader(settings: AnySettings) -> tuple[tuple[str, ...], Callable[[], int]]:
    """Where the samples are, and what counts them; raises UserError for what is there and wrong."""
    if isinstance(settings, DenseSettings):
        return training_data(settings), lambda: count_of(settings)
    folders = tuple(where for where, _ in settings.data.data_sets.values())
    return folders, lambda: sum(len(load_index(folder)) for folder in folders)


def _names(settings: AnySettings) -> dict[str, str]:
    if not isinstance(settings, DistillSettings):
        return {}
    return {where: table.name for where, (table, _) in settings.teachers.items()}
