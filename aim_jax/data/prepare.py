"""Benchmark folders out of what others publish, with a report of what their splits share.

python -m aim_jax.data.prepare --layout LAYOUT --source WHERE --out DIR

writes `DIR/{train,dev,test}/TASK.json`, `DIR/tasks.json` (metrics) and `DIR/report.json`,
and `--set data.root=DIR` reads them. Layouts: `release` (folders of the PyTorch release, or
any that `data.root` reads), `cl_benchmark` (O-LoRA's CL_Benchmark), `superni`
(Super-NaturalInstructions task files) and `hub` (Hugging Face datasets, by a JSON file).
docs/benchmarks.md describes each.
"""

import collections
import json
import os
import pathlib
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

import aim_jax
from aim_jax import metrics, tables
from aim_jax.data import sources, tasks

PAIRS = ("train/dev", "train/test", "dev/test")
DROPS = ("unlabelled", "duplicates", *PAIRS)


def prepare(
    layout: str,
    options: sources.Options,
    out: pathlib.Path,
    names: Sequence[str] = (),
    drops: Sequence[str] = (),
    metric: str | None = None,
) -> dict[str, Any]:
    """Write the tasks `names` (or all) of a source to the new folder `out`; the report.

    drops: of DROPS, in this order. metric: of tasks whose own is not known. Raises
    InputError for a source that cannot be used and for an `out` that holds something; in
    both cases nothing is written.
    """
    aim_jax.check_new(out)
    for way in drops:
        sources.among(way, DROPS, "--drop", "way to drop rows")
    readers = sources.LAYOUTS[layout](options)
    if not readers:
        raise aim_jax.InputError(
            f"--source: no task of layout {layout} in {options.source}"
        )
    for name in names:
        sources.among(name, readers, "--tasks", f"task in {options.source}")
    default = metric or ("rouge_l" if layout == "superni" else "exact")
    files, entries = {}, {}
    for name in names or readers:
        found = readers[name]()
        where = f"{options.source}: task '{name}'"
        for split, rows in found.splits.items():
            if not rows:
                raise aim_jax.InputError(f"{where} has no {split} row")
        kind = found.metric or tasks.KNOWN.get(name, default)
        sources.among(kind, metrics.METRICS, where, "metric")
        splits, dropped = drop(name, found.splits, drops)
        files |= {f"{s}/{name}.json": rows for s, rows in splits.items()}
        entries[name] = {
            "metric": kind,
            "found": survey(found.splits, found.options),
            "dropped": {"repeated": found.repeated, **dropped},
            "written": survey(splits, found.options),
        }
    plain = options._asdict() | {"source": str(options.source)}
    plain["instructions"] = options.instructions and str(options.instructions)
    report = {"layout": layout, **plain, "drop": list(drops), "tasks": entries}
    files["tasks.json"] = {name: entry["metric"] for name, entry in entries.items()}
    _write(out, files | {"report.json": report})
    return report


def survey(splits: sources.Splits, options: Sequence[str] = ()) -> dict[str, Any]:
    """Counts of a task's rows, repeated inputs and labels, and of inputs in two splits.

    Inputs that differ in nothing but white space are the same input. A share is that of the
    smaller split's inputs. Labels have the most frequent first, fifty at most; the unseen
    ones are those that train lacks, those not offered none of the `options`, if there are any.
    """
    inputs = {s: {tasks.key(row) for row in rows} for s, rows in splits.items()}
    counts = {s: collections.Counter(r["output"] for r in splits[s]) for s in splits}
    shared = {}
    for pair in PAIRS:
        a, b = (inputs[s] for s in pair.split("/"))
        shared[pair] = {"rows": len(a & b), "share": len(a & b) / min(len(a), len(b))}

    def facts(split: str) -> dict[str, Any]:
        labels = counts[split].most_common()
        return {
            "rows": len(splits[split]),
            "repeated": len(splits[split]) - len(inputs[split]),
            "unlabelled": sum(n for label, n in labels if not label.strip()),
            "distinct_labels": len(labels),
            "labels": dict(labels[:50]),
            "unseen_labels": dict(
                [x for x in labels if x[0] not in counts["train"]][:50]
            ),
            "not_offered": dict(
                [x for x in labels if options and x[0] not in options][:50]
            ),
        }

    return {"splits": {s: facts(s) for s in splits}, "shared": shared}


def drop(
    name: str, splits: sources.Splits, ways: Sequence[str]
) -> tuple[sources.Splits, dict[str, int]]:
    """`splits` without the rows that `ways` of DROPS names, and how many each took.

    A/B drops the rows of A that are in B. Where no dev row remains, the last train rows
    become dev rows (`held_out` of them), as in `tasks.without_leaks`. Raises InputError if
    no train or test row remains.
    """
    dropped = {}
    for way in ways:
        before = sum(map(len, splits.values()))
        if way == "unlabelled":
            splits = {
                s: [row for row in rows if row["output"].strip()]
                for s, rows in splits.items()
            }
        elif way == "duplicates":
            splits = {s: sources.first(rows) for s, rows in splits.items()}
        else:
            a, b = way.split("/")
            taken = {tasks.key(row) for row in splits[b]}
            kept = [row for row in splits[a] if tasks.key(row) not in taken]
            splits = splits | {a: kept}
        dropped[way] = before - sum(map(len, splits.values()))
    for split in ("train", "test"):
        if not splits[split]:
            raise aim_jax.InputError(
                f"{name}: --drop={','.join(ways)} leaves no {split} row; drop less"
            )
    if not splits["dev"]:
        task = tasks.without_leaks(tasks.Task(name, "exact", **splits))
        splits = {s: getattr(task, s) for s in tasks.SPLITS}
        dropped["held_out"] = len(task.dev)
    return splits, dropped


def table(report: Mapping[str, Any]) -> str:
    """The report as text: a line a task as found, then what deserves a second look."""
    head = ["task", "metric", *tasks.SPLITS, "repeated", *PAIRS, "labels"]
    lines, notes = [], []
    for name, entry in report["tasks"].items():
        splits, shared = entry["found"]["splits"], entry["found"]["shared"]
        lines.append(
            [
                name,
                entry["metric"],
                *(str(x["rows"]) for x in splits.values()),
                str(sum(x["repeated"] for x in splits.values())),
                *(_part(shared[pair]) for pair in PAIRS),
                str(splits["train"]["distinct_labels"]),
            ]
        )
        for split, x in splits.items():
            if x["unlabelled"]:
                notes.append(f"{name}: {x['unlabelled']} {split} rows have no label")
            odd = {"that are none of the options": x["not_offered"]}
            if entry["metric"] == "exact":
                odd["not in train"] = x["unseen_labels"]
            for what, labels in odd.items():
                text = tasks.listed([f"'{k}' ({n})" for k, n in labels.items()], 5)
                notes += [f"{name}: {split} labels {what}: {text}"] if labels else []
        took = [f"{way} {n}" for way, n in entry["dropped"].items() if n]
        if took:
            sizes = [str(x["rows"]) for x in entry["written"]["splits"].values()]
            notes.append(f"{name}: {', '.join(took)}; written {' / '.join(sizes)}")
    return "\n".join([tables.text(tables.Table(head, lines, left=2)), *notes])


def settings(kinds: Mapping[str, str], out: pathlib.Path) -> str:
    """The `--set` flags that read the tasks of `out`; kinds: the metric of each."""
    for benchmark in ("long_sequence", "superni"):
        known = tasks.BENCHMARKS[benchmark].metrics
        # A benchmark knows more than tasks.json says: remaps, and rows without a label.
        if kinds.items() <= known.items():
            break
    else:
        benchmark, known = "custom", {}
    chosen = [f"data.root={out}", f"data.benchmark={benchmark}"]
    if kinds.keys() != known.keys():
        chosen.append(f"data.tasks={','.join(kinds)}")
    return shlex.join(word for text in chosen for word in ("--set", text))


def _part(shared: Mapping[str, Any]) -> str:
    percent = f" ({100 * shared['share']:.1f} %)" if shared["rows"] else ""
    return f"{shared['rows']}{percent}"


def _write(out: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Make the folder `out`, whole or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}."
        ) as near:
            new = pathlib.Path(near) / "new"
            for name, data in files.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(data, ensure_ascii=False, indent=1)
                (new / name).write_text(text + "\n", "utf-8")
            os.replace(new, out)
    except OSError as error:
        raise aim_jax.InputError(
            f"--out: cannot write {out}: {error.strerror}"
        ) from None


def main(argv: Sequence[str]) -> None:
    """The command: absl's arguments in, a folder and its report out."""
    values = flags.FLAGS
    with aim_jax.command(argv, needed=("layout", "source", "out")):
        out, prompts = pathlib.Path(values.out).expanduser(), values.instructions
        options = sources.Options(
            source=pathlib.Path(values.source).expanduser(),
            counts={s: values[s].value for s in tasks.SPLITS},
            seed=values.seed,
            instructions=pathlib.Path(prompts).expanduser() if prompts else None,
        )
        report = prepare(
            values.layout, options, out, values.tasks, values.drop, values.metric
        )
    print(table(report))
    kinds = {name: entry["metric"] for name, entry in report["tasks"].items()}
    print(f"{out}: details in report.json; read it by {settings(kinds, out)}")


if __name__ == "__main__":
    layouts = list(sources.LAYOUTS)
    flags.DEFINE_enum("layout", None, layouts, f"one of {', '.join(layouts)}")
    flags.DEFINE_string("source", None, "a folder; for hub a JSON file")
    flags.DEFINE_string("out", None, "the folder to make")
    flags.DEFINE_list("tasks", [], "names, with commas; default: all there are")
    for _split in tasks.SPLITS:
        flags.DEFINE_integer(_split, None, f"{_split} rows at most", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 42, "decides which rows are taken and how they are split"
    )
    flags.DEFINE_list("drop", [], f"with commas, of {', '.join(DROPS)}")
    flags.DEFINE_enum(
        "metric", None, list(metrics.METRICS), "of tasks whose own is not known"
    )
    flags.DEFINE_string("instructions", None, "JSON file of prompts, by group or task")
    app.run(main)
