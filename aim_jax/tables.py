"""What the report says of runs: groups of them, and tables of text."""

import json
import math
import os
import pathlib
import shlex
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import aim_jax
from aim_jax import config, published, records

WHOLE = 3  # values of a list shown in full
NAMED = 3  # settings that tell groups of one method apart
SEEDS = ("train.seed", "data.seed")
SCORES = ("op", "fwt", "bwt")
LIMITS = ("data.limit_train", "data.limit_dev", "data.limit_test")
QUOTED = 8  # published results in sight
NONE = "\N{EN DASH}"

LEGEND = (
    "OP: mean score over all tasks after the last one. BWT: what earlier tasks gained"
    " (lost, if negative) since they were learnt. FWT: what a task scores when just learnt,"
    " less its score when trained alone. Runs that differ only in seed share a row: mean"
    f" \N{PLUS-MINUS SIGN} sample standard deviation. {NONE}: not known (yet). Best OP first."
    " Tokens/s: of the tasks' own batches, without padding, over all of training, with"
    " rehearsal, probes, validation and compilation."
)
COSTS = (
    "Means over seeds. Probes: losses on a memory batch. Extra memory: what a method keeps"
    " beside the adapter and its optimizer (arrays, and the text of remembered rows). Extra"
    " FLOPs: by tokens without padding, one probed, or read or written to make rows of the"
    " memory, as half a trained one, beyond what the cheapest run on the same rows trains on."
)
HELD_OUT = (
    "Tasks that no run trains on: what the stream did to the rest of the model. Before: the"
    " base, with the adapter of lora.path where a stream starts from one. Means over seeds."
)
PUBLISHED = (
    "Confidence: direct, read in the source; secondary, in a transcription of it; derived,"
    " computed from its numbers. Other data, epochs and seeds than here, unless noted."
)


class Group(NamedTuple):
    """Runs that differ only in seed."""

    label: str
    runs: list[records.Run]


class Stat(NamedTuple):
    """Mean and sample standard deviation (None of one value) over `n` runs."""

    mean: float
    std: float | None
    n: int


class Table(NamedTuple):
    """Text in cells; the first `left` and last `right` columns hold words, others numbers.

    fold: how many rows a page shows at first.
    """

    head: list[str]
    rows: list[list[str]]
    left: int = 1
    right: int = 0
    fold: int | None = None

    def numbers(self) -> range:
        """Places of the columns that hold numbers."""
        return range(self.left, len(self.head) - self.right)


class Section(NamedTuple):
    """A titled table and what to know about it."""

    title: str
    table: Table
    note: str


def group(runs: Sequence[records.Run]) -> list[Group]:
    """`runs` in groups that differ only in seed, labelled by method and what sets it apart.

    A run with the seeds of another gets a note: as a second seed it would say too much.
    """
    groups: dict[str, list[records.Run]] = {}
    for run in runs:
        same = [run.method, _settings(run) or [run.names, str(run.path)]]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    labelled = []
    for members in groups.values():
        first: dict[str, records.Run] = {}
        for run in counted(members):
            twin = first.setdefault(str([run.settings.get(s) for s in SEEDS]), run)
            if twin is not run:
                run.notes.append(
                    f"it has the settings and seeds of {twin.path}, so means and deviations"
                    " count these seeds twice"
                )
        method = members[0].method
        peers = [_settings(g[0]) for g in groups.values() if g[0].method == method]
        own = _settings(members[0])
        apart = [f"{k}={own.get(k, 'unset')}" for k in varied(peers)]
        if len(peers) > 1 and not 0 < len(apart) <= NAMED:
            paths = [str(run.path) for run in members]
            shared = f"{os.path.commonprefix(paths)}*" if paths[1:] else paths[0]
            apart = [*apart[:NAMED], shared]
        label = f"{method} ({', '.join(apart)})" if apart else method
        labelled.append(Group(label, members))
    return labelled


def varied(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Paths whose values differ among `settings`, in alphabetical order."""
    paths = sorted(set().union(*settings))
    return [p for p in paths if len({json.dumps(s.get(p)) for s in settings}) > 1]


def counted(runs: Sequence[records.Run]) -> Sequence[records.Run]:
    """Those that means count: the finished ones, if there are any."""
    return [r for r in runs if r.finished] or runs


def stat(runs: Sequence[records.Run], figure: str) -> Stat | None:
    """Mean and sample standard deviation of one of the `figures` of runs.

    None if nobody knows the figure.
    """
    known = [v for r in counted(runs) if (v := r.figures[figure]) is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Stat(statistics.fmean(known), std, len(known))


def ranked(groups: Sequence[Group]) -> list[Group]:
    """`groups` by their mean OP, best first; those without one come last."""

    def rank(group: Group) -> float:
        value = stat(group.runs, "op")
        return -math.inf if value is None else value.mean

    return sorted(groups, key=rank, reverse=True)


def overview(groups: Sequence[Group]) -> list[Section]:
    """Tables about all runs. Where nothing is published for them, the note says so."""
    runs = [run for g in groups for run in g.runs]
    found = [
        Section("Results", results_table(groups), LEGEND),
        Section("Costs", costs_table(groups), COSTS),
        Section("Held-out tasks", held_out_table(groups), HELD_OUT),
    ]
    quoted = Section("Published results", published_table(runs), published_note(runs))
    return [s for s in found if s.table.rows] + ([quoted] if quoted.note else [])


def results_table(groups: Sequence[Group]) -> Table:
    """A row a group: scores in percent as mean and deviation over its seeds, and costs."""
    head = ["method", "OP %", "FWT %", "BWT %", "minutes", "tokens/s", "merges", "runs"]
    rows = []
    for label, runs in ranked(groups):
        left = sum(not r.finished for r in runs)
        rows.append(
            [label]
            + [_percent(runs, k) for k in SCORES]
            + [_mean(runs, "minutes", ".1f"), _mean(runs, "tokens_per_second")]
            + [_mean(runs, "merges", ".1f").removesuffix(".0")]
            + [f"{len(runs)}" + (f", {left} unfinished" if left else "")]
        )
    return Table(head, rows)


def costs_table(groups: Sequence[Group]) -> Table:
    """A row a group, best OP first: what its scores took. Empty if no run knows that."""
    head = ["rank", "method", "OP %", "FWT %", "BWT %", "optimizer steps"]
    head += ["rehearsal steps", "probes", "extra memory", "extra FLOPs", "minutes"]
    rows = []
    for number, (label, runs) in enumerate(ranked(groups), 1):
        memory, extra = stat(runs, "extra_bytes"), extra_flops(runs, groups)
        rows.append(
            [str(number), label]
            + [_percent(runs, k) for k in SCORES]
            + [_mean(runs, k) for k in ("steps", "rehearsal_steps", "probes")]
            + [NONE if memory is None else _size(memory.mean)]
            + [NONE if extra is None else f"{100 * extra:.0f} %"]
            + [_mean(runs, "minutes", ".1f")]
        )
    known = any(stat(g.runs, "steps") for g in groups)
    return Table(head, rows if known else [], left=2)


def extra_flops(runs: Sequence[records.Run], groups: Sequence[Group]) -> float | None:
    """Computation of `runs` beyond the cheapest training on their rows, as part of it.

    Of finished runs alone: what others have done so far is on fewer rows.
    """

    def rows(runs: Sequence[records.Run]) -> tuple[list[str], Any, bool]:
        done = any(run.finished for run in runs)
        return runs[0].names, runs[0].settings.get("data.limit_train"), done

    own = stat(runs, "token_passes")
    alike = [g.runs for g in groups if rows(g.runs) == rows(runs)]
    trained = [s.mean for r in alike if (s := stat(r, "train_tokens")) and s.mean]
    known = own and own.mean and trained and rows(runs)[-1]
    return own.mean / min(trained) - 1 if known else None


def held_out_table(groups: Sequence[Group]) -> Table:
    """A row a held-out task and group: its score before the stream and after it."""
    rows = []
    for label, runs in ranked(groups):
        kept = [
            k for r in runs if (k := r.results.get("before_after")) and "after" in k
        ]
        # A folder may have had other tasks when another seed was run.
        for task in dict.fromkeys(task for k in kept for task in k["before"]):
            own = [k for k in kept if task in k["before"]]
            before, after = (
                statistics.fmean(k[when][task] for k in own)
                for when in ("before", "after")
            )
            cells = [*map(score, (before, after)), f"{100 * (after - before):+.1f}"]
            rows.append([task, label, *cells, str(len(own))])
    head = ["held-out task", "method", "before %", "after %", "change", "runs"]
    return Table(head, sorted(rows, key=lambda row: row[0]), left=2)


def runs_table(groups: Sequence[Group]) -> Table:
    """A row a run."""
    head = ["run", "folder", "state", "OP %", "FWT %", "BWT %", "minutes", "tokens/s"]
    rows = [
        [name, str(run.path), run.progress]
        + [_percent([run], k) for k in SCORES]
        + [_mean([run], "minutes", ".1f"), _mean([run], "tokens_per_second")]
        for name, run in named(groups)
    ]
    return Table(head, rows, left=3)


def published_table(runs: Sequence[records.Run]) -> Table:
    """A row a published result that matches `runs`, with its source and confidence."""
    head = ["method", "model", "OP %", "FWT %", "BWT %"]
    rows = [
        [e["method"], e["model"]]
        + [NONE if e[k] is None else f"{e[k]:.1f}" for k in SCORES]
        + [str(e["order"] or "mean"), e["source"], e["confidence"], e["note"]]
        for e in published.matching(runs)
    ]
    head += ["order", "source", "confidence", "note"]
    return Table(head, rows, left=2, right=4, fold=QUOTED)


def published_note(runs: Sequence[records.Run]) -> str:
    """What to know before comparing with published numbers; empty if there are none."""
    if published.matching(runs):
        limited = limits(runs)
        more = f" Runs on this page are limited: {limited}." if limited else ""
        return PUBLISHED + more
    others = {e["model"] for run in runs for e in published.same_benchmark(run)}
    if not others:
        return ""
    names = {pathlib.PurePath(str(r.settings.get("model.path"))).name for r in runs}
    return (
        f"Nothing for this benchmark on {', '.join(sorted(names))}; there are numbers for"
        f" {', '.join(sorted(others))}."
    )


def limits(runs: Sequence[records.Run]) -> str:
    """What keeps `runs` from being whole runs of their benchmark; empty if nothing does."""
    found = {
        f"{path}={run.settings[path]}"
        for run in runs
        for path in LIMITS
        if run.settings.get(path) is not None
    }
    return ", ".join(sorted(found))


def data_table(run: records.Run) -> Table:
    """A row a task: how many rows a run used, and what became of its leaks."""
    used = run.results.get("rows") or {}
    fields = list(next(iter(used.values()), ()))
    rows = [[name, *(str(v.get(f, NONE)) for f in fields)] for name, v in used.items()]
    return Table(["task", *(f.replace("_", " ") for f in fields)], rows)


def matrix_table(run: records.Run) -> Table:
    """Scores in percent after each task, and those of the single-task runs."""
    rows = [
        [f"after {name}", *map(score, values)]
        for name, values in zip(run.names, run.matrix, strict=False)
    ]
    if run.single:
        rows.append(["single task", *map(score, run.single)])
    return Table(["score %", *run.names], rows)


def named(groups: Sequence[Group]) -> list[tuple[str, records.Run]]:
    """(name, run) of all runs, the names made of method and seed."""
    pairs = []
    for label, runs in groups:
        seeds = [r.seed for r in runs]
        for run in runs:
            name = label if run.seed is None else f"{label}, seed {run.seed}"
            clear = run.seed is not None and seeds.count(run.seed) == 1
            unique = clear or len(runs) == 1
            pairs.append((name if unique else f"{name}, {run.path}", run))
    return pairs


def merges_table(task: records.Task) -> Table:
    """A row a merge: all that merges.jsonl has of it."""
    fields = [k for k in task.merges[0] if k not in ("task", "name")]
    rows = [[_value(r.get(k)) for k in fields] for r in task.merges]
    return Table([k.replace("_", " ") for k in fields], rows, left=0)


def differences_table(runs: Sequence[tuple[str, records.Run]]) -> Table:
    """A row a setting that is not the same in all of the named `runs`."""
    paths = varied([r.settings for _, r in runs])
    rows = [[p, *(_value(r.settings.get(p)) for _, r in runs)] for p in paths]
    return Table(["field", *(name for name, _ in runs)], rows, left=len(runs) + 1)


def facts(run: records.Run) -> list[tuple[str, str]]:
    """What a run is, in names and values."""
    return [
        ("method", run.method),
        ("stream", f"{run.stream}: {', '.join(run.names)}"),
        ("seed", "unknown" if run.seed is None else str(run.seed)),
        ("model", str(run.settings.get("model.path", "unknown"))),
        ("data", _data(run)),
        ("scoring", run.results.get("scoring", "of the run")),
        ("files", f"{run.path}, {run.date}"),
        ("command", command(run) or "unknown: there is no config.json"),
    ]


def _data(run: records.Run) -> str:
    """Rows a run used, and its leaks, in one line."""
    used = list((run.results.get("rows") or {}).values())
    if not used:
        return "unknown"
    total = {k: sum(rows.get(k, 0) for rows in used) for k in used[0]}
    sizes = " / ".join(f"{total.get(s, 0)} {s}" for s in ("train", "dev", "test"))
    text = f"{sizes} rows; {total.get('dropped', 0)} dropped because of leaks"
    text += f", {total.get('dev_in_test', 0)} of the dev rows are test rows"
    return f"{text}; limits: {limits([run])}" if limits([run]) else text


def command(run: records.Run) -> str | None:
    """The command that repeats `run`: a config file and what the run set differently."""
    if run.results.get("command") or not run.settings:
        return run.results.get("command")
    benchmark = run.settings.get("data.benchmark", "synthetic")
    name = "quickstart" if benchmark in ("synthetic", "custom") else benchmark
    file = pathlib.Path(aim_jax.__file__).parents[1] / "configs" / f"{name}.py"
    chosen = ("method.name", "method.preset")
    choices = [f"{k}={run.settings[k]}" for k in chosen if k in run.settings]
    try:
        base = config.load(str(file), choices)
    except aim_jax.InputError:
        base = config.Config()
    usual = records.flatten(config.to_json(base))
    words = ["python", "-m", "aim_jax.main", "--config", f"configs/{name}.py"]
    for path, value in run.settings.items():
        if value != usual.get(path) or path in chosen:
            words += ["--set", f"{path}={_flag(value)}"]
    return shlex.join([*words, "--workdir", "DIR"])


def text(table: Table) -> str:
    """A table for a terminal."""
    widths = [
        max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in table.numbers() else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [table.head, *table.rows]
    )


def _percent(runs: Sequence[records.Run], field: str) -> str:
    """Mean and deviation in percent; of how many of `runs`, if not of all."""
    value = stat(runs, field)
    if value is None:
        return NONE
    text = score(value.mean)
    if value.std is not None:
        text += f" \N{PLUS-MINUS SIGN} {100 * value.std:.1f}"
    text += "" if value.n == len(runs) else f" (n={value.n})"
    return text if any(r.finished for r in runs) else f"{text} so far"


def _mean(runs: Sequence[records.Run], figure: str, form: str = ".0f") -> str:
    value = stat(runs, figure)
    return NONE if value is None else f"{value.mean:{form}}"


def _size(count: float) -> str:
    """A number of bytes in decimal units."""
    power = min(3, int(math.log10(max(count, 1)) // 3))
    number = f"{count / 1000**power:.{min(power, 1)}f}"
    return f"{number} {('B', 'kB', 'MB', 'GB')[power]}"


def score(value: float | None) -> str:
    """A score in percent."""
    return NONE if value is None else f"{100 * value:.1f}"


def _value(value: Any) -> str:
    """A value of a record, as short as it stays useful."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > WHOLE:
        return f"{_value(value[0])} \N{HORIZONTAL ELLIPSIS} {_value(value[-1])}"
    if isinstance(value, list):
        return " / ".join(map(_value, value))
    return str(value)


def _flag(value: Any) -> str:
    """A config value as `--set` reads it."""
    if isinstance(value, list):
        return ",".join(map(_flag, value))
    return str(value).lower() if value is None or value in (True, False) else str(value)


def _settings(run: records.Run) -> dict[str, Any]:
    """Settings that tell experiments apart: neither seeds nor incidental ones."""
    return {
        k: v
        for k, v in run.settings.items()
        if k not in SEEDS and k.split(".")[0] not in config.INCIDENTAL
    }
