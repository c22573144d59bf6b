"""A board as Grafana's JSON, by the builders of its foundation SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import stat as stat_panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.grafana.panels import RUN, Board, Panel, Query, Row, of

DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "fdscale"
PAGE_WIDTH = 24
BEGAN = "attempt_start_timestamp_seconds"
NUMBER_SIZE = 16
NAME_SIZE = 13  # pixels: by itself a long name becomes tiny, and one beside few bars is cut off
GREY = "#9fa7b3"
DASHED = {"fill": "dash", "dash": [8, 6]}


def board_json(board: Board) -> str:
    """The dashboard's JSON, as it is committed and imported."""
    page = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.help)
        .tags([TAG])
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-24h", "now")
        .refresh("30s")
        .link(_links())
        .with_variable(_datasource())
        .with_variable(_run())
    )
    for number, (part, place) in enumerate(placed(board), 1):
        if isinstance(part, Row):
            page.with_row(dashboard.Row(part.title).id(number).grid_pos(place))
        else:
            page.with_panel(_drawn(part).id(number).grid_pos(place))
    plain = json.loads(json.dumps(page.build(), cls=JSONEncoder))
    for variable in plain["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):  # the SDK gives every variable what only an interval has
            variable.pop(name, None)
    plain["annotations"] = {"list": _annotations(board)}
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def placed(board: Board) -> Iterator[tuple[Row | Panel, model.GridPos]]:
    """Headings and panels with their places: lines of 24 from the left, from the top."""
    y = 0
    for row in board.rows:
        yield row, model.GridPos(1, PAGE_WIDTH, 0, y)
        x, y, height = 0, y + 1, 0
        for one in row.panels:
            if x + one.width > PAGE_WIDTH:
                x, y, height = 0, y + height, 0
            yield one, model.GridPos(one.height, one.width, x, y)
            x, height = x + one.width, max(height, one.height)
        y += height


def _links() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("fdscale").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.keep_time(True).include_vars(True).as_dropdown(False)


def _datasource() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _run() -> dashboard.QueryVariable:
    """Several runs at once; All is every run that there was in the time shown."""
    variable = dashboard.QueryVariable("run").label("Run").datasource(DATASOURCE)
    query: dict[str, object] = {"query": "label_values(fdscale_run_info, run)", "refId": "run"}
    variable.query(query).refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(
        model.VariableSort.ALPHABETICAL_CASE_INSENSITIVE_ASC
    )
    return (
        variable.multi(True).include_all(True).all_value(".*").current(model.VariableOption(True, ["All"], ["$__all"]))
    )


def _annotations(board: Board) -> list[dict[str, Any]]:
    """Events as marks in panels: some at once, all at a click. The SDK lacks their titles and times that are values."""
    committed = f"{of('checkpoint_timestamp_seconds')} and {of('checkpoint_step')} > 0"
    skipped = f"max by (run) (increase(fdscale_skipped_steps_total{{{RUN}}}[$__rate_interval])) > 0"
    marks = [
        _annotation("Checkpoints", "{{run}}: checkpoint committed", "green", f"1000 * ({committed})", at_value=True),
        _annotation("Restarts", "{{run}}: attempt began", "blue", f"1000 * {of(BEGAN)}", at_value=True),
        _annotation("Steps left out", "{{run}}: steps left out", "red", skipped, at_value=False),
    ]
    for mark in marks:
        heading = board.marks.get(mark["name"])
        mark["enable"] = heading is not None
        if heading:
            mark["filter"] = {"exclude": False, "ids": _numbers_under(board, heading)}
    return marks


def _numbers_under(board: Board, heading: str) -> list[int]:
    """The numbers of the panels of one row."""
    row = next(row for row in board.rows if row.title == heading)
    return [number for number, (part, _) in enumerate(placed(board), 1) if part in row.panels]


def _annotation(name: str, title: str, colour: str, expr: str, at_value: bool) -> dict[str, Any]:
    return {
        "name": name,
        "titleFormat": title,
        "iconColor": colour,
        "datasource": {"type": DATASOURCE.type_val, "uid": DATASOURCE.uid},
        "expr": expr,
        "step": "60s",
        "target": {"refId": "Anno", "expr": expr, "interval": "60s"},
        "useValueForTime": at_value,
    }


def _drawn(one: Panel) -> Any:
    builder = _KINDS[one.kind](one)
    builder.title(one.title).description(one.help).datasource(DATASOURCE).unit(one.unit)
    for number, query in enumerate(one.queries):
        builder.with_target(_target(one, query, chr(ord("A") + number)))
    if one.decimals is not None:
        builder.decimals(one.decimals)
    if one.minimum is not None:
        builder.min(one.minimum)
    if one.maximum is not None:
        builder.max(one.maximum)
    if one.empty:
        builder.no_value(one.empty)
    if one.colours:
        builder.thresholds(_thresholds(one))
    if one.names:
        shown = enumerate(one.names.items())
        named = {str(value): model.ValueMappingResult(*word, index=place) for place, (value, word) in shown}
        builder.mappings([model.ValueMap(named)])
    if one.repeat:
        builder.repeat("run").repeat_direction("h")
    return builder


def _target(one: Panel, query: Query, letter: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).datasource(DATASOURCE)
    if one.kind == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    return target.instant() if is_of_now(one) else target.range()


def is_of_now(one: Panel) -> bool:
    """Whether a panel shows the present alone, which one point answers."""
    return one.kind in ("stat", "bargauge", "table")


def _thresholds(one: Panel) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=value, color=colour) for value, colour in one.colours]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _lines(one: Panel) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions().show_legend(True).display_mode(options.LegendDisplayMode.LIST).placement("bottom")
    )
    drawn = timeseries.Panel().legend(legend.calcs([])).line_width(2).show_points(options.VisibilityMode.NEVER)
    drawn.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    if one.stacked:
        drawn.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A")).fill_opacity(
            60
        ).line_width(1)
    if one.log:
        drawn.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    if one.points:
        drawn.draw_style(options.GraphDrawStyle.POINTS).show_points(options.VisibilityMode.ALWAYS).point_size(3)
    if one.reach is not None:
        drawn.axis_soft_max(one.reach)
    if one.dashed:
        drawn.override_by_regexp(
            f"/{one.dashed}/", [model.DynamicConfigValue("custom.lineStyle", DASHED), _colour(GREY)]
        )
    for name, colour in one.paint.items():
        drawn.override_by_name(name, [_colour(colour)])
    return drawn


def _colour(colour: str) -> model.DynamicConfigValue:
    return model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})


def _number(one: Panel) -> stat_panel.Panel:
    drawn = stat_panel.Panel().graph_mode(options.BigValueGraphMode.NONE).color_mode(options.BigValueColorMode.VALUE)
    drawn.text_mode(options.BigValueTextMode(one.text)).justify_mode(options.BigValueJustifyMode.AUTO)
    if one.text != "auto":
        drawn.text(common.VizTextDisplayOptions().title_size(NAME_SIZE))
    return drawn.reduce_options(_newest())


def _bars(one: Panel) -> bargauge.Panel:
    drawn = bargauge.Panel().orientation(options.VizOrientation.HORIZONTAL).reduce_options(_newest())
    drawn.text(common.VizTextDisplayOptions().title_size(NAME_SIZE).value_size(NUMBER_SIZE))
    return drawn.display_mode(options.BarGaugeDisplayMode.BASIC).min(0)


def _timeline(one: Panel) -> statetimeline.Panel:
    legend = (
        common.VizLegendOptions().show_legend(False).display_mode(options.LegendDisplayMode.LIST).placement("bottom")
    )
    return (
        statetimeline.Panel()
        .legend(legend.calcs([]))
        .merge_values(True)
        .show_value(options.VisibilityMode.AUTO)
        .row_height(0.8)
    )


def _newest() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _table(one: Panel) -> table.Panel:
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True, "instance": True}
    tidy = model.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    return table.Panel().with_transformation(tidy)


_KINDS = {"timeseries": _lines, "stat": _number, "bargauge": _bars, "state-timeline": _timeline, "table": _table}
