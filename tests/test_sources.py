"""Layouts of others: the rows that come out, and what is said of files that do not fit."""

import collections
import gzip
import json
import re

import golden
import pytest

import aim_jax
from aim_jax.data import sources, tasks


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def read(layout, source, name, **fields):
    return sources.LAYOUTS[layout](sources.Options(source, **fields))[name]()


def message(layout, source, name="a", **fields):
    with pytest.raises(aim_jax.InputError) as caught:
        read(layout, source, name, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(rows):
    return collections.Counter((row["input"], row["output"]) for row in rows)


# release


def plain(folder, suffix=".json", **extra):
    for split in tasks.SPLITS:
        rows = [
            {"id": f"{split}{i}", "input": f"{split} {i}", "output": "x"} | extra
            for i in range(3)
        ]
        write(folder / split / f"a{suffix}", rows)
    return folder


@pytest.mark.parametrize("suffix", tasks.SUFFIXES)
def test_released_rows_come_as_they_are(tmp_path, suffix):
    found = read("release", plain(tmp_path, suffix), "a", counts={"train": 2})
    assert found.metric is None
    assert [r["id"] for r in found.splits["train"]] == ["train0", "train1"]
    assert found.splits["dev"][2] == {"id": "dev2", "input": "dev 2", "output": "x"}


def test_an_instruction_apart_is_joined_to_the_input(tmp_path):
    found = read("release", plain(tmp_path, instruction="Do:\n"), "a")
    assert found.splits["test"][0]["input"] == "Do:\ntest 0"


def test_an_input_that_is_no_text_is_named(tmp_path):
    plain(tmp_path)
    write(tmp_path / "dev/a.json", [{"input": None, "output": "o"}])
    assert "row 0: 'input' must be a string, not null" in message("release", tmp_path)


def test_metrics_of_a_folder_of_ones_own_are_kept(tmp_path):
    write(plain(tmp_path) / "tasks.json", {"a": "rouge_l"})
    assert read("release", tmp_path, "a").metric == "rouge_l"


def test_release_names_what_does_not_fit(tmp_path):
    assert "no folder" in message("release", tmp_path / "none")
    text = message("release", plain(tmp_path / "in" / "side").parent)
    assert "no folder train/" in text and "in/side" in text
    write(tmp_path / "in/side/dev/a.json", b"[1")
    assert "a.json: not valid JSON" in message("release", tmp_path / "in/side")
    write(tmp_path / "in/side/dev/a.json", [{"input": "i"}])
    text = message("release", tmp_path / "in/side")
    assert "a.json: row 0: no field 'output'; it has input" in text
    write(tmp_path / "in/side/dev/a.json", [{"input": "i", "output": 3}])
    text = message("release", tmp_path / "in/side")
    assert "row 0: 'output' must be a string, not a number" in text
    write(tmp_path / "in/side/dev/a.json", [{"input": "\ud800", "output": "x"}])
    text = message("release", tmp_path / "in/side")
    assert "row 0: 'input' is no Unicode text at character 0" in text
    write(tmp_path / "in/side/dev/a.json", [{"id": "", "input": "x", "output": "y"}])
    assert "row 0: 'id' is empty" in message("release", tmp_path / "in/side")
    (tmp_path / "in/side/dev/a.json").unlink()
    assert "dev: no a.json" in message("release", tmp_path / "in/side")


# cl_benchmark


def group(root, place, labels, rows):
    for split in tasks.SPLITS:
        write(root / place / f"{split}.json", rows)
    write(root / place / "labels.json", labels)


PROMPTS = [
    (
        "SC/SST-2",
        ["Good", "Bad"],
        "What is the sentiment of the following paragraph? Choose one from the option."
        " Option: Good, Bad.\n",
    ),
    (
        "NLI/CB",
        ["entailment", "contradiction", "neutral"],
        'What is the logical relationship between the "sentence 1" and the "sentence 2"?'
        " Choose one from the option. Option: entailment, contradiction, neutral.\n",
    ),
    (
        "COPA/COPA",
        ["A", "B"],
        "According to the following passage, is the question true or false? Choose one"
        " from the option. Option: A, B.\n",
    ),
]


@pytest.mark.parametrize(("place", "labels", "prompt"), PROMPTS)
def test_cl_benchmark_gets_the_released_prompt(tmp_path, place, labels, prompt):
    group(tmp_path, place, labels, [{"label": labels[1], "sentence": "It is\n"}])
    name = place.split("/")[1].lower()
    found = read("cl_benchmark", tmp_path, name)
    row = {"id": f"{name}_0", "input": f"{prompt}It is\n\nAnswer:", "output": labels[1]}
    assert found.splits == dict.fromkeys(tasks.SPLITS, [row])


@golden.benchmarks
def test_cl_benchmark_rebuilds_every_released_classification_prompt(tmp_path):
    """Taken apart at the options and the answer, and put together again, they agree."""
    groups = {
        "SC": "amazon yelp imdb sst-2",
        "TC": "agnews dbpedia yahoo",
        "NLI": "mnli cb rte",
        "QQP": "qqp",
        "BoolQA": "boolqa",
        "COPA": "copa",
        "MultiRC": "multirc",
        "WiC": "wic",
    }
    form = re.compile(r".*? Option: (.*?)\.\n(.*)\nAnswer:", re.DOTALL)
    expected = {}
    for folder, names in groups.items():
        for name in names.split():
            for split in tasks.SPLITS:
                rows = json.loads(
                    (golden.DATA / f"long_sequence/{split}/{name}.json").read_text()
                )
                expected[name, split] = rows[:20]
                parts = [form.fullmatch(row["input"]) for row in rows[:20]]
                cut = [
                    {"label": row["output"], "sentence": part[2]}
                    for row, part in zip(rows[:20], parts, strict=True)
                ]
                write(tmp_path / folder / name / f"{split}.json", cut)
            labels = parts[0][1].split(", ")
            write(tmp_path / folder / name / "labels.json", labels)
    assert len(expected) == 45
    for (name, split), rows in expected.items():
        found = read("cl_benchmark", tmp_path, name)
        assert texts(found.splits[split]) == texts(rows)


def test_cl_benchmark_takes_its_rows_by_lot(tmp_path):
    rows = [{"label": "Good", "sentence": f"s{i}"} for i in range(50)]
    group(tmp_path, "SC/a", ["Good", "Bad"], rows)
    counts = {"train": 10}
    chosen = read("cl_benchmark", tmp_path, "a", counts=counts).splits
    assert chosen == read("cl_benchmark", tmp_path, "a", counts=counts).splits
    other = read("cl_benchmark", tmp_path, "a", counts=counts, seed=1).splits
    assert [len(rows) for rows in chosen.values()] == [10, 50, 50]
    ids = [[row["id"] for row in x["train"]] for x in (chosen, other)]
    assert ids[0] != ids[1] and ids[0] != [f"a_{i}" for i in range(10)]
    for row in chosen["train"]:
        assert f"\ns{row['id'][2:]}\nAnswer:" in row["input"]


def test_cl_benchmark_takes_instructions_of_ones_own(tmp_path):
    group(tmp_path / "x", "NEW/a", ["p", "q"], [{"label": "p", "sentence": "s"}])
    text = message("cl_benchmark", tmp_path / "x")
    assert "no instruction for group 'NEW'" in text and "--instructions" in text
    theirs = [{"instruction_type": "zero-shot", "instruction": "Which?\n"}]
    for value in (theirs, "Which?"):
        write(tmp_path / "new.json", {"NEW": value})
        found = read(
            "cl_benchmark", tmp_path / "x", "a", instructions=tmp_path / "new.json"
        )
        expected = "Which? Option: p, q.\ns\nAnswer:"
        assert found.splits["train"][0]["input"] == expected


def test_cl_benchmark_names_what_does_not_fit(tmp_path):
    group(tmp_path, "SC/a", ["Good"], [{"label": "Good", "sentence": "s"}])
    group(tmp_path, "TC/A", ["Good"], [{"label": "Good", "sentence": "s"}])
    assert "'a' is there twice" in message("cl_benchmark", tmp_path)
    (tmp_path / "TC/A/train.json").unlink()
    write(tmp_path / "SC/a/dev.json", [{"label": "Good"}])
    assert "dev.json: row 0: no field 'sentence'" in message("cl_benchmark", tmp_path)
    write(tmp_path / "SC/a/labels.json", [1, 2])
    assert "labels.json: item 0 must be a string" in message("cl_benchmark", tmp_path)


# superni


def instances(n, **fields):
    rows = [{"input": f"q {i}", "output": [f"r {i}", "other"]} for i in range(n)]
    return {"Definition": ["Do."], "Instances": rows} | fields


def sizes(found):
    return tuple(len(rows) for rows in found.splits.values())


@pytest.mark.parametrize(
    ("n", "expected"),
    # The counts that were released for task1590, task639, task181, task073, task363.
    [
        (158, (126, 16, 16)),
        (178, (142, 18, 18)),
        (424, (338, 43, 43)),
        (1175, (975, 100, 100)),
        (6000, (1000, 100, 100)),
    ],
)
def test_superni_splits_in_the_released_sizes(tmp_path, n, expected):
    write(tmp_path / "tasks/task7_x_y.json", instances(n))
    found = read("superni", tmp_path, "task7")
    assert sizes(found) == expected
    taken = [row["input"] for rows in found.splits.values() for row in rows]
    assert len(set(taken)) == sum(expected)


def test_superni_rows_are_released_prompts(tmp_path):
    task = {
        "Definition": "Give a summary. ",
        "Instances": [
            {"id": f"task1572-{i}", "input": f" Jo: {i} ", "output": [f" J{i}. "]}
            for i in range(3)
        ],
    }
    write(tmp_path / "task1572_samsum.json", task)
    found = read("superni", tmp_path, "task1572")
    rows = {row["id"]: row for rows in found.splits.values() for row in rows}
    assert rows["task1572-1"] == {
        "id": "task1572-1",
        "input": "[INS] Give a summary. \n [IN]  Jo: 1 \n [OUT] ",
        "output": " J1. ",
    }


@golden.benchmarks
@pytest.mark.parametrize("name", ["task1572", "task639", "task875"])
def test_superni_rebuilds_released_rows(tmp_path, name):
    rows = json.loads((golden.DATA / f"superni/train/{name}.json").read_text())
    form = re.compile(r"\[INS\] (.*?)\n \[IN\] (.*)\n \[OUT\] ", re.DOTALL)
    parts = [form.fullmatch(row["input"]) for row in rows]
    cut = [
        {"id": row["id"], "input": part[2], "output": [row["output"]]}
        for row, part in zip(rows, parts, strict=True)
    ]
    write(
        tmp_path / f"{name}_x.json", instances(0, Definition=parts[0][1], Instances=cut)
    )
    counts = {"train": len(rows)}
    found = read("superni", tmp_path, name, counts=counts)
    again = [row for split in found.splits.values() for row in split]
    assert sorted(again, key=str) == sorted(rows, key=str)


def test_superni_never_splits_an_input(tmp_path):
    task = instances(40)
    task["Instances"] += [x | {"input": x["input"] + " "} for x in task["Instances"]]
    write(tmp_path / "task7_x.json", task)
    found = read("superni", tmp_path, "task7")
    assert found.repeated == 40
    assert sizes(found) == (32, 4, 4)
    keys = {tasks.key(row) for rows in found.splits.values() for row in rows}
    assert len(keys) == 40


def test_superni_follows_counts_and_seed(tmp_path):
    write(tmp_path / "task7_x.json", instances(30))
    counts = {"train": 5, "dev": 4, "test": 6}
    a, b, c = (
        read("superni", tmp_path, "task7", counts=counts, seed=s).splits
        for s in (1, 1, 2)
    )
    assert [len(rows) for rows in a.values()] == [5, 4, 6]
    assert a == b != c
    text = message("superni", tmp_path, "task7", counts={"test": 29})
    assert "30 different inputs are too few" in text


def test_superni_takes_splits_that_are_there(tmp_path):
    for split, n in (("train", 3), ("dev", 2), ("test", 1)):
        write(tmp_path / f"task7_x/{split}.json", instances(n))
    found = read("superni", tmp_path, "task7")
    assert sizes(found) == (3, 2, 1)
    assert found.splits["test"][0]["output"] == "r 0"


def test_superni_names_what_does_not_fit(tmp_path):
    write(tmp_path / "task7_x.json", {"Instances": [1]})
    assert "no 'Definition'" in message("superni", tmp_path, "task7")
    write(tmp_path / "task7_x.json", instances(1, Instances=[{"input": "q"}]))
    assert "row 0: no field 'output'" in message("superni", tmp_path, "task7")
    write(tmp_path / "task7_x.json", [1])
    assert "must be a JSON object" in message("superni", tmp_path, "task7")
    write(tmp_path / "task7_z.json", {})
    assert "'task7' is there twice" in message("superni", tmp_path, "task7")


# hub


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The library, offline, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_HOME", str(cache))
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("datasets")
        patch.setattr(library.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(library.config, "HF_HUB_OFFLINE", True)
        library.disable_progress_bars()
        yield library
        library.enable_progress_bars()


def stored(datasets, folder):
    """A dataset with class names as files, the way the hub keeps it."""
    classes = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    for split, n in (("train", 6), ("validation", 3), ("test", 2)):
        rows = {
            "text": [f"{split} {i}" for i in range(n)],
            "label": [i % 2 for i in range(n)],
        }
        data = datasets.Dataset.from_dict(rows, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return str(folder)


def spec(tmp_path, **fields):
    write(tmp_path / "hub.json", {"a": fields})
    return tmp_path / "hub.json"


def a_file_each(tmp_path, kind):
    """Fields of a description whose splits are files train, dev and test of that kind."""
    files = {s: str(tmp_path / f"{s}.{kind}") for s in ("train", "dev", "test")}
    return {"path": kind, "data_files": files, "splits": {"dev": "dev"}}


def test_hub_reads_class_names(tmp_path, datasets):
    path = stored(datasets, tmp_path / "set")
    source = spec(tmp_path, path=path, input="{text}? {labels}.", output="{label}")
    found = read("hub", source, "a")
    assert sizes(found) == (6, 3, 2)
    rows = sorted(found.splits["test"], key=lambda row: row["id"])
    assert rows == [
        {"id": "a_test_0", "input": "test 0? no, yes.", "output": "no"},
        {"id": "a_test_1", "input": "test 1? no, yes.", "output": "yes"},
    ]


def test_hub_takes_parts_of_splits_names_and_counts(tmp_path, datasets):
    path = stored(datasets, tmp_path / "set")
    source = spec(
        tmp_path,
        path=path,
        splits={"train": "train[:4]", "dev": "train[4:]"},
        input="{text}",
        output="{label}",
        labels=["bad", "good"],
        metric="rouge_l",
    )
    found = read("hub", source, "a", counts={"train": 3})
    assert sizes(found) == (3, 2, 2)
    assert found.metric == "rouge_l"
    assert texts(found.splits["dev"]) == {("train 4", "bad"): 1, ("train 5", "good"): 1}
    assert {row["input"] for row in found.splits["train"]} < {
        f"train {i}" for i in range(4)
    }


def test_hub_reads_json_with_nested_fields(tmp_path, datasets):
    rows = [{"q": "Who?", "answers": {"text": ["Ann", "Bob"]}, "n": 3, "none": []}]
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.json", rows)
    source = spec(
        tmp_path,
        **a_file_each(tmp_path, "json"),
        input="{n}: {q}",
        output="{answers.text}{none}",
    )
    assert read("hub", source, "a").splits["dev"] == [
        {"id": "a_dev_0", "input": "3: Who?", "output": "Ann"}
    ]


def test_hub_labels_of_a_column_with_gaps(tmp_path, datasets):
    """A missing number leaves others as they are written, in its split and elsewhere."""
    written = {"train": "a,1\nc,0\n", "dev": "a,1\nb,\nc,0\n", "test": "b,\n"}
    for split, lines in written.items():
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{lines}")
    fields = a_file_each(tmp_path, "csv") | {"input": "{text}", "output": "{label}"}
    for more, a, c in (({"labels": ["bad", "good"]}, "good", "bad"), ({}, "1", "0")):
        splits = read("hub", spec(tmp_path, **fields, **more), "a").splits
        found = {s: {r["input"]: r["output"] for r in splits[s]} for s in written}
        assert found["train"] == {"a": a, "c": c}
        assert found["dev"] == {"a": a, "b": "", "c": c} and found["test"] == {"b": ""}
    (tmp_path / "test.csv").write_text("text,label\nd, 1\n")
    source = spec(tmp_path, **fields, labels=["bad", "good"])
    assert read("hub", source, "a").splits["test"][0]["output"] == "good"
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\na,fine\n")
    assert "label 'fine' has no name; there are 2: bad, good" in message(
        "hub", spec(tmp_path, **fields, labels=["bad", "good"])
    )


def test_hub_leaves_out_columns_with_gaps_that_no_template_names(tmp_path, datasets):
    """As whole numbers in one split and with a gap in another they had two types."""
    for split, age in (("train", "7"), ("dev", ""), ("test", "7")):
        lines = f"text,label,age\na,good,7\nb,bad,{age}\n"
        (tmp_path / f"{split}.csv").write_text(lines)
    fields = a_file_each(tmp_path, "csv") | {"input": "{text}", "output": "{label}"}
    source = spec(tmp_path, **fields)
    found = {
        row["input"]: row["output"] for row in read("hub", source, "a").splits["dev"]
    }
    assert found == {"a": "good", "b": "bad"}


def test_hub_keeps_words_that_pandas_takes_for_gaps(tmp_path, datasets):
    (tmp_path / "a.csv").write_text("text,label\nNA,None\nnull,n/a\nnan,yes\n")
    source = spec(
        tmp_path,
        path="csv",
        data_files=str(tmp_path / "a.csv"),
        splits=dict.fromkeys(("dev", "test"), "train"),
        input="{text}",
        output="{label}",
    )
    rows = read("hub", source, "a").splits["train"]
    found = {row["input"]: row["output"] for row in rows}
    assert found == {"NA": "None", "null": "n/a", "nan": "yes"}


def test_hub_names_what_does_not_fit(tmp_path, datasets):
    path = stored(datasets, tmp_path / "set")
    right = {"path": path, "input": "{text}", "output": "{label}"}

    def said(**changes):
        fields = {k: v for k, v in (right | changes).items() if v is not None}
        return message("hub", spec(tmp_path, **fields))

    assert "no column 'txt'; there are labels, text, label" in said(input="{txt}")
    assert "no field 'output'" in said(output=None)
    assert "no field 'outputs'" in said(outputs="{label}")
    assert "no split 'valid'; there are train, dev, test" in said(splits={"valid": "x"})
    assert "'labels' cannot be \"yes\"" in said(labels="yes")
    assert "label 1 has no name; there are 1: only" in said(labels=["only"])
    assert "datasets cannot load split 'none'" in said(splits={"train": "none"})
    assert "datasets cannot load" in said(path=str(tmp_path / "nowhere"))
    write(tmp_path / "hub.json", {"a/b": right})
    assert "no slash" in message("hub", tmp_path / "hub.json")
