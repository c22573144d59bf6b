"""What NVIDIA's DCGM exporter says of the GPUs of the chosen runs' nodes: a row of the second board."""

from __future__ import annotations

from typing import Any

from monitoring.grafana.panels import RUN, Panel, Query, Row, few, panel

TARGETS = f'up{{job="fdscale", {RUN}}}'


def gpus(title: str, field: str, unit: str, help: str, least: bool = False, **options: Any) -> Panel:
    """The few GPUs with the greatest (or least) values of a field of the exporter.

    The exporter knows no runs: its `Hostname` is joined with the `node` of the runs' targets.
    """
    node = f'label_replace({field}, "node", "$1", "Hostname", "(.+)")'
    mine = f"max by (node, gpu) ({node} and on (node) {TARGETS})"
    query = Query(few(mine, "node", "gpu", least=least), "{{node}} GPU {{gpu}}", "dcgm")
    return panel(title, query, unit=unit, help=help, width=6, **options)


GPUS = Row(
    "GPUs, from the DCGM exporter",
    (
        gpus(
            "Utilisation",
            "DCGM_FI_DEV_GPU_UTIL",
            "percent",
            "Share of the time in which a kernel ran, of the idlest GPUs; 100 % says busy, not fast",
            least=True,
            minimum=0,
            maximum=100,
        ),
        gpus(
            "Tensor cores",
            "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
            "percentunit",
            "Share of the time in which the tensor cores had work, of the idlest GPUs",
            least=True,
            minimum=0,
            maximum=1,
        ),
        gpus("Power", "DCGM_FI_DEV_POWER_USAGE", "watt", "Of the GPUs that draw least", least=True, minimum=0),
        gpus("Temperature", "DCGM_FI_DEV_GPU_TEMP", "celsius", "Of the hottest GPUs"),
        gpus(
            "Clock",
            "DCGM_FI_DEV_SM_CLOCK",
            "suffix: MHz",
            "Of the slowest GPUs; a throttled one stands out",
            least=True,
        ),
        gpus(
            "Last XID",
            "DCGM_FI_DEV_XID_ERRORS",
            "none",
            "Number of the last error that the driver told of a GPU; 0 for none",
            minimum=0,
            reach=1,
        ),
        gpus(
            "Double-bit ECC errors",
            "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL",
            "none",
            "Errors that a GPU's memory could not correct, since the driver was loaded",
            minimum=0,
            reach=1,
        ),
        gpus(
            "Rows not remapped",
            "DCGM_FI_DEV_ROW_REMAP_FAILURE",
            "none",
            "1: a GPU has no spare rows of memory left and is to be replaced",
            minimum=0,
            reach=1,
        ),
    ),
)
