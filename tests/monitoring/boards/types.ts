// Every board is a Dashboard. Only the annotations are wider than the schema says: it leaves what belongs to a
// data source to that data source, here Prometheus.
import type { AnnotationQuery, Dashboard, DataQuery } from '@grafana/schema';

interface PrometheusQuery extends DataQuery {
  expr: string;
  interval: string;
}

interface PrometheusAnnotation extends AnnotationQuery<PrometheusQuery> {
  expr: string;
  step: string;
  titleFormat: string;
  useValueForTime: boolean;
}

// JSON has no enumerations: each is as good as its values.
type Plain<T> = 0 extends 1 & T ? T
  : T extends string ? `${T}`
  : T extends Array<infer Item> ? Array<Plain<Item>>
  : T extends object ? { [Key in keyof T]: Plain<T[Key]> }
  : T;

export type Board = Plain<Omit<Dashboard, 'annotations'> & { annotations: { list: PrometheusAnnotation[] } }>;
