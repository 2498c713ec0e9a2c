"""Benchmark folders: every layout and every mistake, and the published validation rows.

The recorded choices change only if the release's loader turns out to do something else.
"""

import gzip
import hashlib
import json

import golden
import numpy as np
import pytest

import aim_jax
from aim_jax import config
from aim_jax.data import synthetic, tasks


def rows(name, split, n=4):
    return [
        {"id": f"{name}_{i}", "input": f"{name} {split} {i}", "output": f"o{i % 2}"}
        for i in range(n)
    ]


def write(path, data):
    """Write JSON (or bytes as they are), gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def folder(path, names, suffix=".json"):
    """A benchmark folder at `path` with four rows a split."""
    for name in names:
        for split in tasks.SPLITS:
            write(path / split / f"{name}{suffix}", rows(name, split))
    return path


def custom(root, names=("a",), **fields):
    cfg = config.Data(benchmark="custom", root=str(root), tasks=names, **fields)
    return tasks.load(cfg)


def ids(chosen):
    return [row["id"] for row in chosen]


STANDARD = ("dbpedia", "amazon", "yahoo", "agnews")


@pytest.mark.parametrize("suffix", tasks.SUFFIXES)
@pytest.mark.parametrize("inside", ["long_sequence", "data_longsequence", ""])
def test_every_layout_of_a_benchmark_reads_alike(tmp_path, inside, suffix):
    folder(tmp_path / inside, STANDARD, suffix)
    loaded = tasks.load(config.Data(benchmark="standard_cl", root=str(tmp_path)))
    assert [task.name for task in loaded] == list(STANDARD)
    for task in loaded:
        assert task.metric == "exact"
        assert task.remap == {}
        for split in tasks.SPLITS:
            assert getattr(task, split) == rows(task.name, split)


def test_orders_are_those_of_the_benchmarks():
    orders = {b: list(v.orders) for b, v in tasks.BENCHMARKS.items()}
    assert orders["standard_cl"] == [4, 5, 6]
    assert orders["long_sequence"] == [1, 2, 3]
    assert orders["superni"] == [7, 8]
    for name in ("standard_cl", "long_sequence", "superni"):
        benchmark = tasks.BENCHMARKS[name]
        streams = [set(stream) for stream in benchmark.orders.values()]
        assert all(stream == streams[0] for stream in streams)
        assert streams[0] <= set(benchmark.metrics)
        assert len(benchmark.metrics) == 15


def test_order_and_tasks_choose_the_stream(tmp_path):
    folder(tmp_path, (*STANDARD, "cb"))
    cfg = config.Data(benchmark="standard_cl", root=str(tmp_path), order=6)
    assert [t.name for t in tasks.load(cfg)] == ["yahoo", "amazon", "agnews", "dbpedia"]
    cfg = config.Data(
        benchmark="standard_cl", root=str(tmp_path), order=6, tasks=("cb", "yahoo")
    )
    assert [t.name for t in tasks.load(cfg)] == ["cb", "yahoo"]


def test_superni_has_its_metrics_and_remap(tmp_path):
    names = ("task363", "task875", "task1687", "task073")
    folder(tmp_path, names)
    cfg = config.Data(benchmark="superni", root=str(tmp_path), tasks=names)
    loaded = {t.name: t for t in tasks.load(cfg)}
    assert [t.metric for t in loaded.values()] == ["exact"] * 3 + ["rouge_l"]
    assert loaded["task363"].remap == {"pos": "p", "neg": "n"}
    assert loaded["task875"].remap == {}


def test_custom_takes_metrics_from_a_file_and_exact_without(tmp_path):
    folder(tmp_path, ("a", "b"))
    assert [t.metric for t in custom(tmp_path, ("b", "a"))] == ["exact", "exact"]
    write(tmp_path / "tasks.json", {"b": "rouge_l"})
    assert [t.metric for t in custom(tmp_path, ("b", "a"))] == ["rouge_l", "exact"]


def test_limits_take_the_first_rows(tmp_path):
    folder(tmp_path, ("a",))
    (task,) = custom(tmp_path, limit_train=3, limit_dev=2, limit_test=9)
    assert task.train == rows("a", "train")[:3]
    assert task.dev == rows("a", "dev")[:2]
    assert task.test == rows("a", "test")


def test_ids_are_made_where_missing_may_repeat_and_other_fields_are_dropped(tmp_path):
    folder(tmp_path, ("a",))
    row = {"input": "x", "output": "y", "source": 3}
    write(tmp_path / "train/a.json", [row, {"id": "k"} | row, {"id": "k"} | row])
    (task,) = custom(tmp_path)
    assert ids(task.train) == ["a_0", "k", "k"]
    assert task.train[0] == {"id": "a_0", "input": "x", "output": "y"}


def test_text_is_kept_as_it_is(tmp_path):
    folder(tmp_path, ("a",))
    row = {"id": "é", "input": " zwölf \n", "output": "ja "}
    data = json.dumps([row], ensure_ascii=False).encode("utf-8-sig")
    write(tmp_path / "dev/a.json", data)
    assert custom(tmp_path)[0].dev == [row]


def test_synthetic_tasks_come_from_the_seed():
    loaded = tasks.load(config.Data(seed=3, limit_train=5))
    assert [task.name for task in loaded] == list(synthetic.STREAM)
    name = synthetic.STREAM[-1]
    made = synthetic.task(name, 3, synthetic.TRAIN, synthetic.DEV, synthetic.TEST)
    (task,) = tasks.load(config.Data(seed=3, tasks=(name,)))
    assert (task.train, task.dev, task.test) == tuple(made[s] for s in tasks.SPLITS)
    assert loaded[-1].train == task.train[:5]
    assert loaded[-1].test == task.test
    (other,) = tasks.load(config.Data(seed=4, tasks=(name,)))
    assert other.train != task.train


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"benchmark": "glue"}, "data.benchmark: no 'glue'.*standard_cl"),
        ({"benchmark": "superni"}, "data.root.*'superni' needs.*data_superni/"),
        ({"root": "{root}/no"}, "data.root: no folder '.*no'.*long_sequence/"),
        ({"root": "{root}/file"}, "data.root: no folder '.*file'"),
        ({"root": "{root}/empty"}, "data.root: .*does not hold.*it holds none"),
        ({"order": 7}, "data.order: no order 7 in benchmark 'standard_cl'.*4, 5, 6"),
        ({"tasks": ("cb", "sst2")}, "data.tasks: no task 'sst2'.*sst-2"),
        ({"tasks": ("cb", "cb")}, "data.tasks: 'cb' is there twice"),
        ({"benchmark": "synthetic", "tasks": ("cb",)}, "data.tasks: no task 'cb'"),
        ({"benchmark": "synthetic", "order": 9}, "data.order: no order 9"),
        ({"benchmark": "synthetic"}, "data.root: .*set data.benchmark, to .*custom"),
        ({"benchmark": "custom"}, "data.tasks: .*no order of its own.*of agnews, am"),
        ({"benchmark": "custom", "tasks": ("x",)}, "no task 'x'.*agnews, amazon"),
        ({"tasks": ("cb",)}, r"train: no cb.json or cb_T5.json.*tasks there: agnews"),
    ],
)
def test_a_choice_that_is_not_there_names_the_alternatives(tmp_path, fields, message):
    folder(tmp_path, STANDARD)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    fields = {"benchmark": "standard_cl", "root": "{root}"} | fields
    if fields["benchmark"] == "superni":
        fields["root"] = None
    elif "root" in fields:
        fields["root"] = fields["root"].format(root=tmp_path)
    fails(message, tasks.load, config.Data(**fields))


def test_a_long_list_of_alternatives_is_cut(tmp_path):
    folder(tmp_path, [f"t{i:03}" for i in range(50)])
    fails("there are t000, .*t019 and 30 more", custom, tmp_path, ("x",))


def test_a_missing_split_is_named(tmp_path):
    folder(tmp_path, ("a",))
    (tmp_path / "dev/a.json").unlink()
    (tmp_path / "dev").rmdir()
    fails("no folder 'dev'; a benchmark has train, dev, test", custom, tmp_path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not valid JSON"),
        (b'[{"input": "x",}]', "not valid JSON.*line 1 column"),
        (b'{"input": "x"}\n{"input": "y"}', "JSON Lines.* make it one array"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
        ('[{"input": "é"}]'.encode("latin-1"), "not UTF-8 at byte 12"),
        ({"rows": []}, "must be an array.*not an object"),
        ([], "no rows; every split needs at least one"),
        (["x"], r"row 0 \(counted from 0\): must be an object.*not a string"),
        ([None], "row 0 .*must be an object.*not null"),
        ([{"output": "y"}], "row 0 .*no field 'input'; it has output"),
        ([{"input": "x", "text": "y"}], "row 0 .*no field 'output'; it has input, tex"),
        ([{"input": 3, "output": "y"}], "row 0 .*'input' must be a string, not a num"),
        ([{"input": "x", "output": True}], "'output' must be a string, not a boolean"),
        ([{"input": "x", "output": ["y"]}], "'output' must be a string, not an array"),
        ([{"id": 1, "input": "x", "output": "y"}], "'id' must be a string, not a numb"),
        ([{"input": "x", "output": ""}], "'output' is empty; fill it in or remove"),
        ([{"input": " \n", "output": "y"}], "'input' is empty; fill it in or remove"),
        (
            [{"input": "x\ud800", "output": "y"}],
            "'input' is no Unicode text at char.* 1",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".json", "_T5.json.gz"])
def test_a_bad_file_is_named_with_its_row(tmp_path, data, message, suffix):
    folder(tmp_path, ("a",), suffix)
    write(tmp_path / f"test/a{suffix}", data)
    fails(f"test/a{suffix}: .*{message}", custom, tmp_path)


def test_a_later_row_is_named_even_beyond_the_limit(tmp_path):
    folder(tmp_path, ("a",))
    write(tmp_path / "train/a.json", [*rows("a", "train"), {"input": "x"}])
    fails("train/a.json: row 4 .*no field 'output'", custom, tmp_path, limit_train=1)


def test_an_instruction_apart_comes_before_the_input(tmp_path):
    folder(tmp_path, ("a",))
    write(
        tmp_path / "train/a.json",
        [{"instruction": "Do: ", "input": "", "output": "x"}],
    )
    (task,) = custom(tmp_path)
    assert task.train == [{"id": "a_0", "input": "Do: ", "output": "x"}]
    write(
        tmp_path / "train/a.json",
        [{"instruction": None, "input": "i", "output": "x"}],
    )
    fails("row 0 .*'instruction' must be a string, not null", custom, tmp_path)


def test_a_task_that_is_there_twice_is_named(tmp_path):
    folder(folder(tmp_path, ("a",)), ("a",), "_T5.json")
    fails("train: task 'a' is there twice, as a.json and a_T5.json", custom, tmp_path)


def test_a_folder_of_other_files_is_told_what_makes_them_readable(tmp_path):
    for split in tasks.SPLITS:
        write(tmp_path / split / "a.jsonl", b'{"input": "i", "output": "o"}')
    fails("no TASK.json.*they hold a.jsonl; .*prepare --layout hub", custom, tmp_path)


@pytest.mark.parametrize(
    "data", [b"[]", gzip.compress(b"[]" * 99, mtime=0)[:-9], b"\x1f\x8b\x08"]
)
def test_a_broken_gzip_file_is_named(tmp_path, data):
    folder(tmp_path, ("a",), ".json.gz")
    (tmp_path / "train/a.json.gz").write_bytes(data)
    fails("train/a.json.gz: cannot be read", custom, tmp_path)


@pytest.mark.parametrize(
    "data, message",
    [
        (["a"], "must be an object .*not an array"),
        ({"b": "exact"}, "no files of task 'b'; there are a"),
        ({"a": "bleu"}, "task 'a' has no metric \"bleu\"; there are exact, rouge_l"),
        ({"a": ["exact"]}, "task 'a' has no metric"),
        (b"{", "not valid JSON"),
    ],
)
def test_a_bad_tasks_file_is_named(tmp_path, data, message):
    folder(tmp_path, ("a",))
    write(tmp_path / "tasks.json", data)
    fails(f"tasks.json: .*{message}", custom, tmp_path)


def test_only_the_known_rows_of_superni_may_lack_a_label(tmp_path):
    folder(tmp_path, ("task511", "task748"))
    unlabelled = [{"input": "x", "output": ""}]
    write(tmp_path / "train/task511.json", unlabelled)
    cfg = config.Data(benchmark="superni", root=str(tmp_path), tasks=("task511",))
    assert tasks.load(cfg)[0].train[0]["output"] == ""
    write(tmp_path / "train/task748.json", unlabelled)
    cfg = config.Data(benchmark="superni", root=str(tmp_path), tasks=("task748",))
    fails("train/task748.json: row 0 .*'output' is empty", tasks.load, cfg)
    write(tmp_path / "test/task511.json", unlabelled)
    cfg = config.Data(benchmark="superni", root=str(tmp_path), tasks=("task511",))
    fails("test/task511.json: row 0 .*'output' is empty", tasks.load, cfg)


def task(name="a", train=40, dev=30, test=10, leaks=0):
    """A task whose first `leaks` dev rows are test rows too."""
    tested = rows(name, "test", test)
    held = tested[:leaks] + rows(name, "dev", dev - leaks)
    return tasks.Task(name, "exact", rows(name, "train", train), held, tested)


def test_validation_mixes_the_first_rows_of_every_shuffled_dev_file():
    stream = [task("a", dev=30), task("b", dev=7)]
    chosen = tasks.validation(stream, rows=10)
    assert sorted(row["input"][0] for row in chosen) == ["a"] * 10 + ["b"] * 7
    assert chosen != sorted(chosen, key=lambda row: row["input"])
    order = np.random.default_rng(42).permutation(30)[:10]
    assert {i for i in ids(chosen) if i[0] == "a"} == {f"a_{i}" for i in order}
    assert chosen == tasks.validation(stream, rows=10)
    assert chosen != tasks.validation(stream, rows=10, seed=1)


def test_without_leaks_drops_dev_rows_that_are_test_rows():
    leaky = task(leaks=8)
    clean = tasks.without_leaks(leaky)
    assert clean.dev == leaky.dev[8:]
    assert (clean.train, clean.test) == (leaky.train, leaky.test)


@pytest.mark.parametrize("train, given", [(40, 4), (300, 25), (5, 1)])
def test_without_leaks_gives_train_rows_where_no_dev_row_is_left(train, given):
    leaky = task(train=train, dev=10, test=10, leaks=10)
    clean = tasks.without_leaks(leaky, rows=25)
    assert clean.dev == leaky.train[-given:]
    assert clean.train == leaky.train[:-given]
    assert tasks.without_leaks(clean) == clean


def test_usage_counts_what_leaked_and_what_was_done_about_it():
    def row(text):
        return {"id": "", "input": text, "output": "x"}

    train = [row(f"train {i}") for i in range(30)]
    test = [row("a"), row("b")]
    partly = tasks.Task("t", "exact", train, [row("a"), row(" b\n"), row("c")], test)
    wholly = partly._replace(dev=partly.dev[:2])
    clean, given = (tasks.without_leaks(task, 25) for task in (partly, wholly))
    fields = ("train", "dev", "test", "dev_in_test", "dropped", "held_out")
    for found, used, expected in (
        (partly, partly, (30, 3, 2, 2, 0, 0)),
        (partly, clean, (30, 1, 2, 0, 2, 0)),
        (wholly, given, (27, 3, 2, 0, 2, 3)),
    ):
        assert tasks.usage(found, used) == dict(zip(fields, expected, strict=True))


def test_without_leaks_says_when_there_is_nothing_to_validate_on():
    lonely = task("solo", train=1, dev=3, leaks=3)
    fails("solo: all dev rows are test rows.*add dev rows", tasks.without_leaks, lonely)


def fails(message, function, *args, **kwargs):
    """Assert that the call raises InputError with one line that matches `message`."""
    with pytest.raises(aim_jax.InputError, match=message) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


@golden.benchmarks
@pytest.mark.parametrize("benchmark", ["standard_cl", "long_sequence", "superni"])
def test_the_real_benchmarks_load(benchmark):
    for order, names in tasks.BENCHMARKS[benchmark].orders.items():
        cfg = config.Data(benchmark=benchmark, root=str(golden.DATA), order=order)
        loaded = tasks.load(cfg)
        assert [task.name for task in loaded] == list(names)
        for task in loaded:
            assert min(len(task.train), len(task.dev), len(task.test)) >= 16
    if benchmark == "superni":
        clean = [tasks.without_leaks(task) for task in loaded]
        assert all(task.dev == task.test for task in loaded)
        assert {len(task.dev) for task in clean} == {12, 14, 16, 25}


@golden.needed
def test_the_recorded_data_load_as_the_release_ships_them():
    cfg = config.Data(benchmark="standard_cl", root=str(golden.FOLDER / "data"))
    loaded = tasks.load(cfg)
    for number, task in enumerate(loaded):
        trace = golden.trace(f"task{number}_{task.name}_ours")
        assert sorted(ids(task.train)) == sorted(trace["train_sample_id"])
        expected = trace["eval_sample_id"].tolist()
        assert ids(tasks.validation(loaded[: number + 1])) == expected
        trace = golden.trace(f"task{number}_{task.name}_fwt")
        expected = [trace[f"{s}_sample_id"].tolist() for s in ("train", "eval")]
        assert [ids(part) for part in tasks.holdout(task.train, 0.1)] == expected


@golden.needed
@golden.benchmarks
def test_the_published_validation_rows_on_the_full_data():
    cases = golden.read("memory_and_validation_full_data.json.gz")
    assert len(cases) == 18
    for case in cases:
        benchmark = "superni" if "superni" in case["data_dir"] else "long_sequence"
        names = tuple(case["order"])
        cfg = config.Data(benchmark=benchmark, root=str(golden.DATA), tasks=names)
        # The release has the rows of yahoo's dev and test file all in its dev file.
        stream = [
            task._replace(dev=task.dev + task.test) if task.name == "yahoo" else task
            for task in tasks.load(cfg)
        ]
        chosen = ids(tasks.validation(stream))
        assert len(chosen) == case["n_val"]
        assert chosen == case.get("val_ids_after_shuffle", chosen)
        digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
        assert digest == case["val_ids_after_shuffle_sha256"], names


def held(folder, names, **files):
    (folder / "test").mkdir(parents=True)
    for name in names:
        rows = [{"id": str(i), "input": f"q {i}", "output": "a"} for i in range(5)]
        (folder / "test" / f"{name}.json").write_text(json.dumps(rows))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_held_out_tasks_are_the_test_rows_of_folders(tmp_path):
    first = held(tmp_path / "a", ["mine", "task002", "task363"])
    second = held(tmp_path / "b", ["yours"], tasks={"yours": "rouge_l"})
    found = tasks.held_out([first, second], 3)
    assert [(t.name, t.metric) for t in found] == [
        ("mine", "exact"),
        ("task002", "rouge_l"),
        ("task363", "exact"),
        ("yours", "rouge_l"),
    ]
    assert all(len(t.test) == 3 and not t.train and not t.dev for t in found)
    # Scored as in a stream, where `pos` counts as `p`.
    assert [t.remap for t in found] == [{}, {}, {"pos": "p", "neg": "n"}, {}]
    assert tasks.held_out([]) == []


def test_held_out_folders_that_will_not_do(tmp_path):
    with pytest.raises(aim_jax.InputError, match="eval.before_after: '.*no' must hold"):
        tasks.held_out([str(tmp_path / "no")])
    first, second = (held(tmp_path / n, ["mine"]) for n in "ab")
    with pytest.raises(aim_jax.InputError, match="'mine' of '.*b' is also in another"):
        tasks.held_out([first, second])
    bad = held(tmp_path / "c", ["mine"], tasks={"other": "exact"})
    with pytest.raises(aim_jax.InputError, match="no files of task 'other'"):
        tasks.held_out([bad])
