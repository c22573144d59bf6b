// What Grafana's dashboard runtime does and its UI library does not: variables, queries, annotations.
import {
  applyFieldOverrides, createDataFrame, DataFrame, FieldConfigOptionsRegistry, FieldType, GrafanaTheme2,
  identityOverrideProcessor, standardTransformers, standardTransformersRegistry, transformDataFrame,
} from '@grafana/data';
import { lastValueFrom } from 'rxjs';

export interface Page {
  prometheus: string; // its address
  from: number; // seconds
  to: number;
  scrape: number; // seconds between two scrapes
  runs: string[]; // those shown
}

export interface Mark {
  time: number; // milliseconds
  colour: string;
  panels?: number[]; // that it is drawn in; all if not given
}

const POINTS = 600;

export function resolve(text: string, page: Page, runs = page.runs): string {
  const step = stepOf(page);
  const values: Record<string, string> = {
    run: runs.map((run) => run.replace(/[.*+?^${}()|[\]\\]/g, '\\\\$&')).join('|'),
    __interval: `${step}s`,
    __rate_interval: `${Math.max(step + page.scrape, 4 * page.scrape)}s`,
    __range: `${page.to - page.from}s`,
  };
  return text.replace(/\$(?:\{(\w+)\}|(\w+))/g, (whole, braced, bare) => values[braced ?? bare] ?? whole);
}

export const stepOf = (page: Page) => Math.max(page.scrape, Math.ceil((page.to - page.from) / POINTS));

async function ask(page: Page, expr: string, instant: boolean): Promise<any[]> {
  const span = { start: String(page.from), end: String(page.to), step: String(stepOf(page)) };
  const words = new URLSearchParams({ query: expr, ...(instant ? { time: span.end } : span) });
  const reply = await fetch(`${page.prometheus}/api/v1/${instant ? 'query' : 'query_range'}`, { method: 'POST', body: words });
  const answer = await reply.json();
  if (answer.status !== 'success') throw new Error(answer.error);
  return answer.data.result.map((series: any) => ({
    labels: series.metric, points: instant ? [series.value] : withGaps(series.values, page),
  }));
}

/** A value or null at every step: Prometheus leaves out what is not there, and a line would be drawn across. */
function withGaps(values: Array<[number, string]>, page: Page): Array<[number, string | null]> {
  const there = new Map(values), step = stepOf(page);
  return Array.from({ length: Math.floor((page.to - page.from) / step) + 1 }, (_, i) => {
    const time = page.from + i * step;
    return [time, there.get(time) ?? null];
  });
}

function toFrame(target: any, labels: Record<string, string>, points: Array<[number, string | null]>): DataFrame {
  const name = target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_: string, label: string) => labels[label] ?? '');
  return createDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: points.map(([time]) => time * 1000) },
      { name: 'Value', type: FieldType.number, labels, config: { displayNameFromDS: name }, values: points.map(([, value]) => value && Number(value)) },
    ],
  });
}

function toTable(target: any, series: any[]): DataFrame {
  const names = [...new Set(series.flatMap(({ labels }) => Object.keys(labels)))];
  const columns = names.map((name) => ({ name, type: FieldType.string, values: series.map(({ labels }) => labels[name] ?? '') }));
  return createDataFrame({ refId: target.refId, fields: [{ name: 'Time', type: FieldType.time, values: series.map(({ points }) => points[0][0] * 1000) }, ...columns] });
}

/** The frames of a panel, with its field options applied by the library. */
export async function load(panel: any, page: Page, theme: GrafanaTheme2): Promise<DataFrame[]> {
  const answers = await Promise.all((panel.targets ?? []).map(async (target: any) => {
    const series = await ask(page, resolve(target.expr, page), Boolean(target.instant));
    if (!series.length) return [];
    return target.format === 'table' ? [toTable(target, series)] : series.map(({ labels, points }) => toFrame(target, labels, points));
  }));
  let frames = answers.flat();
  if (panel.transformations) frames = await lastValueFrom(transformDataFrame(panel.transformations, frames));
  const automatic = { mode: panel.type === 'timeseries' ? 'palette-classic' : 'thresholds' };
  const config = panel.fieldConfig ?? { defaults: {}, overrides: [] };
  const fieldConfig = { overrides: config.overrides ?? [], defaults: { color: automatic, ...config.defaults } };
  const common = { fieldConfig, fieldConfigRegistry: fieldOptions, theme, timeZone: 'utc', replaceVariables: (text: string) => text };
  return applyFieldOverrides({ data: frames, ...common } as any);
}

/** The board's annotations as vertical marks: at the series' value, or where the series is above zero. */
export async function loadMarks(board: any, page: Page): Promise<Mark[]> {
  const lists = await Promise.all(board.annotations.list.filter(({ enable }: any) => enable).map(async (annotation: any) => {
    const series = await ask(page, resolve(annotation.target.expr, page), false);
    const times = series.flatMap(({ points }) => annotation.useValueForTime
      ? points.filter(([, value]: any) => value).map(([, value]: any) => Number(value))
      : points.filter(([, value]: any) => Number(value) > 0).map(([time]: any) => time * 1000));
    const apart = [...new Set<number>(times)].sort((a, b) => a - b).filter((time, i, all) => i === 0 || time - all[i - 1] > stepOf(page) * 1000);
    return apart.map((time) => ({ time, colour: annotation.iconColor, panels: annotation.filter?.ids }));
  }));
  return lists.flat().filter(({ time }: Mark) => time >= page.from * 1000 && time <= page.to * 1000);
}

// The library's registries of field options and of transformations are filled by the application. An option that is
// not listed here would be ignored in silence: test_boards.py holds the list against the boards.
const PLAIN = ['unit', 'decimals', 'min', 'max', 'color', 'thresholds', 'mappings', 'noValue'];
const CUSTOM = [
  'drawStyle', 'lineWidth', 'lineInterpolation', 'lineStyle', 'fillOpacity', 'gradientMode', 'showPoints', 'pointSize',
  'spanNulls', 'stacking', 'axisPlacement', 'axisLabel', 'axisColorMode', 'axisSoftMin', 'axisSoftMax', 'scaleDistribution', 'barAlignment', 'hideFrom',
];
const fieldOption = (path: string, isCustom: boolean): any => ({
  id: isCustom ? `custom.${path}` : path, name: path, path, isCustom, settings: {}, shouldApply: () => true,
  process: identityOverrideProcessor, editor: () => null, override: () => null,
});
const fieldOptions: any = new FieldConfigOptionsRegistry(() => [
  ...PLAIN.map((path) => fieldOption(path, false)), ...CUSTOM.map((path) => fieldOption(path, true)),
]);
standardTransformersRegistry.setInit(() => {
  const { id, name } = standardTransformers.organizeFieldsTransformer;
  return [{ id, name, transformation: standardTransformers.organizeFieldsTransformer, editor: () => null }] as any;
});
