"""Tasks as others publish them: each layout becomes rows `{"id", "input", "output"}`.

A layout is a function from `Options` to readers, one a task; `LAYOUTS` names them.
"""

import functools
import itertools
import json
import math
import pathlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import aim_jax
from aim_jax.data import tasks

Row = dict[str, str]
Splits = dict[str, list[Row]]

# The wording of the released data, by the groups of CL_Benchmark; COPA has BoolQA's there.
INSTRUCTIONS = {
    group: f"{question} Choose one from the option."
    for group, question in {
        "SC": "What is the sentiment of the following paragraph?",
        "TC": "What is the topic of the following paragraph?",
        "NLI": 'What is the logical relationship between the "sentence 1" and the'
        ' "sentence 2"?',
        "QQP": 'Whether the "first sentence" and the "second sentence" have the same'
        " meaning?",
        "BoolQA": "According to the following passage, is the question true or false?",
        "COPA": "According to the following passage, is the question true or false?",
        "MultiRC": "According to the following passage and question, is the candidate"
        " answer true or false?",
        "WiC": "Given a word and two sentences, whether the word is used with the same"
        " sense in both sentence?",
    }.items()
}

# Super-NaturalInstructions has no splits; with these most the released sizes come out.
SUPERNI_TRAIN, SUPERNI_HELD = 1000, 100

# What describes a dataset: the arguments of `datasets.load_dataset`, and how to read it.
_LOAD = {"name": str, "data_dir": str, "data_files": str | list | dict, "revision": str}
_NEEDED = {"path": str, "input": str, "output": str}
_SPEC = _NEEDED | _LOAD | {"splits": dict, "labels": list, "metric": str}
_PARTS = {"train": "train", "dev": "validation", "test": "test"}
_COLUMN = re.compile(r"\{([^{}]+)\}")
_COLUMNS = 10_000  # no CSV file has more


class Options(NamedTuple):
    """Which rows of which source.

    counts: rows of a split at most; what is taken hangs on the seed.
    instructions: file of prompts by group or task, for `cl_benchmark`.
    """

    source: pathlib.Path
    counts: Mapping[str, int | None] = {}
    seed: int = 42
    instructions: pathlib.Path | None = None


class Found(NamedTuple):
    """A task of a source.

    repeated: rows left out because an earlier one has their input; options: the answers
    that its prompts offer, where they are known.
    """

    splits: Splits
    metric: str | None = None
    repeated: int = 0
    options: Sequence[str] = ()


# Tasks by name, read one by one: a source may hold far more than are asked for.
Readers = dict[str, Callable[[], Found]]


def release(options: Options) -> Readers:
    """Folders that `data.root` reads; counts take the first rows, as `data.limit_*` do."""
    source = _folder(options.source)
    if not (source / "train").is_dir():
        inside = sorted(str(p) for p in source.iterdir() if (p / "train").is_dir())
        raise aim_jax.InputError(
            f"--source: {source} has no folder train/; folders in it that do:"
            f" {tasks.listed(inside)}"
        )
    chosen = source / "tasks.json"
    kinds = _object(chosen) if chosen.is_file() else {}

    def read(name: str) -> Found:
        splits = {}
        for split in tasks.SPLITS:
            path = tasks.file(source, split, name)
            rows = _array(path)[: options.counts.get(split)]
            splits[split] = [
                tasks.checked(f"{path}: row {i}", f"{name}_{i}", row, unlabelled=True)
                for i, row in enumerate(rows)
            ]
        return Found(splits, kinds.get(name))

    matches = [tasks.FILE.fullmatch(p.name) for p in (source / "train").iterdir()]
    return _readers(read, sorted({match[1] for match in matches if match}))


def cl_benchmark(options: Options) -> Readers:
    """Folders GROUP/TASK of rows `{label, sentence}`, with labels.json beside them."""
    prompts = INSTRUCTIONS | _instructions(options.instructions)
    places: dict[str, pathlib.Path] = {}
    for path in sorted(_folder(options.source).resolve().rglob("train.json")):
        _put(places, path.parent.name.lower(), path.parent)

    def read(name: str) -> Found:
        folder = places[name]
        group = folder.parent.name
        prompt = prompts.get(folder.name, prompts.get(group))
        if prompt is None:
            raise aim_jax.InputError(
                f"{folder}: no instruction for group '{group}' or task '{folder.name}';"
                f" there are {tasks.listed(prompts)}; add one by --instructions=FILE"
            )
        offered = _array(folder / "labels.json", str)
        choices = ", ".join(offered)
        splits = {}
        for split in tasks.SPLITS:
            path = folder / f"{split}.json"
            rows = _array(path)
            splits[split] = []
            for i in _order(options, name, split, len(rows)):
                sentence = _field(path, i, rows[i], "sentence")
                text = f"{prompt} Option: {choices}.\n{sentence}\nAnswer:"
                label = _field(path, i, rows[i], "label")
                row = _row(f"{path}: row {i}", f"{name}_{i}", text, label)
                splits[split].append(row)
        return Found(splits, options=offered)

    return _readers(read, places)


def superni(options: Options) -> Readers:
    """Files TASK.json with `Definition` and `Instances`, to be split here, or folders
    TASK/{train,dev,test}.json of such files, split already.

    Of a file equal inputs are kept once, so that no two splits share one. Without counts,
    dev and test have a tenth of the rows each, a hundred at most, and train the others, a
    thousand at most: the released sizes.
    """
    source = _folder(options.source)
    source = source / "tasks" if (source / "tasks").is_dir() else source
    places: dict[str, pathlib.Path] = {}
    for path in sorted(source.iterdir()):
        if (path / "train.json").is_file() or path.suffix == ".json":
            number = re.match(r"task\d+(?=_)", path.name)
            _put(places, number[0] if number else path.name.split(".")[0], path)

    def read(name: str) -> Found:
        path = places[name]
        if path.is_dir():
            splits = {}
            for split in tasks.SPLITS:
                rows = _instances(path / f"{split}.json", name)
                order = _order(options, name, split, len(rows))
                splits[split] = [rows[i] for i in order]
            return Found(splits)
        rows = _instances(path, name)
        unique = first(rows)
        n = len(unique)
        held = min(SUPERNI_HELD, math.ceil(n / 10))
        sizes = {s: options.counts.get(s) or held for s in ("test", "dev")}
        most = options.counts.get("train") or SUPERNI_TRAIN
        sizes["train"] = min(most, n - sum(sizes.values()))
        if sizes["train"] < 1:
            raise aim_jax.InputError(
                f"{path}: {n} different inputs are too few for {sizes['test']} test rows,"
                f" {sizes['dev']} dev rows and train; lower --test and --dev"
            )
        mixed = iter(random.Random(f"{options.seed}/{name}").sample(unique, n))
        taken = {s: list(itertools.islice(mixed, size)) for s, size in sizes.items()}
        return Found({s: taken[s] for s in tasks.SPLITS}, repeated=len(rows) - n)

    return _readers(read, places)


def hub(options: Options) -> Readers:
    """Datasets that `datasets.load_dataset` reads, described by a JSON file."""
    specs = _object(options.source)
    for name, spec in specs.items():
        _check(f"{options.source}: task '{name}'", name, spec)

    def read(name: str) -> Found:
        where, spec = f"{options.source}: task '{name}'", specs[name]
        splits = {}
        for split, part in (_PARTS | spec.get("splits", {})).items():
            data = _load(where, spec, part)
            order = _order(options, name, split, len(data))
            named = {
                k: f.names for k, f in data.features.items() if hasattr(f, "names")
            }
            targets = [c.split(".")[0] for c in _COLUMN.findall(spec["output"])]
            if "labels" in spec:
                named |= dict.fromkeys(targets, spec["labels"])
            choices = next((named[c] for c in targets if c in named), ())
            splits[split] = []
            for i, row in zip(order, data.select(order), strict=True):
                at = f"{where}: {part} row {i}"
                row = {"labels": ", ".join(choices)} | row
                text, label = (
                    _fill(at, spec[field], row, named) for field in ("input", "output")
                )
                splits[split].append(_row(at, f"{name}_{split}_{i}", text, label))
        return Found(splits, spec.get("metric"))

    return _readers(read, specs)


LAYOUTS: dict[str, Callable[[Options], Readers]] = {
    "release": release,
    "cl_benchmark": cl_benchmark,
    "superni": superni,
    "hub": hub,
}


def first(rows: Iterable[Row]) -> list[Row]:
    """The rows whose input no earlier one has."""
    firsts: dict[str, Row] = {}
    for row in rows:
        firsts.setdefault(tasks.key(row), row)
    return list(firsts.values())


def among(name: Any, known: Iterable[str], where: str, what: str) -> None:
    """Raise InputError for a name that is not known, listing those that are."""
    known = list(known)
    if name not in known:
        raise aim_jax.InputError(
            f"{where}: no {what} '{name}'; there are {tasks.listed(known)}"
        )


def _check(where: str, name: str, spec: Any) -> None:
    """Raise InputError if `spec` does not describe a dataset."""
    if re.search(r"[/\\,]", name):
        raise aim_jax.InputError(f"{where}: a name has no slash and no comma")
    if not isinstance(spec, dict):
        raise aim_jax.InputError(
            f"{where}: must be an object with {tasks.listed(_NEEDED)}"
        )
    for field in _NEEDED.keys() - spec.keys():
        raise aim_jax.InputError(
            f"{where}: no field '{field}'; it has {tasks.listed(spec)}"
        )
    texts = {}
    for field, value in spec.items():
        among(field, _SPEC, where, "field")
        if not isinstance(value, _SPEC[field]):
            raise aim_jax.InputError(
                f"{where}: '{field}' cannot be {json.dumps(value)[:40]}"
            )
        if field == "splits":
            for split, part in value.items():
                among(split, tasks.SPLITS, where, "split")
                texts[f"splits.{split}"] = part
        elif field == "labels":
            texts |= {f"labels.{i}": label for i, label in enumerate(value)}
    for field, value in texts.items():
        if not isinstance(value, str):
            raise aim_jax.InputError(f"{where}: '{field}' must be a string")


def _load(where: str, spec: Mapping[str, Any], split: str) -> Any:
    """One split of a dataset."""
    # Slow to import, and no other layout needs it.
    import datasets

    arguments = {k: spec[k] for k in _LOAD if k in spec}
    if spec["path"] == "csv":
        # As it is written: None or NA is a word, and a gap makes no 1.0 of a 1. By its
        # place every column is text, as many as there are.
        every = dict.fromkeys(range(_COLUMNS), str)
        arguments |= {"keep_default_na": False, "converters": every}
    try:
        return datasets.load_dataset(spec["path"], split=split, **arguments)
    except Exception as error:  # It raises whatever the reader of the format raises.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise aim_jax.InputError(
            f"{where}: datasets cannot load split '{split}' of '{spec['path']}': {reason}"
        ) from None


def _fill(
    where: str,
    template: str,
    row: Mapping[str, Any],
    named: Mapping[str, Sequence[str]],
) -> str:
    """`template` with each {column} replaced: by a name, where its numbers have names.

    {a.b} is field b of column a; a list stands for its first item. Raises InputError for a
    value that is none of the names of its column.
    """

    def text(match: re.Match) -> str:
        column, *path = match[1].split(".")
        among(column, row, f"{where}: '{match[0]}'", "column")
        value = _one(row[column])
        for field in path:
            among(field, value or (), f"{where}: '{match[0]}'", "field")
            value = _one(value[field])
        if value in (None, "", []) or value != value:
            return ""
        if column not in named or value in named[column]:
            return str(value)
        names = named[column]
        if re.fullmatch(r"\s*-?\d+(\.0)?\s*", str(value)):
            # Beside one that is missing, numbers become text or floats.
            value = int(float(value))
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        often = " (-1 often marks a split without labels)" if value == -1 else ""
        raise aim_jax.InputError(
            f"{where}: {column} {value!r} has no name; there are {len(names)}:"
            f" {tasks.listed(names)}{often}"
        )

    return _COLUMN.sub(text, template)


def _instances(path: pathlib.Path, name: str) -> list[Row]:
    """The rows of a task file; of several references the first is the label."""
    task = _object(path)
    for field in ("Definition", "Instances"):
        if not task.get(field):
            raise aim_jax.InputError(
                f"{path}: no '{field}'; a task file has Definition and Instances"
            )
    definition = _one(task["Definition"])
    rows = []
    for i, row in enumerate(task["Instances"]):
        text = _field(path, i, row, "input")
        label = _one(_field(path, i, row, "output"))
        text = f"[INS] {definition}\n [IN] {text}\n [OUT] "
        rows.append(_row(f"{path}: row {i}", row.get("id", f"{name}_{i}"), text, label))
    return rows


def _instructions(path: pathlib.Path | None) -> dict[str, str]:
    """Prompts by group or task: plain texts, or O-LoRA's instruction_config.json."""
    prompts = {}
    for name, value in (_object(path) if path else {}).items():
        value = _one(value)
        value = value.get("instruction") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise aim_jax.InputError(f"{path}: '{name}' must be the text of a prompt")
        prompts[name] = value.strip()
    return prompts


def _readers(read: Callable[[str], Found], names: Iterable[str]) -> Readers:
    return {name: functools.partial(read, name) for name in names}


def _order(options: Options, name: str, split: str, rows: int) -> list[int]:
    """Which rows a split takes, mixed: the same whatever other tasks there are."""
    rng = random.Random(f"{options.seed}/{name}/{split}")
    return rng.sample(range(rows), rows)[: options.counts.get(split)]


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _row(where: str, name: Any, text: Any, label: Any) -> Row:
    """The checked row; its label may be empty, which the report counts."""
    row = {"id": name, "input": text, "output": label}
    return tasks.checked(where, name, row, unlabelled=True)


def _field(path: pathlib.Path, number: int, row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise aim_jax.InputError(f"{path}: row {number}: must be an object")
    if name not in row:
        raise aim_jax.InputError(
            f"{path}: row {number}: no field '{name}'; it has {tasks.listed(row)}"
        )
    return row[name]


def _object(path: pathlib.Path) -> dict[str, Any]:
    data = tasks.read_json(path)
    if not isinstance(data, dict):
        raise aim_jax.InputError(f"{path}: must be a JSON object")
    return data


def _array(path: pathlib.Path, kind: type = dict) -> list[Any]:
    """The items of a file, all of one type, at least one."""
    data = tasks.read_json(path)
    if not isinstance(data, list) or not data:
        raise aim_jax.InputError(f"{path}: must be a JSON array of at least one item")
    wrong = [i for i, item in enumerate(data) if not isinstance(item, kind)]
    if wrong:
        what = {dict: "an object", str: "a string"}[kind]
        raise aim_jax.InputError(f"{path}: item {wrong[0]} must be {what}")
    return data


def _folder(path: pathlib.Path) -> pathlib.Path:
    if not path.is_dir():
        raise aim_jax.InputError(f"--source: no folder {path}")
    return path


def _put(places: dict[str, pathlib.Path], name: str, path: pathlib.Path) -> None:
    if name in places:
        raise aim_jax.InputError(
            f"task '{name}' is there twice: {places[name]} and {path}; move one away"
        )
    places[name] = path
