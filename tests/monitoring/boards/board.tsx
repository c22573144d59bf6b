// Draws one board with Grafana's UI library, from a running Prometheus, and reports in the page's title.
// Lines, numbers, bars, frames and legends are the library's. State timelines, tables, headings and marks are drawn
// here, since it has none that work alone: colours and texts of the states still come from its display processor.
import React from 'react';
import { createRoot } from 'react-dom/client';
import { BarGauge, BigValue, ErrorBoundary, GlobalStyles, PanelChrome, ThemeContext, TimeSeries, VizRepeater } from '@grafana/ui';
import {
  createTheme, DataFrame, dateTime, FieldType, getDisplayValueAlignmentFactors, getFieldDisplayName, getFieldDisplayValues,
} from '@grafana/data';
import { VizOrientation } from '@grafana/schema';
import { load, loadMarks, Mark, Page, stepOf } from './data';

const UNIT = 38, GAP = 8; // pixels: one unit of height, and the space between panels
const theme = createTheme({ colors: { mode: 'dark' } });

interface Drawn {
  panel: any; // with its own `gridPos`, title and runs
  frames: DataFrame[];
  error?: string;
}

function Lines({ panel, frames, marks, page, width, height }: any) {
  const timeRange: any = { from: dateTime(page.from * 1000), to: dateTime(page.to * 1000), raw: { from: 'then', to: 'now' } };
  const mine = marks.filter(({ panels }: Mark) => !panels || panels.includes(panel.id));
  const marked = new WeakSet();
  const mark = (builder: any) => {
    if (!marked.has(builder)) builder.addHook('draw', (plot: any) => drawMarks(plot, mine));
    marked.add(builder);
    return null;
  };
  return <TimeSeries {...{ frames, width, height, timeRange }} structureRev={1} timeZone="utc" options={{}}
    tweakScale={(scale: any) => scale} tweakAxis={(axis: any) => axis} legend={panel.options.legend}>{mark}</TimeSeries>;
}

function drawMarks(plot: any, marks: Mark[]) {
  const { ctx, bbox } = plot;
  ctx.save();
  for (const { time, colour } of marks) {
    const x = Math.round(plot.valToPos(time, 'x', true));
    ctx.strokeStyle = ctx.fillStyle = theme.visualization.getColorByName(colour);
    ctx.globalAlpha = 0.45;
    ctx.setLineDash([4, 4]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.globalAlpha = 1;
    ctx.fillRect(x - 2, bbox.top + bbox.height, 5, 4);
  }
  ctx.restore();
}

function Numbers({ panel, frames, width, height }: any) {
  const { options, fieldConfig } = panel;
  const bars = panel.type === 'bargauge';
  const values = () => getFieldDisplayValues({
    data: frames, fieldConfig, reduceOptions: options.reduceOptions, theme, timeZone: 'utc',
    sparkline: options.graphMode === 'area', replaceVariables: (text: string) => text,
  });
  return <VizRepeater {...{ width, height }} source={frames} renderCounter={1} getValues={values} itemSpacing={bars ? 6 : 3}
    getAlignmentFactors={getDisplayValueAlignmentFactors} orientation={bars ? VizOrientation.Horizontal : VizOrientation.Auto}
    maxVizHeight={bars ? 300 : undefined}
    renderValue={({ value, width, height, alignmentFactors, orientation, count }: any) => bars
      ? <BarGauge {...{ theme, width, height, alignmentFactors, orientation }} value={value.display} field={value.field}
          display={value.view?.getFieldDisplayProcessor(value.colIndex ?? 0)} displayMode={options.displayMode} text={options.text} isOverflow={false} />
      : <BigValue {...{ theme, width, height, alignmentFactors, count }} value={value.display} sparkline={value.sparkline}
          colorMode={options.colorMode} graphMode={options.graphMode} justifyMode={options.justifyMode} text={options.text} textMode={options.textMode} />} />;
}

function States({ frames, page, width, height }: any) {
  const names = frames.map((frame: DataFrame) => getFieldDisplayName(frame.fields[1], frame, frames));
  const span = page.to - page.from, bottom = 18, left = 24 + 7 * Math.max(...names.map((name: string) => name.length));
  const rowHeight = Math.min((height - bottom) / Math.max(frames.length, 1), 44);
  const at = (seconds: number) => left + ((seconds - page.from) / span) * (width - left);
  const apart = [60, 300, 900, 3600, 10800, 21600, 86400].find((seconds) => span / seconds <= 12) ?? 604800;
  const ticks = Array.from({ length: Math.floor(span / apart) }, (_, i) => (Math.ceil(page.from / apart) + i) * apart);
  return <div style={{ position: 'relative', width, height, fontSize: 12 }}>
    {frames.map((frame: DataFrame, row: number) => {
      const [time, value] = frame.fields;
      return <React.Fragment key={row}>
        <div style={{ position: 'absolute', top: row * rowHeight, width: left - 8, textAlign: 'right', lineHeight: `${rowHeight}px`, overflow: 'hidden', whiteSpace: 'nowrap' }}>
          {names[row]}</div>
        {stretches(time.values, value.values, stepOf(page)).map(([from, to, number], i) => {
          const shown = value.display!(number);
          return <div key={i} title={shown.text} style={{
            position: 'absolute', top: row * rowHeight + rowHeight * 0.1, height: rowHeight * 0.8, left: at(from), width: Math.max(at(to) - at(from), 2),
            background: shown.color, color: theme.colors.getContrastText(shown.color!), lineHeight: `${rowHeight * 0.8}px`, overflow: 'hidden', paddingLeft: at(to) - at(from) > 60 ? 4 : 0,
            whiteSpace: 'nowrap' }}>{at(to) - at(from) > 7 * shown.text.length ? shown.text : ''}</div>;
        })}
      </React.Fragment>;
    })}
    {ticks.map((seconds, i) => <div key={i} style={{ position: 'absolute', bottom: 0, left: at(seconds) - 18, color: theme.colors.text.secondary }}>
      {dateTime(seconds * 1000).utc().format('HH:mm')}</div>)}
  </div>;
}

function Rows({ frame }: { frame: DataFrame }) {
  const edge = { border: `1px solid ${theme.colors.border.weak}`, padding: '4px 8px', textAlign: 'left' as const };
  return <table style={{ width: '100%', fontSize: 13 }}>
    <thead><tr>{frame.fields.map(({ name }) => <th key={name} style={{ ...edge, color: theme.colors.text.link }}>{name}</th>)}</tr></thead>
    <tbody>{Array.from({ length: frame.length }, (_, i) =>
      <tr key={i}>{frame.fields.map(({ name, values }) => <td key={name} style={edge}>{values[i]}</td>)}</tr>)}</tbody>
  </table>;
}

/** [from, to, value] of equal values one after the other, in seconds. */
function stretches(times: number[], values: Array<number | null>, step: number): Array<[number, number, number]> {
  const found: Array<[number, number, number]> = [];
  times.forEach((time, i) => {
    const last = found.at(-1), seconds = time / 1000;
    if (values[i] === null) return;
    if (last && last[2] === values[i] && seconds - last[1] <= step) last[1] = seconds + step;
    else found.push([seconds, seconds + step, values[i]!]);
  });
  return found;
}

function Body({ drawn, marks, page, width, height }: any) {
  const { panel, frames, error } = drawn;
  if (error) return <div>{error}</div>;
  const given = { panel, frames, marks, page, width, height };
  if (panel.type === 'stat' || (panel.type === 'bargauge' && frames.length)) return <Numbers {...given} />;
  if (!frames.length) return <div style={{ padding: 8 }}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>;
  if (panel.type === 'timeseries') return <Lines {...given} />;
  if (panel.type === 'state-timeline') return <States {...given} />;
  if (panel.type === 'table') return <Rows frame={frames[0]} />;
  return <div>{`no way to draw ${panel.type}`}</div>;
}

/** One panel for each run, side by side, where the board says so. */
function repeated(panel: any, page: Page): Array<{ panel: any; page: Page }> {
  if (!panel.repeat) return [{ panel, page }];
  const w = panel.gridPos.w / page.runs.length;
  return page.runs.map((run, i) => ({
    panel: { ...panel, title: panel.title.replace('$run', run), gridPos: { ...panel.gridPos, w, x: panel.gridPos.x + i * w } }, page: { ...page, runs: [run] },
  }));
}

async function drawnFrom(panel: any, page: Page): Promise<Drawn> {
  const known = ['stat', 'bargauge', 'timeseries', 'state-timeline', 'table'];
  try {
    if (!known.includes(panel.type)) throw new Error(`no way to draw ${panel.type}`);
    return { panel, frames: await load(panel, page, theme) };
  } catch (error: any) {
    return { panel, frames: [], error: String(error.message ?? error) };
  }
}

function Sheet({ board, panels, marks, page, column }: any) {
  const place = ({ x, y, w, h }: any) => ({ position: 'absolute' as const, left: x * column, top: y * UNIT, width: w * column - GAP, height: h * UNIT - GAP });
  return <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    {board.panels.filter(({ type }: any) => type === 'row').map((row: any) =>
      <div key={row.id} style={{ ...place(row.gridPos), fontSize: 16, fontWeight: 500, paddingLeft: 4 }}>{row.title}</div>)}
    {panels.map((drawn: Drawn, i: number) => {
      const at = place(drawn.panel.gridPos);
      return <div key={i} style={at} id={`panel-${i}`}>
        <PanelChrome title={drawn.panel.title} description={drawn.panel.description} width={at.width} height={at.height} statusMessage={drawn.error}>
          {(width: number, height: number) => <ErrorBoundary>{({ error }) => {
            drawn.error ??= error?.stack; // one panel's failure is its own
            return <Body {...{ drawn, marks, page, width, height }} />;
          }}</ErrorBoundary>}
        </PanelChrome>
      </div>;
    })}
  </ThemeContext.Provider>;
}

async function main() {
  const { board, page, width } = (window as any).asked;
  const panels: Drawn[] = await Promise.all(board.panels.filter(({ type }: any) => type !== 'row')
    .flatMap((panel: any) => repeated(panel, page)).map((one: any) => drawnFrom(one.panel, one.page)));
  const marks = await loadMarks(board, page);
  createRoot(document.getElementById('root')!).render(<Sheet {...{ board, panels, marks, page, column: width / 24 }} />);
  await new Promise((drawn) => setTimeout(drawn, 3000));
  panels.forEach((one, i) => { if (!one.error && one.frames.length && !isDrawn(one, i)) one.error = 'nothing was drawn'; });
  const failed = panels.filter(({ error }) => error).map(({ panel, error }) => `${panel.title}: ${error}`);
  const empty = panels.filter(({ frames, error }) => !error && !frames.length).map(({ panel }) => panel.title);
  document.title = JSON.stringify({ rendered: panels.length - failed.length - empty.length, failed, empty, marks: marks.length });
}

/** Whether a panel shows more than its title: lines on their canvas, or words. */
function isDrawn({ panel }: Drawn, i: number): boolean {
  const place = document.getElementById(`panel-${i}`);
  if (panel.type !== 'timeseries') return (place?.innerText ?? '').replace(panel.title, '').trim() !== '';
  const canvas = place?.querySelector('canvas');
  return canvas ? canvas.getContext('2d')!.getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0) : false;
}

main().catch((error) => { document.title = JSON.stringify({ rendered: 0, failed: [String(error.stack)], empty: [], marks: 0 }); });
