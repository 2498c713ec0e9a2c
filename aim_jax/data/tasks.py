"""Tasks and their benchmarks: names, orders, metrics; folders of JSON rows in.

A benchmark folder holds `{train,dev,test}/TASK.json`, each an array of rows
`{"id", "input", "output"}`; an `instruction` beside them is put before the input. The
folders of the PyTorch release, where files are called `TASK_T5.json`, are read as they
are, and so is either name with `.gz`.
"""

import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import aim_jax
from aim_jax import config, metrics, records
from aim_jax.data import memory, synthetic

SPLITS = ("train", "dev", "test")
SUFFIXES = (".json", "_T5.json", ".json.gz", "_T5.json.gz")
FILE = re.compile(r"(.+?)(?:_T5)?\.json(?:\.gz)?")


class Task(NamedTuple):
    """A task: its rows, and how predictions on it are scored.

    remap: predictions (lower-cased) that stand for a label.
    """

    name: str
    metric: str
    train: list[dict[str, str]]
    dev: list[dict[str, str]]
    test: list[dict[str, str]]
    remap: dict[str, str] = {}


class Benchmark(NamedTuple):
    """A family of tasks.

    folders: names that its folder may have inside `data.root`.
    orders: streams by number, the default first.
    metrics: metric of every task there is; None: what the folder's tasks.json says.
    remaps: `Task.remap` of the tasks that have one.
    """

    folders: tuple[str, ...] = ()
    orders: dict[int, tuple[str, ...]] = {}
    metrics: dict[str, str] | None = None
    remaps: dict[str, dict[str, str]] = {}


_LONG = {
    1: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
    2: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
    3: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
}
_STANDARD = {
    4: "dbpedia amazon yahoo agnews",
    5: "dbpedia amazon agnews yahoo",
    6: "yahoo amazon agnews dbpedia",
}
_SUPERNI = {
    7: "task1572 task363 task1290 task181 task002 task1510 task639 task1729 task073"
    " task1590 task748 task511 task591 task1687 task875",
    8: "task748 task073 task1590 task639 task1572 task1687 task591 task363 task1510"
    " task1729 task181 task511 task002 task1290 task875",
}


def _orders(text: dict[int, str]) -> dict[int, tuple[str, ...]]:
    return {number: tuple(names.split()) for number, names in text.items()}


BENCHMARKS = {
    "synthetic": Benchmark(
        orders={1: synthetic.STREAM}, metrics=dict.fromkeys(synthetic.NAMES, "exact")
    ),
    "standard_cl": Benchmark(
        folders=("long_sequence", "data_longsequence"),
        orders=_orders(_STANDARD),
        metrics=dict.fromkeys(_LONG[1].split(), "exact"),
    ),
    "long_sequence": Benchmark(
        folders=("long_sequence", "data_longsequence"),
        orders=_orders(_LONG),
        metrics=dict.fromkeys(_LONG[1].split(), "exact"),
    ),
    "superni": Benchmark(
        folders=("superni", "data_superni"),
        orders=_orders(_SUPERNI),
        metrics=dict.fromkeys(_SUPERNI[7].split(), "rouge_l")
        | dict.fromkeys(("task363", "task875", "task1687"), "exact"),
        remaps={"task363": {"pos": "p", "neg": "n"}},
    ),
    "custom": Benchmark(),
}
# The metric of every task that is named above.
KNOWN = {k: v for b in BENCHMARKS.values() for k, v in (b.metrics or {}).items()}

# Six train rows of task511 have no label in the published data. They stay, since published
# numbers were trained on them; anywhere else an empty label is taken for a mistake.
_UNLABELLED = {("superni", "task511", "train")}


def load(cfg: config.Data) -> list[Task]:
    """The tasks of the stream, in order, each with the first rows up to its limits.

    Ids only name rows in messages and prediction files and are never looked up, so a file
    may repeat one; a row without gets `TASK_NUMBER`, counted from 0. Raises InputError for
    an unknown benchmark, order or task, and for files and rows that cannot be used.
    """
    if cfg.benchmark not in BENCHMARKS:
        raise aim_jax.InputError(
            f"data.benchmark: no '{cfg.benchmark}'; there are {listed(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS[cfg.benchmark]
    limits = {"train": cfg.limit_train, "dev": cfg.limit_dev, "test": cfg.limit_test}
    if cfg.benchmark == "synthetic":
        names = _stream(cfg, benchmark.orders, synthetic.NAMES)
        if cfg.root is not None:
            others = listed(name for name in BENCHMARKS if name != cfg.benchmark)
            raise aim_jax.InputError(
                f"data.root: benchmark 'synthetic' reads no folder; to use '{cfg.root}' set"
                f" data.benchmark, to one of {others}"
            )
        sizes = (synthetic.TRAIN, synthetic.DEV, synthetic.TEST)
        splits = {n: synthetic.task(n, cfg.seed, *sizes) for n in names}
        kinds = benchmark.metrics
    else:
        folder = _folder(cfg, benchmark)
        kinds = benchmark.metrics or _custom(folder)
        names = _stream(cfg, benchmark.orders, kinds)
        splits = {
            n: {
                s: _rows(file(folder, s, n), n, (cfg.benchmark, n, s) in _UNLABELLED)
                for s in SPLITS
            }
            for n in names
        }
    return [
        Task(
            name=name,
            metric=kinds[name],
            remap=benchmark.remaps.get(name, {}),
            **{s: splits[name][s][: limits[s]] for s in SPLITS},
        )
        for name in names
    ]


def held_out(folders: Iterable[str], limit: int | None = None) -> list[Task]:
    """Every task of `folders` with its first `limit` test rows, and no others.

    A folder is a benchmark's, of which only test/ is read; its tasks.json says the metric
    of a task, else that of a published benchmark counts, else exact match; the remap is a
    published one's too. Raises InputError as `load`, and for a task that is there twice.
    """
    remaps = {k: v for b in BENCHMARKS.values() for k, v in b.remaps.items()}
    found: dict[str, Task] = {}
    for name in folders:
        folder = pathlib.Path(name).expanduser()
        names = _found(folder / "test")
        if not names:
            raise aim_jax.InputError(
                f"eval.before_after: '{name}' must hold test/TASK.json of at least one task"
            )
        kinds = {n: KNOWN.get(n, "exact") for n in names} | _chosen(folder, names)
        for task in names:
            if task in found:
                raise aim_jax.InputError(
                    f"eval.before_after: task '{task}' of '{name}' is also in another"
                    " folder; rename one of them"
                )
            rows = _rows(file(folder, "test", task), task, unlabelled=False)
            remap = remaps.get(task, {})
            found[task] = Task(task, kinds[task], [], [], rows[:limit], remap)
    return list(found.values())


def validation(
    tasks: Sequence[Task], rows: int = 25, seed: int = 42
) -> list[dict[str, str]]:
    """The rows that validate the last of `tasks`, the stream so far.

    As in the PyTorch release: `rows` of each task's dev rows, shuffled, are joined and
    shuffled again, each time as `datasets` does with `seed`.
    """
    return memory.shuffle(
        [row for task in tasks for row in memory.shuffle(task.dev, seed)[:rows]], seed
    )


def without_leaks(task: Task, rows: int = 25) -> Task:
    """`task` without the dev rows whose input is also that of one of its test rows.

    White space does not count.

    Where no dev row remains (all published SuperNI dev files equal the test files), the
    last train rows, `rows` of them but at most a tenth, become dev rows and are no longer
    train rows: whoever validates on the result must also train on it. What is clean
    already comes back as it is.
    """
    dev = _clean(task)
    if dev:
        return task._replace(dev=dev)
    n = len(task.train) - min(rows, max(1, len(task.train) // 10))
    if n < 1:
        raise aim_jax.InputError(
            f"{task.name}: all dev rows are test rows, and its one train row cannot validate"
            " too; add dev rows or set train.validation_leaks=true"
        )
    return task._replace(train=task.train[:n], dev=task.train[n:])


def _clean(task: Task) -> list[dict[str, str]]:
    """The dev rows whose text is that of no test row."""
    tested = {key(row) for row in task.test}
    return [row for row in task.dev if key(row) not in tested]


def key(row: dict[str, str]) -> str:
    """What two rows of the same input share: its text, whatever the white space.

    dbpedia's splits differ in line breaks alone.
    """
    return " ".join(row["input"].split())


def usage(found: Task, used: Task) -> dict[str, int]:
    """Rows of each split of a task, and what became of its leaks.

    found: the task as its files have it; used: as `without_leaks` gave it, or `found`.
    dev_in_test: dev rows of `used` that are test rows; dropped: those that were taken out;
    held_out: train rows that became dev rows in their place.
    """
    held = len(found.train) - len(used.train)
    return {
        **{split: len(getattr(used, split)) for split in SPLITS},
        "dev_in_test": len(used.dev) - len(_clean(used)),
        "dropped": len(found.dev) - len(used.dev) + held,
        "held_out": held,
    }


def remembered(run: str, name: str) -> list[dict[str, str]]:
    """The rows that the memory of another run keeps of a task (RUN/memory/NN-TASK.jsonl).

    Raises InputError if there is no such file, or for a row that cannot be used.
    """
    folder = pathlib.Path(run).expanduser() / "memory"
    files = records.numbered(folder, ".jsonl")
    if name not in files:
        raise aim_jax.InputError(
            f"memory.replay: {folder} has no NN-{name}.jsonl; tasks there: {listed(files)}"
        )
    rows = []
    # Not splitlines: text may hold other line breaks than those between rows.
    try:
        lines = files[name].read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise aim_jax.InputError(f"{files[name]}: not UTF-8: {error}") from None
    for i, line in enumerate(line for line in lines if line):
        where = f"{files[name]}: row {i} (counted from 0)"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise aim_jax.InputError(f"{where}: not valid JSON: {error}") from None
        # The run that kept it has checked that its label may be empty.
        rows.append(checked(where, f"{name}_{i}", row, unlabelled=True))
    return rows


def holdout(
    rows: Sequence[dict[str, str]], part: float, seed: int = 42
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and validation rows of a single-task run: int(part len(rows)) are held out.

    With seed 42 and part 0.1 both are those of the PyTorch release, in its order.
    """
    mixed, n = memory.shuffle(rows, seed), int(part * len(rows))
    held = memory.shuffle(mixed[:n], memory.second_seed(seed))
    return memory.shuffle(mixed[n:], seed), held


def _stream(
    cfg: config.Data, orders: dict[int, tuple[str, ...]], known: Iterable[str]
) -> tuple[str, ...]:
    """Names of the tasks to learn, in order; all of them are `known`."""
    if cfg.tasks:
        for i, name in enumerate(cfg.tasks):
            if name not in known:
                raise aim_jax.InputError(
                    f"data.tasks: no task '{name}' in benchmark '{cfg.benchmark}'; there"
                    f" are {listed(known)}"
                )
            if name in cfg.tasks[:i]:
                raise aim_jax.InputError(
                    f"data.tasks: '{name}' is there twice; a stream has a task once"
                )
        return cfg.tasks
    if not orders:
        raise aim_jax.InputError(
            f"data.tasks: benchmark '{cfg.benchmark}' has no order of its own; list the"
            f" tasks of the stream, of {listed(known)}"
        )
    number = next(iter(orders)) if cfg.order is None else cfg.order
    if number not in orders:
        raise aim_jax.InputError(
            f"data.order: no order {number} in benchmark '{cfg.benchmark}'; there are"
            f" {listed(map(str, orders))}"
        )
    return orders[number]


def _folder(cfg: config.Data, benchmark: Benchmark) -> pathlib.Path:
    """The benchmark's folder: inside `data.root`, or `data.root` itself."""
    wanted = " or ".join(f"{f}/" for f in (*benchmark.folders, "train/, dev/, test"))
    if cfg.root is None:
        raise aim_jax.InputError(
            f"data.root: benchmark '{cfg.benchmark}' needs the folder that holds {wanted}"
        )
    root = pathlib.Path(cfg.root).expanduser()
    if not root.is_dir():
        raise aim_jax.InputError(
            f"data.root: no folder '{root}'; give the one that holds {wanted}"
        )
    for folder in (*(root / f for f in benchmark.folders), root):
        if any((folder / split).is_dir() for split in SPLITS):
            return folder
    inside = sorted(p.name for p in root.iterdir())
    raise aim_jax.InputError(
        f"data.root: '{root}' does not hold {wanted}; it holds {listed(inside)}"
    )


def _custom(folder: pathlib.Path) -> dict[str, str]:
    """The metric of every task in a folder of the user's own."""
    found = sorted({n for s in SPLITS for n in _found(folder / s)})
    if not found:
        inside = sorted({p.name for s in SPLITS for p in (folder / s).glob("*")})
        raise aim_jax.InputError(
            f"data.root: no TASK.json in the splits of '{folder}'; they hold"
            f" {listed(inside)}; python -m aim_jax.data.prepare --layout hub makes such of"
            " CSV, JSON Lines and other files"
        )
    return dict.fromkeys(found, "exact") | _chosen(folder, found)


def _chosen(folder: pathlib.Path, known: Sequence[str]) -> dict[str, str]:
    """What tasks.json says of the `known` tasks; nothing without that file."""
    path = folder / "tasks.json"
    if not path.is_file():
        return {}
    chosen = read_json(path)
    if not isinstance(chosen, dict):
        raise aim_jax.InputError(
            f'{path}: must be an object {{"TASK": "METRIC"}}, not {_kind(chosen)}'
        )
    for name, metric in chosen.items():
        if name not in known:
            raise aim_jax.InputError(
                f"{path}: no files of task '{name}'; there are {listed(known)}"
            )
        if metric not in list(metrics.METRICS):
            raise aim_jax.InputError(
                f"{path}: task '{name}' has no metric {json.dumps(metric)}; there are"
                f" {listed(metrics.METRICS)}"
            )
    return chosen


def _found(folder: pathlib.Path) -> list[str]:
    """Names of the tasks that have a file in `folder`."""
    matches = (FILE.fullmatch(path.name) for path in folder.glob("*"))
    return sorted({match[1] for match in matches if match})


def file(folder: pathlib.Path, split: str, name: str) -> pathlib.Path:
    """The file of a task's split."""
    where = folder / split
    if not where.is_dir():
        raise aim_jax.InputError(
            f"{folder}: no folder '{split}'; a benchmark has {listed(SPLITS)}"
        )
    paths = (where / f"{name}{suffix}" for suffix in SUFFIXES)
    files = [path for path in paths if path.is_file()]
    if len(files) > 1:
        raise aim_jax.InputError(
            f"{where}: task '{name}' is there twice, as"
            f" {' and '.join(path.name for path in files)}; move one away"
        )
    if files:
        return files[0]
    raise aim_jax.InputError(
        f"{where}: no {name}.json or {name}_T5.json (.gz); tasks there:"
        f" {listed(_found(where))}"
    )


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file, possibly gzipped, says. Raises InputError for one that is none."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise aim_jax.InputError(
            f"{path}:{_garbled(data)} not UTF-8 at byte {error.start}; save it in that"
            " encoding"
        ) from None
    except (ValueError, RecursionError) as error:
        lines = "; JSON Lines? make it one array" if "Extra data" in str(error) else ""
        raise aim_jax.InputError(f"{path}: not valid JSON: {error}{lines}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise aim_jax.InputError(f"{path}: cannot be read: {reason}") from None


def _garbled(data: bytes) -> str:
    """The row of a JSON array that is the first to hold bytes which are not UTF-8."""
    try:
        rows = json.loads(data.decode("utf-8-sig", "surrogateescape"))
        texts = (json.dumps(row, ensure_ascii=False) for row in rows)
        # What surrogateescape makes of such a byte; a sound text has no half pairs.
        first = next(
            i for i, text in enumerate(texts) if re.search("[\udc80-\udcff]", text)
        )
    except (ValueError, RecursionError, TypeError, StopIteration):
        return ""
    return f" row {first} (counted from 0):"


def _rows(path: pathlib.Path, name: str, unlabelled: bool) -> list[dict[str, str]]:
    """The rows of a file; `unlabelled` says that a label may be empty."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise aim_jax.InputError(
            f'{path}: must be an array of {{"id", "input", "output"}}, not {_kind(rows)}'
        )
    if not rows:
        raise aim_jax.InputError(f"{path}: no rows; every split needs at least one")
    return [
        checked(f"{path}: row {i} (counted from 0)", f"{name}_{i}", row, unlabelled)
        for i, row in enumerate(rows)
    ]


def checked(where: str, name: str, row: Any, unlabelled: bool) -> dict[str, str]:
    """The fields of a row, called `name` if it has no id.

    where: what a message calls it; unlabelled: whether its label may be empty. Raises
    InputError for a field that cannot be used.
    """
    if not isinstance(row, dict):
        raise aim_jax.InputError(
            f'{where}: must be an object {{"id", "input", "output"}}, not {_kind(row)}'
        )
    for field in ("input", "output"):
        if field not in row:
            raise aim_jax.InputError(
                f"{where}: no field '{field}'; it has {listed(row)}"
            )
    made = {f: row.get(f, name) for f in ("id", "input", "output")}
    apart = row.get("instruction", "")
    for field, text in (*made.items(), ("instruction", apart)):
        if not isinstance(text, str):
            raise aim_jax.InputError(
                f"{where}: '{field}' must be a string, not {_kind(text)}"
            )
    # Where the instruction stands apart, a prompt is both together.
    made["input"] = apart + made["input"]
    for field, text in made.items():
        if not text.strip() and not (field == "output" and unlabelled):
            raise aim_jax.InputError(
                f"{where}: '{field}' is empty; fill it in or remove the row"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half a surrogate pair, which no tokenizer takes.
            raise aim_jax.InputError(
                f"{where}: '{field}' is no Unicode text at character {error.start};"
                " replace that character"
            ) from None
    return made


def _kind(value: Any) -> str:
    """What JSON calls the type of `value`."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names for a message: a folder may hold thousands."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
