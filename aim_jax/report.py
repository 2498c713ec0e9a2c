"""The report of runs, finished or not: one page that opens without a network.

    python -m aim_jax.report DIR [DIR ...] --out FILE.html [--scoring SCHEME]

DIR is the folder of a run, or one that holds such folders, at any depth up to three. FILE.md and FILE.json beside the
page hold its tables. The page of a single run, written into the folder of that run, leaves
its charts as files in DIR/plots/ too. SCHEME scores the predictions anew, without a model:
`sound`, or `release` as the PyTorch release's scripts do, with options behind commas
(`metrics.scheme`): `sound,bwt_over=all`.
"""

import contextlib
import html
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import app, flags

import aim_jax
from aim_jax import config, plots, published, records, rescore, svg

PREDICTIONS = 50  # rows shown of a task
LETTERS = 400  # shown of an input
WHOLE = 3  # values of a list shown in full
NAMED = 3  # settings that tell groups of one method apart
OPEN = 2  # runs whose sections are open at first
DETAILED = 12  # runs that are shown with their signals, merges and predictions
MAPS = 6  # score matrices in sight
QUOTED = 8  # published results shown at first
SEEDS = ("train.seed", "data.seed")
SCORES = ("op", "fwt", "bwt")
LIMITS = ("data.limit_train", "data.limit_dev", "data.limit_test")
NONE = "\N{EN DASH}"

_LEGEND = (
    "OP: mean score over all tasks after the last one. BWT: what earlier tasks gained"
    " (lost, if negative) since they were learnt. FWT: what a task scores when just learnt,"
    " less its score when trained alone. Runs that differ only in seed share a row: mean"
    f" \N{PLUS-MINUS SIGN} sample standard deviation. {NONE}: not known (yet). Best OP first."
)
_COSTS = (
    "Means over seeds. Probes: losses on a memory batch. Extra memory: what a method keeps"
    " beside the adapter and its optimizer (arrays, and the text of remembered rows). Extra"
    " FLOPs: by tokens without padding, a probed one as half a trained one, beyond what"
    " the cheapest run on the same stream trains on. Tokens/s: of the tasks' own batches"
    " over all of training, with rehearsal, probes, validation and compilation."
)
_HELD_OUT = (
    "Tasks that no run trains on: what the stream did to the rest of the model. Before: the"
    " base as it is. Means over seeds."
)
_PUBLISHED = (
    "Confidence: direct, read in the source; secondary, in a transcription of it; derived,"
    " computed from its numbers. Other data, epochs and seeds than here, unless noted."
)
_STYLE = """
* { box-sizing: border-box }
html { background: var(--page); color: var(--ink) }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0 auto;
  max-width: 1240px; padding: 1rem clamp(.75rem, 2vw, 2rem) 3rem }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .5rem 0 0 }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem }
small, .note, header p, nav { color: var(--soft) } small { font-weight: 400 }
.note { font-size: .85rem; max-width: 100ch; margin: .5rem 0 } .bad { color: var(--bad) }
header p { margin: .3rem 0 } nav a { margin-right: .9em; white-space: nowrap }
a { color: var(--c0) }
.table { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 600; white-space: nowrap }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)) }
.grid.wide { grid-template-columns: 1fr }
figure { margin: 0; overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px }
figure svg { display: block; height: auto; width: 100%; max-width: 46rem; min-width: 24rem }
.wide svg { max-width: none; min-width: 42rem }
.maps { display: flex; flex-wrap: wrap } .maps svg { zoom: 1.2; width: auto; max-width: none; min-width: 0 }
details { margin: .4rem 0 } summary { cursor: pointer }
details > .table, details > .predictions { max-height: 34rem; overflow: auto }
details > .table table { font-size: .82rem }
details th { position: sticky; top: 0; background: var(--page) }
.quoted td:nth-child(-n+2) { white-space: nowrap }
.run { border-top: 2px solid var(--rule); margin-top: 2rem }
.run > summary > h2 { display: inline-block; margin: .8rem 0 .3rem }
.tag { font-size: .8rem; font-weight: 600; color: var(--bad); border: 1px solid;
  border-radius: 4px; padding: .1rem .4rem; margin-left: .4rem; vertical-align: middle }
dl { scroll-margin-top: 5rem; display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .3rem 0 1rem }
dt { color: var(--soft) } dd { margin: 0; min-width: 0; overflow-wrap: anywhere }
code { font: .87em ui-monospace, "DejaVu Sans Mono", monospace }
.predictions table { font-size: .82rem; min-width: 44rem }
.predictions td { overflow-wrap: anywhere; white-space: pre-wrap }
.predictions td:nth-child(2) { width: 50% } .predictions td:first-child { min-width: 7em }
@media print {
  body { max-width: none; padding: 0; font-size: 11px } nav { display: none }
  .grid:not(.wide, .maps) { grid-template-columns: 1fr 1fr }
  figure svg, .wide svg { min-width: 0 }
  figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  .heat { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  details > .table, details > .predictions { max-height: none; overflow: visible }
}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


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
    """Text in cells; the first `left` and last `right` columns hold words, others numbers."""

    head: list[str]
    rows: list[list[str]]
    left: int = 1
    right: int = 0

    def numbers(self) -> range:
        """Places of the columns that hold numbers."""
        return range(self.left, len(self.head) - self.right)


def write(
    dirs: Sequence[pathlib.Path], out: pathlib.Path, scoring: str | None = None
) -> None:
    """Write the page `out` about the runs in `dirs`, and its twins beside it.

    scoring: a scheme by which predictions are scored anew (`metrics.scheme`).
    Raises InputError before anything is written if a folder or a file is no good.
    """
    if out.suffix != ".html" or out.is_dir():
        raise aim_jax.InputError(f"--out {out}: must be a file that ends in .html")
    groups = load(dirs, scoring)
    runs = [run for g in groups for run in g.runs]
    twins = {out.with_suffix(s) for s in (".md", ".json")}
    for run in runs:
        for name in ("config.json", "results.json"):
            if (run.path / name).resolve() in {t.resolve() for t in twins}:
                raise aim_jax.InputError(
                    f"--out {out}: its JSON twin would replace {run.path / name};"
                    " choose another name"
                )
    summary = to_json(groups)
    files = {
        out.with_suffix(".md"): markdown(groups),
        out.with_suffix(".json"): json.dumps(summary, indent=1, allow_nan=False) + "\n",
        out: page(groups),
    }
    if len(runs) == 1 and out.parent.resolve() == runs[0].path.resolve():
        for name, drawing in plots.of_run(runs[0]).items():
            files[out.parent / "plots" / f"{name}.svg"] = svg.standalone(drawing)
    _replace(files)


def load(dirs: Sequence[pathlib.Path], scoring: str | None = None) -> list[Group]:
    """The runs in and below `dirs`, in groups. Raises InputError as `records`."""
    runs = [records.load(path) for path in records.find(dirs)]
    return group([rescore.rescore(r, scoring) for r in runs] if scoring else runs)


# Tables


def group(runs: Sequence[records.Run]) -> list[Group]:
    """`runs` in groups that differ only in seed, labelled by method and what sets it apart."""
    groups: dict[str, list[records.Run]] = {}
    for run in runs:
        same = [run.method, _settings(run) or [run.names, str(run.path)]]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    labelled = []
    for members in groups.values():
        method = members[0].method
        peers = [_settings(g[0]) for g in groups.values() if g[0].method == method]
        own = _settings(members[0])
        apart = [f"{k}={own.get(k, 'unset')}" for k in varied(peers)]
        if len(peers) > 1 and not 0 < len(apart) <= NAMED:
            apart = [*apart[:NAMED], members[0].path.name]
        label = f"{method} ({', '.join(apart)})" if apart else method
        labelled.append(Group(label, members))
    return labelled


def varied(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Paths whose values differ among `settings`, in alphabetical order."""
    paths = sorted(set().union(*settings))
    return [p for p in paths if len({json.dumps(s.get(p)) for s in settings}) > 1]


def stat(runs: Sequence[records.Run], figure: str) -> Stat | None:
    """Mean and sample standard deviation of one of the `figures` of runs.

    Only finished runs count, if there are any; None if nobody knows the figure.
    """
    done = [r for r in runs if r.finished] or runs
    known = [v for r in done if (v := r.figures[figure]) is not None]
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


def costs_table(groups: Sequence[Group]) -> Table | None:
    """A row a group, best OP first: what its scores took. None if no run knows that."""
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
    return Table(head, rows, left=2) if known else None


def extra_flops(runs: Sequence[records.Run], groups: Sequence[Group]) -> float | None:
    """Computation of `runs` beyond the cheapest training on their stream, as part of it."""
    own = stat(runs, "token_passes")
    alike = [g.runs for g in groups if g.runs[0].names == runs[0].names]
    trained = [s.mean for r in alike if (s := stat(r, "train_tokens"))]
    return own.mean / min(trained) - 1 if own and any(trained) else None


def held_out_table(groups: Sequence[Group]) -> Table | None:
    """Scores on the held-out tasks before the stream and after it, in percent.

    The scores before are those of the base, so runs of another base have a row of theirs.
    """
    rows = []
    for label, runs in ranked(groups):
        kept = [
            k for r in runs if (k := r.results.get("before_after")) and "after" in k
        ]
        for task in kept[0]["before"] if kept else ():
            before, after = (
                statistics.fmean(k[when][task] for k in kept)
                for when in ("before", "after")
            )
            cells = [*map(_score, (before, after)), f"{100 * (after - before):+.1f}"]
            rows.append([task, label, *cells, str(len(kept))])
    head = ["held-out task", "method", "before %", "after %", "change", "runs"]
    return Table(head, sorted(rows, key=lambda row: row[0]), left=2) if rows else None


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


def published_table(entries: Sequence[dict[str, Any]]) -> Table:
    """A row an entry of configs/published.json, each with its source and confidence."""
    head = ["method", "model", "OP %", "FWT %", "BWT %"]
    rows = [
        [e["method"], e["model"]]
        + [NONE if e[k] is None else f"{e[k]:.1f}" for k in SCORES]
        + [str(e["order"] or "mean"), e["source"], e["confidence"], e["note"]]
        for e in entries
    ]
    return Table([*head, "order", "source", "confidence", "note"], rows, 2, right=4)


def limits(runs: Sequence[records.Run]) -> str:
    """What keeps `runs` from being whole runs of their benchmark; empty if nothing does."""
    found = {
        f"{path}={run.settings[path]}"
        for run in runs
        for path in LIMITS
        if run.settings.get(path) is not None
    }
    return ", ".join(sorted(found))


def data_table(run: records.Run) -> Table | None:
    """Rows of each task that a run used, and what became of its leaks."""
    used = run.results.get("rows")
    if not used:
        return None
    fields = list(next(iter(used.values())))
    rows = [[name, *(str(v.get(f, NONE)) for f in fields)] for name, v in used.items()]
    return Table(["task", *(f.replace("_", " ") for f in fields)], rows)


def matrix_table(run: records.Run) -> Table:
    """Scores in percent after each task, and those of the single-task runs."""
    rows = [
        [f"after {name}", *map(_score, values)]
        for name, values in zip(run.names, run.matrix, strict=False)
    ]
    if run.single:
        rows.append(["single task", *map(_score, run.single)])
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
            pairs.append((name if unique else f"{name}, {run.path.name}", run))
    return pairs


def to_json(groups: Sequence[Group]) -> dict[str, Any]:
    """All tables as plain JSON types; scores are fractions, NaN becomes null."""
    summary = []
    for label, runs in groups:
        row: dict[str, Any] = {"label": label, "method": runs[0].method}
        row |= {"n": len(runs), "unfinished": sum(not r.finished for r in runs)}
        row["seeds"] = [r.seed for r in runs]
        for key in runs[0].figures:
            value = stat(runs, key)
            row[key] = value._asdict() if value else None
        summary.append(row | {"extra_flops": extra_flops(runs, groups)})
    known = (
        "single",
        "before_after",
        "rows",
        "work",
        "seconds",
        "versions",
        "config_sha256",
    )
    detail = [
        {"name": name, "folder": str(run.path), "method": run.method, "seed": run.seed}
        | {"stream": run.stream, "tasks": run.names, "date": run.date}
        | {"finished": run.finished, "state": run.progress, "notes": run.notes}
        | run.figures
        | {"matrix": run.matrix}
        | {key: run.results.get(key) for key in known}
        | {"config": run.settings, "command": command(run)}
        for name, run in named(groups)
    ]
    matches = published.matching(run for g in groups for run in g.runs)
    return _plain({"summary": summary, "published": matches, "runs": detail})


def markdown(groups: Sequence[Group]) -> str:
    """The tables of the page as Markdown."""
    runs = [run for g in groups for run in g.runs]
    parts = ["# Runs", _markdown(results_table(groups)), _LEGEND]
    costs, matches = costs_table(groups), published.matching(runs)
    if costs:
        parts += ["## Costs", _markdown(costs), _COSTS]
    held_out = held_out_table(groups)
    if held_out:
        parts += ["## Held-out tasks", _markdown(held_out)]
    if matches:
        parts += ["## Published", _markdown(published_table(matches)), _PUBLISHED]
    if published_note(runs):
        parts.append(published_note(runs))
    if sum(len(g.runs) for g in groups) > len(groups):
        parts += ["## Each run", _markdown(runs_table(groups))]
    for name, run in named(groups):
        state = "" if run.finished else f" ({run.progress})"
        facts = [f"- {k}: {v}" for k, v in _facts(run) if k != "command"]
        parts += [f"## {_cell(name)}{state}", "\n".join(map(_cell, facts))]
        parts += [f"```sh\n{command(run)}\n```"] if command(run) else []
        parts += [_markdown(matrix_table(run))] if run.matrix else []
        data = data_table(run)
        parts += ["Rows used:", _markdown(data)] if data else []
    return "\n\n".join(parts) + "\n"


def published_note(runs: Sequence[records.Run]) -> str:
    """What to know before comparing with published numbers; empty if there are none."""
    matches = published.matching(runs)
    others = {e["model"] for run in runs for e in published.same_benchmark(run)}
    if not matches and others:
        names = {pathlib.PurePath(str(r.settings.get("model.path"))).name for r in runs}
        return (
            f"No number is published for this benchmark and {', '.join(sorted(names))};"
            f" there are some for {', '.join(sorted(others))}."
        )
    limited = limits(runs) if matches else ""
    return f"Runs on this page are limited: {limited}." if limited else ""


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


def command(run: records.Run) -> str | None:
    """The command that repeats `run`: a config file and what the run set differently."""
    if run.results.get("command") or not run.settings:
        return run.results.get("command")
    benchmark = run.settings.get("data.benchmark", "synthetic")
    name = "quickstart" if benchmark == "synthetic" else benchmark
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


# The page


def page(groups: Sequence[Group]) -> str:
    """The whole page as HTML."""
    runs = named(groups)
    streams = " / ".join(dict.fromkeys(r.stream for _, r in runs))
    methods = list(dict.fromkeys(r.method for _, r in runs))
    what = ", ".join(methods) if len(methods) < 5 else f"{len(methods)} methods"
    title = f"{what} on {streams}"
    parts = [f"<header><h1>{_e(title)}</h1><p>{_sources(runs)}</p>"]
    if len(runs) > 1:
        links = (f'<a href="#run-{i}">{_e(n)}</a>' for i, (n, _) in enumerate(runs, 1))
        parts.append(f"<nav>Runs: {' '.join(links)}</nav>")
    parts.append(f"</header><h2>Results</h2>{_html(results_table(groups))}")
    parts.append(f'<p class="note">{_e(_LEGEND)}</p>')
    costs = costs_table(groups)
    if costs:
        parts.append(f"<h2>Costs</h2>{_html(costs)}")
        parts.append(f'<p class="note">{_e(_COSTS)}</p>')
    held_out = held_out_table(groups)
    if held_out:
        parts.append(f"<h2>Held-out tasks</h2>{_html(held_out)}")
        parts.append(f'<p class="note">{_e(_HELD_OUT)}</p>')
    parts += _published([run for _, run in runs])
    if len(runs) > len(groups):
        parts.append(_details("Each run", _html(runs_table(groups))))
    if varied([r.settings for _, r in runs]):
        parts.append(_details("Settings that differ", _html(_differences(runs))))
    curves = []
    for stream in dict.fromkeys(tuple(r.names) for _, r in runs if r.matrix):
        alike = [
            (label, [r for r in members if r.matrix and tuple(r.names) == stream])
            for label, members in groups
        ]
        alike = [(label, members) for label, members in alike if members]
        quoted = [
            (f"{e['method']}, published", e["first_task"])
            for e in published.matching(run for _, members in alike for run in members)
            if len(e.get("first_task", ())) == len(stream)
        ]
        curves.append(plots.task_curve(alike, first=True, quoted=quoted))
        curves.append(plots.task_curve(alike, first=False))
    if curves:
        parts.append(f"<h2>Scores over the stream</h2>{_grid(curves)}")
    maps = [plots.score_matrix(n, r) for n, r in runs if r.matrix]
    if maps:
        parts.append(f"<h2>Score matrices</h2>{_grid(maps[:MAPS], 'maps')}")
    if maps[MAPS:]:
        more = _grid(maps[MAPS:], "maps")
        parts.append(_details(f"{len(maps[MAPS:])} more", more))
    if len(runs) > DETAILED:
        parts.append(
            f'<p class="note">Signals, merges and predictions of the {len(runs)} runs are'
            " on pages of their own: report.html in the folder of each.</p>"
        )
    for i, (name, run) in enumerate(runs, 1):
        parts.append(_run_section(i, name, run, len(runs)))
    return _PAGE.format(title=_e(title), style=svg.CSS + _STYLE, body="\n".join(parts))


def _published(runs: Sequence[records.Run]) -> list[str]:
    """The published results that match `runs`, the first of them in sight."""
    table, note = published_table(published.matching(runs)), published_note(runs)
    parts = []
    if table.rows:
        first = table._replace(rows=table.rows[:QUOTED])
        rest = table._replace(rows=table.rows[QUOTED:])
        more = _details(f"{len(rest.rows)} more", _html(rest)) if rest.rows else ""
        parts.append("<h2>Published results</h2>")
        parts.append(f'<div class="quoted">{_html(first)}{more}</div>')
        parts.append(f'<p class="note">{_e(_PUBLISHED)}</p>')
    if note:
        parts.append(f'<p class="note">{_e(note)}</p>')
    return parts


def _run_section(number: int, name: str, run: records.Run, count: int) -> str:
    """What there is to say of one of `count` runs; less if they are many."""
    facts = "".join(
        f"<dt>{_e(k)}</dt><dd>{_code(v) if k == 'command' else _e(v)}</dd>"
        for k, v in _facts(run)
    )
    parts = [f'<dl id="run-{number}">{facts}</dl>']
    parts += [f'<p class="bad">{_e(note)}</p>' for note in run.notes]
    if count <= DETAILED:
        parts += _training(number, run)
    if count <= DETAILED and any(t.predictions for t in run.tasks):
        parts.append("<h3>Predictions <small>wrong answers first</small></h3>")
        parts += [_predictions(t) for t in run.tasks if t.predictions]
    parts.append("<h3>Set-up</h3>")
    for title, values in (
        ("Config", run.settings),
        ("Versions", run.results.get("versions")),
        ("Seconds", run.results.get("seconds")),
        ("Work", run.results.get("work")),
    ):
        if values:
            rows = [[k, json.dumps(v)] for k, v in values.items()]
            parts.append(
                _details(title, _html(Table(["field", "value"], rows, left=2)))
            )
    data = data_table(run)
    if data:
        parts.append(_details("Data", _html(data)))
    tag = "" if run.finished else f' <span class="tag">{_e(run.progress)}</span>'
    summary = f"<summary><h2>{_e(name)}{tag}</h2></summary>"
    state = " open" if count <= OPEN else ""
    body = "\n".join(parts)
    return f'<details class="run"{state}>{summary}\n{body}</details>'


def _training(number: int, run: records.Run) -> list[str]:
    """The loss over the stream, and the signals and merges of each task."""
    parts = []
    if any(t.steps for t in run.tasks):
        parts.append(_grid([plots.training_loss(run)], "wide"))
    for task in (t for t in run.tasks if t.steps):
        forced = sum(bool(r.get("forced")) for r in task.merges)
        note = f"{task.steps[-1]['step']} steps"
        note += f", {len(task.merges)} merges" if task.merges else ""
        note += f" ({forced} forced)" if forced else ""
        heading = f"Task {task.number}: {_e(task.name)} <small>{_e(note)}</small>"
        anchor = f"run-{number}-task-{task.number}"
        panels = _grid(list(plots.of_task(task).values()))
        parts.append(f'<h3 id="{anchor}">{heading}</h3>{panels}')
        if task.merges:
            parts.append(_details("Table of merges", _html(_merges_table(task))))
    return parts


def _predictions(task: records.Task) -> str:
    """Rows of a task, worst first, and among equals first those that were right before."""
    rows = sorted(
        task.predictions,
        key=lambda r: (r["score"], -task.before.get(str(r["id"]), r["score"])),
    )
    wrong = [r for r in rows if r["score"] < 1]
    lost = sum(task.before.get(str(r["id"]), r["score"]) > r["score"] for r in wrong)
    table = Table(
        ["id", "input", "label", "prediction", "score", "when learnt"],
        [
            [str(r["id"]), _cut(r["input"]), r["label"], r["prediction"]]
            + [_score(r["score"]), _score(task.before.get(str(r["id"])))]
            for r in rows[:PREDICTIONS]
        ],
        left=4,
    )
    title = f"{task.name}: {len(wrong)} of {len(rows)} not fully right"
    title += f", {lost} of them better just after the task was learnt" if lost else ""
    left, unseen = len(rows) - len(table.rows), max(0, len(wrong) - len(table.rows))
    more = f"{left} more rows are left out, {unseen} of them not fully right."
    more = f'<p class="note">{more}</p>' if left else ""
    return _details(title, f'<div class="predictions">{_html(table)}</div>{more}')


def _sources(runs: Sequence[tuple[str, records.Run]]) -> str:
    dates = sorted(r.date for _, r in runs)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    left = sum(not r.finished for _, r in runs)
    tag = f' <span class="tag">{left} unfinished</span>' if left else ""
    scoring = runs[0][1].results.get("scoring")
    anew = f"; predictions scored anew: {_e(scoring)}" if scoring else ""
    return f"{count}, written {_e(span)}{anew}{tag}"


def _merges_table(task: records.Task) -> Table:
    fields = [k for k in task.merges[0] if k not in ("task", "name")]
    rows = [[_value(r.get(k)) for k in fields] for r in task.merges]
    return Table([k.replace("_", " ") for k in fields], rows, left=0)


def _differences(runs: Sequence[tuple[str, records.Run]]) -> Table:
    paths = varied([r.settings for _, r in runs])
    rows = [[p, *(_value(r.settings.get(p)) for _, r in runs)] for p in paths]
    return Table(["field", *(name for name, _ in runs)], rows, left=len(runs) + 1)


def _facts(run: records.Run) -> list[tuple[str, str]]:
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
    text += f", {total.get('dev_in_test', 0)} dev rows in use are test rows"
    return f"{text}; limits: {limits([run])}" if limits([run]) else text


def _html(table: Table) -> str:
    """A table that scrolls sideways where it must."""
    rows = []
    for tag, cells in [("th", table.head), *(("td", row) for row in table.rows)]:
        line = (
            f"<{tag}{' class=n' if i in table.numbers() else ''}>{_e(c)}</{tag}>"
            for i, c in enumerate(cells)
        )
        rows.append(f"<tr>{''.join(line)}</tr>")
    head, *body = rows
    return (
        f'<div class="table"><table><thead>{head}</thead>'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _markdown(table: Table) -> str:
    rule = ["---:" if i in table.numbers() else "---" for i in range(len(table.head))]
    rows = [table.head, rule, *table.rows]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    """`text` as inert Markdown on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", text)


def _grid(charts: Sequence[str], kind: str = "") -> str:
    figures = "".join(f"<figure>{c}</figure>" for c in charts)
    return f'<div class="grid {kind}">{figures}</div>'


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{body}</details>"


def _code(text: str) -> str:
    return f"<code>{_e(text)}</code>"


def _cut(text: str) -> str:
    left = len(text) - LETTERS
    return text if left <= 0 else f"{text[:LETTERS]} [{left} more letters]"


def _percent(runs: Sequence[records.Run], field: str) -> str:
    """Mean and deviation in percent; of how many of `runs`, if not of all."""
    value = stat(runs, field)
    if value is None:
        return NONE
    text = _score(value.mean)
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


def _score(value: float | None) -> str:
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


def _plain(value: Any) -> Any:
    """`value` with null for what JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(run: records.Run) -> dict[str, Any]:
    """Settings that tell experiments apart: neither seeds nor incidental ones."""
    return {
        k: v
        for k, v in run.settings.items()
        if k not in SEEDS and k.split(".")[0] not in config.INCIDENTAL
    }


def _e(text: str) -> str:
    return html.escape(text)


def _replace(files: dict[pathlib.Path, str]) -> None:
    """Write `files` so that each is there whole or not at all."""
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            _fresh(file).write_text(text, "utf-8", errors="backslashreplace")
        for file in files:
            os.replace(_fresh(file), file)
    except OSError as error:
        raise aim_jax.InputError(f"cannot write {file}: {error.strerror}") from None
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                _fresh(file).unlink()


def _fresh(file: pathlib.Path) -> pathlib.Path:
    return file.with_name(f".{file.name}.new")


def main(argv: Sequence[str]) -> None:
    """The command: absl's arguments in, files out."""
    try:
        if not flags.FLAGS.out:
            raise aim_jax.InputError(
                "--out FILE.html is missing: where to write the page"
            )
        out = pathlib.Path(flags.FLAGS.out)
        write([pathlib.Path(a) for a in argv[1:]], out, flags.FLAGS.scoring)
    except aim_jax.InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(
        f"{out} (tables also in {out.with_suffix('.md')}, {out.with_suffix('.json')})"
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "the page to write, FILE.html")
    flags.DEFINE_string("scoring", None, "score predictions anew: sound, release, ...")
    app.run(main)
