"""The scores of a run from its predictions alone, by any scheme: no model is needed."""

import dataclasses
import functools

import aim_jax
from aim_jax import metrics, records
from aim_jax.data import tasks


def rescore(run: records.Run, scheme: str) -> records.Run:
    """`run` with matrix, single-task scores, OP, BWT and FWT as a scheme has them.

    scheme: as `metrics.scheme` reads it. Matrix, single-task scores and those of single
    predictions are the ones that OP rests on. A score without predictions is None, and so
    is what rests on it. Raises InputError for a bad scheme, prediction file or metric.
    """
    rules = metrics.scheme(scheme)
    stream = [_task(run, number) for number in range(len(run.names))]
    stages = [f"{i:02d}-{name}" for i, name in enumerate(run.names)]

    @functools.cache
    def rows(stage: str, j: int) -> list[records.Row]:
        file = run.path / "predictions" / stage / f"{stream[j].name}.jsonl"
        return records.rows(file, records.PREDICTION, run.finished, [])

    @functools.cache
    def row_scores(stage: str, j: int, scoring: metrics.Scoring) -> list[float]:
        return metrics.score_rows(stream[j], rows(stage, j), scoring)

    def score(stage: str, j: int, scoring: metrics.Scoring) -> float | None:
        scores = row_scores(stage, j, metrics.relevant(stream[j], scoring))
        return metrics.mean(scores, scoring) if scores else None

    def matrix(scoring: metrics.Scoring) -> metrics.Matrix:
        return [
            [
                score(stages[i], j, scoring) if j <= i else None
                for j in range(len(stream))
            ]
            for i in range(len(run.matrix))
        ]

    def single(scoring: metrics.Scoring) -> list[float | None]:
        return [score("single", j, scoring) for j in range(len(stream))]

    def scored(task: records.Task) -> records.Task:
        j = task.number - 1
        scoring = metrics.relevant(stream[j], rules.op)
        last, own = stages[max(len(run.matrix) - 1, 0)], stages[j]
        marks = zip(rows(last, j), row_scores(last, j, scoring), strict=True)
        return task._replace(
            predictions=[row | {"score": value} for row, value in marks],
            before=row_scores(own, j, scoring) or row_scores(last, j, scoring),
        )

    alone = single(rules.op)
    lost = [name for name, v in zip(run.names, alone, strict=True) if v is None]
    results = {
        "matrix": matrix(rules.op),
        "single": None if len(lost) == len(alone) else alone,
        "op": metrics.op(matrix(rules.op)),
        "bwt": metrics.bwt(matrix(rules.bwt), rules.bwt_over),
        "fwt": metrics.fwt(matrix(rules.fwt), single(rules.fwt)),
        "scoring": scheme,
    }
    notes = [f"no predictions of {', '.join(lost)} trained alone: FWT is not known"]
    return dataclasses.replace(
        run,
        results=run.results | results,
        tasks=[scored(t) for t in run.tasks],
        notes=run.notes + (notes if lost and run.single else []),
    )


def _task(run: records.Run, number: int) -> tasks.Task:
    """A task of `run` without its rows: name, metric and remap."""
    name = run.names[number]
    benchmark = tasks.BENCHMARKS.get(
        run.settings.get("data.benchmark"), tasks.Benchmark()
    )
    metric = dict(zip(run.names, run.results.get("metrics") or [], strict=False)).get(
        name, (benchmark.metrics or {}).get(name)
    )
    if metric not in metrics.METRICS:
        raise aim_jax.InputError(
            f"{run.path / 'results.json'}: field 'metrics' has none for task {name}; there"
            f" are {', '.join(metrics.METRICS)}"
        )
    return tasks.Task(name, metric, [], [], [], benchmark.remaps.get(name, {}))
