"""Published numbers: each with where it is from and how it is known, none made up."""

import json
import pathlib
import re

import pytest

from aim_jax import methods, published
from aim_jax.data import tasks

ROOT = pathlib.Path(__file__).parents[1]
NOTES = ROOT / "../shared/PUBLISHED.md"
FIELDS = "benchmark order model method op fwt bwt source confidence note".split()
SCORES = ("op", "fwt", "bwt")
ENTRIES = json.loads((ROOT / "configs/published.json").read_text())
notes = pytest.mark.skipif(not NOTES.is_file(), reason=f"no collected notes at {NOTES}")


def numbers(entry):
    """The percentages of an entry."""
    found = [entry[s] for s in SCORES if entry[s] is not None]
    return found + entry.get("first_task", [])


def test_every_entry_says_where_it_is_from_and_how_it_is_known():
    assert ENTRIES
    for entry in ENTRIES:
        assert set(entry) - {"first_task"} == set(FIELDS), entry
        for field in ("benchmark", "model", "method", "source"):
            assert isinstance(entry[field], str) and entry[field].strip(), entry
        assert entry["confidence"] in ("direct", "secondary", "derived"), entry
        assert isinstance(entry["note"], str), entry


def test_orders_are_those_of_the_benchmark():
    for entry in ENTRIES:
        orders = tasks.BENCHMARKS[entry["benchmark"]].orders
        assert entry["order"] is None or entry["order"] in orders, entry
        if "first_task" in entry:
            assert len(entry["first_task"]) == len(orders[entry["order"]]), entry


def test_every_entry_has_a_number_and_every_number_is_a_percentage():
    for entry in ENTRIES:
        assert numbers(entry), entry
        assert all(isinstance(x, float) and -100 <= x <= 100 for x in numbers(entry))
        assert all(x >= 0 for x in [entry["op"] or 0, *entry.get("first_task", [])])


def test_no_entry_is_there_twice():
    keys = [tuple(e[f] for f in FIELDS if f not in SCORES) for e in ENTRIES]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "path, name",
    [
        ("google-t5/t5-large", "T5-large"),
        ("/models/Qwen3-0.6B/", "Qwen3-0.6B"),
        ("meta-llama/Llama-2-7b-chat-hf", "LLaMA2-7B-chat"),
        ("meta-llama/Llama-3.1-8B", "LLaMA3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B", "LLaMA3.1-8B"),
    ],
)
def test_models_are_known_by_the_names_of_their_folders(path, name):
    assert name in {e["model"] for e in ENTRIES}
    assert published.model(path) == published.model(name)


def test_models_that_are_not_the_same_are_kept_apart():
    different = ["t5-large", "t5-v1_1-large", "flan-t5-large", "t5-base"]
    different += [
        "Llama-2-7b-hf",
        "Llama-2-7b-chat-hf",
        "Qwen3-0.6B-Base",
        "Qwen3-0.6B",
    ]
    assert len({published.model(p) for p in different}) == len(different)


def test_methods_of_this_package_have_names_that_papers_use():
    assert {"aim", "sequential"} <= set(methods.names()) & set(published.NAMES)
    known = {e["method"] for e in ENTRIES}
    assert {n for names in published.NAMES.values() for n in names} <= known


@notes
def test_every_number_is_in_the_notes():
    found = {float(x) for x in re.findall(r"-?\d*\.?\d+", NOTES.read_text())}
    found |= {round(100 * x, 2) for x in found}
    for entry in ENTRIES:
        assert set(numbers(entry)) <= found, entry


@notes
def test_the_main_table_of_forever_is_there_cell_by_cell():
    section = NOTES.read_text().split("### 2.1")[1].split("###")[0]
    table = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ][2:]
    expected = {}
    for method, *cells in table:
        method = "SeqLoRA" if "SeqLoRA" in method else method
        for i, benchmark in enumerate(("standard_cl", "long_sequence", "superni")):
            op, bwt = (float(x) if x else None for x in cells[2 * i : 2 * i + 2])
            if op is not None:
                expected[benchmark, method] = op, bwt
    assert len(table) == 14
    assert expected == {
        (e["benchmark"], e["method"]): (e["op"], e["bwt"])
        for e in ENTRIES
        if e["source"] == "FOREVER, arXiv 2601.03938, Table 1"
    }
