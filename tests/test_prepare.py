"""Prepared folders: what the report counts, what a drop takes, and the command itself."""

import json
import pathlib

import golden
import pytest

import aim_jax
from aim_jax import config
from aim_jax.data import prepare, sources, tasks


def rows(*inputs, output="x"):
    return [
        {"id": f"{i}", "input": text, "output": output} for i, text in enumerate(inputs)
    ]


def write(folder, splits, name="a"):
    for split, data in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{name}.json").write_text(json.dumps(data))
    return folder


LEAKY = {
    "train": rows("a", "b", "c", "c ", "d") + rows("e", output=""),
    "dev": rows("a", "y", "z  z", output="y"),
    "test": rows("b", "c", "y", "z z", "w"),
}


def test_survey_counts_rows_labels_and_what_splits_share():
    report = prepare.survey(LEAKY)
    train, dev, _ = report["splits"].values()
    assert train == {
        "rows": 6,
        "repeated": 1,
        "unlabelled": 1,
        "distinct_labels": 2,
        "labels": {"x": 5, "": 1},
        "unseen_labels": {},
        "not_offered": {},
    }
    assert dev["unseen_labels"] == {"y": 3}
    assert report["shared"] == {
        "train/dev": {"rows": 1, "share": 1 / 3},
        "train/test": {"rows": 2, "share": 2 / 5},
        "dev/test": {"rows": 2, "share": 2 / 3},
    }


@pytest.mark.parametrize(
    ("way", "count", "left"),
    [
        ("unlabelled", 1, {"train": "a b c c  d", "dev": "a y z  z"}),
        ("duplicates", 1, {"train": "a b c d e", "dev": "a y z  z"}),
        ("train/dev", 1, {"train": "b c c  d e", "dev": "a y z  z"}),
        ("train/test", 3, {"train": "a d e", "dev": "a y z  z"}),
        ("dev/test", 2, {"train": "a b c c  d e", "dev": "a"}),
    ],
)
def test_drop_takes_what_its_name_says(way, count, left):
    splits, dropped = prepare.drop("a", LEAKY, [way])
    assert dropped == {way: count}
    assert {s: " ".join(r["input"] for r in splits[s]) for s in left} == left
    assert splits["test"] == LEAKY["test"]


def test_dev_is_held_out_of_train_where_all_of_it_leaks():
    train = rows(*map(str, range(40)))
    leaky = {"train": train, "dev": rows("x"), "test": rows("x", "y")}
    splits, dropped = prepare.drop("a", leaky, ["dev/test"])
    assert dropped == {"dev/test": 1, "held_out": 4}
    assert splits["train"] + splits["dev"] == train and len(splits["dev"]) == 4


def test_drop_leaves_something_to_learn():
    same = dict.fromkeys(tasks.SPLITS, rows("a"))
    with pytest.raises(aim_jax.InputError, match="leaves no train row"):
        prepare.drop("a", same, ["train/test"])


def prepared(tmp_path, splits=LEAKY, layout="release", **fields):
    options = sources.Options(write(tmp_path / "source", splits))
    return prepare.prepare(layout, options, tmp_path / "out", **fields)


def test_what_is_written_is_what_data_root_reads(tmp_path):
    report = prepared(tmp_path, drops=["unlabelled", "dev/test"], metric="rouge_l")
    cfg = config.Data(benchmark="custom", root=str(tmp_path / "out"), tasks=("a",))
    (task,) = tasks.load(cfg)
    assert task.metric == "rouge_l"
    assert task.train == LEAKY["train"][:-1] and task.dev == LEAKY["dev"][:1]
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert report["tasks"]["a"]["dropped"] == {
        "repeated": 0,
        "unlabelled": 1,
        "dev/test": 2,
    }
    found, written = (report["tasks"]["a"][k]["splits"] for k in ("found", "written"))
    assert (found["dev"]["rows"], written["dev"]["rows"]) == (3, 1)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "exact rouge_l"), ("exact", "exact exact")]
)
def test_a_metric_that_is_known_stays(tmp_path, given, expected):
    """task363 is one of the benchmark's exact tasks, task1 none of its tasks."""
    task = {
        "Definition": "Do.",
        "Instances": [{"input": f"{i}", "output": ["P"]} for i in range(9)],
    }
    for name in ("task1_x", "task363_sst2"):
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    options, out = sources.Options(tmp_path), tmp_path / "out"
    prepare.prepare("superni", options, out, ["task363", "task1"], metric=given)
    kinds = json.loads((out / "tasks.json").read_text())
    assert kinds == dict(zip(("task363", "task1"), expected.split(), strict=True))


def test_labels_that_no_prompt_offers_are_told(tmp_path):
    folder = tmp_path / "TC/a"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["x", "y"]')
    data = [{"sentence": s, "label": label} for s, label in ("1x", "2z", "3z")]
    for split in tasks.SPLITS:
        (folder / f"{split}.json").write_text(json.dumps(data))
    options = sources.Options(tmp_path)
    report = prepare.prepare("cl_benchmark", options, tmp_path / "out")
    assert prepare.table(report).splitlines()[2:] == [
        f"a: {split} labels that are none of the options: 'z' (2)"
        for split in tasks.SPLITS
    ]


def test_nothing_is_written_over_and_nothing_is_half_written(tmp_path):
    prepared(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(aim_jax.InputError, match="out is not empty; give a new folder"):
        prepared(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(aim_jax.InputError, match="leaves no train row"):
        same = dict.fromkeys(tasks.SPLITS, rows("a"))
        prepared(tmp_path / "new", same, drops=["train/test"])
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["source"]


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    prepared(tmp_path)
    assert (tmp_path / "out/tasks.json").is_file()


def test_wrong_names_list_the_right_ones(tmp_path):
    with pytest.raises(aim_jax.InputError, match="no task in .*'b'; there are a$"):
        prepared(tmp_path, names=["b"])
    with pytest.raises(aim_jax.InputError, match="'leaks'; there are unlabelled, dupl"):
        prepared(tmp_path, drops=["leaks"])
    (tmp_path / "source/tasks.json").write_text('{"a": "f1"}')
    with pytest.raises(
        aim_jax.InputError, match="no metric 'f1'; there are exact, rou"
    ):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], "data.benchmark=custom --set data.tasks=a"),
        (["task363"], "data.benchmark=superni --set data.tasks=task363"),
        (["cb", "rte"], "data.benchmark=long_sequence --set data.tasks=cb,rte"),
        (tasks.BENCHMARKS["superni"].orders[7], "data.benchmark=superni"),
    ],
)
def test_settings_read_a_benchmark_as_one(names, expected):
    kinds = {name: tasks.KNOWN.get(name, "exact") for name in names}
    text = prepare.settings(kinds, pathlib.Path("D"))
    assert text == f"--set data.root=D --set {expected}"


def test_settings_keep_the_metric_of_a_task_that_is_named_as_a_known_one():
    text = prepare.settings({"cb": "rouge_l"}, pathlib.Path("D"))
    assert text == "--set data.root=D --set data.benchmark=custom --set data.tasks=cb"


def test_a_tilde_is_the_home_folder(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "source", LEAKY)
    done = command(
        "data.prepare", "--layout=release", "--source=~/source", "--out=~/out"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/tasks.json").is_file()


def test_the_command_prints_a_table_or_one_line(command, tmp_path):
    source, out = write(tmp_path / "source", LEAKY), tmp_path / "out"
    arguments = ["--layout=release", f"--source={source}", f"--out={out}"]
    done = command("data.prepare", *arguments, "--drop=dev/test,unlabelled")
    assert (done.returncode, done.stderr) == (0, "")
    head, line, *notes, last = done.stdout.splitlines()
    assert head.split()[:3] == ["task", "metric", "train"]
    assert line.split()[:6] == ["a", "exact", "6", "3", "5", "1"]
    assert "2 (66.7 %)" in line
    assert notes == [
        "a: 1 train rows have no label",
        "a: dev labels not in train: 'y' (3)",
        "a: dev/test 2, unlabelled 1; written 5 / 1 / 5",
    ]
    assert f"--set data.root={out} --set data.benchmark=custom" in last
    again = command("data.prepare", *arguments)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: --out {out} is not empty; give a new folder\n"


@pytest.fixture(scope="module")
def released():
    """The survey of every task of Long Sequence and of the smallest of SuperNI."""
    names = {"long_sequence": tasks.BENCHMARKS["long_sequence"].metrics}
    names["superni"] = ["task1590", "task1572", "task639"]
    found = {}
    for benchmark in names:
        readers = sources.release(sources.Options(golden.DATA / benchmark))
        found |= {n: prepare.survey(readers[n]().splits) for n in names[benchmark]}
    return found


@golden.benchmarks
def test_the_released_splits_leak_what_is_known_to_leak(released):
    """Agrees with the data's own README, which compares inputs as they are."""
    for facts in released.values():
        assert facts["shared"]["train/dev"]["rows"] == 0
        assert facts["shared"]["train/test"]["rows"] == 0
    share = {n: facts["shared"]["dev/test"]["share"] for n, facts in released.items()}
    whole = "cb copa rte sst-2 wic task1590 task1572 task639".split()
    part = "agnews amazon yelp mnli qqp boolqa multirc imdb".split()
    assert {n for n, x in share.items() if x == 1} == set(whole)
    assert all(0.125 < share[n] < 0.345 for n in part)
    # Not in that README: these rows differ from test rows by one line break.
    assert share["dbpedia"] == 0.284
    assert share["yahoo"] == 0


@golden.benchmarks
def test_the_documented_leaks_are_the_measured_ones(released):
    lines = (golden.ROOT / "docs/benchmarks.md").read_text().splitlines()
    for name in tasks.BENCHMARKS["long_sequence"].metrics:
        splits, shared = released[name]["splits"], released[name]["shared"]["dev/test"]
        sizes = " / ".join(str(x["rows"]) for x in splits.values())
        labels = splits["train"]["distinct_labels"]
        percent = f"{100 * shared['share']:.1f} %"
        line = f"| {name} | {sizes} | {labels} | {shared['rows']} | {percent} |"
        assert line in lines
