"""What the benchmark measures is consistent, and what it compares is the same work."""

import dataclasses
import json
import shutil

import golden
import jax
import numpy as np
import pytest
import test_run
from fixtures import make_models

import aim_jax
from aim_jax import benchmark, config, jobs, parallel, plan, run
from aim_jax.data import batches
from aim_jax.methods import recurrent_kif, sequential
from aim_jax.models import hf

SHAPE = benchmark.Shape(rows=4, length=16, target=4)
FAMILIES = {"t5": ("q", "v"), "qwen3": ("q_proj", "v_proj")}


def of_family(name):
    """Without dropout, most of whose cost here would be to compile it."""
    return test_run.make(
        model__path=str(make_models.FOLDER / name),
        model__dropout=0.0,
        lora__dropout=0.0,
        lora__target=FAMILIES[name],
    )


def test_figures_of_random_rows():
    made = benchmark.benchmark(
        of_family("t5"),
        SHAPE,
        ("step", "rehearsal", "fusion", "decode"),
        prompts=5,
        rounds=2,
        count=2,
    )
    found = json.loads(json.dumps(made))["measures"]
    losses = found.pop("loss without dropout")
    assert losses["here"] == pytest.approx(np.log(40), rel=0.5)
    assert list(found) == [
        "decoding, 5 rows",
        "train step",
        "probe",
        "train step + probe",
        "rehearsal step, 8 a call",
        "fusion",
    ]
    tokens = SHAPE.rows * (SHAPE.length + SHAPE.target)
    train, probe, both, rehearsal = list(found.values())[1:5]
    for row, count in ((train, 1), (probe, 1), (both, 2), (rehearsal, 1)):
        assert row["seconds"] > 0 and row["processor_seconds"] >= 0
        work = row["tokens_per_second"] * row["seconds"]
        assert work == pytest.approx(count * tokens)
        rate = row["gflops_per_second"] * row["seconds"]
        assert rate == pytest.approx(row["gflops"])
        assert "mfu" not in row  # of a CPU there is no peak
    assert both["gflops"] == pytest.approx(train["gflops"] + probe["gflops"])
    assert rehearsal["gflops"] == train["gflops"]
    decoded = found["decoding, 5 rows"]
    said = decoded["tokens_per_second"] * decoded["seconds"]
    assert 0 <= round(said) <= 5 * SHAPE.target

    lines = benchmark.markdown(made).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {n}" for n in found]
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("name, length", [("t5", 20), ("qwen3", 16)])
def test_flops_are_those_of_the_plan(name, length):
    """length: of the plan, whose rows always have the answer in them."""
    cfg = of_family(name)
    bench = random_rows(cfg, SHAPE)
    rows = [*bench.task.train, *bench.task.memory]
    assert {len(e.inputs) + len(e.targets) for e in rows} == {length}
    planned = plan.programs(
        bench.job.cfg,
        parallel.open_devices(config.Parallel(mode="jit")),
        length,
        SHAPE.target,
    )
    assert benchmark._forward(bench).trained == planned["train"]().needed


def test_figures_of_real_rows():
    """Rows of unequal length, as the run has them: no FLOPs are told."""
    cfg = test_run.make()
    bench = benchmark.real(cfg, 3)
    found = benchmark.step(bench, {}, 1, 2)
    rows = [jobs.train_batch(bench.job, bench.task, s)[1] for s in (1, 2)]
    work = found["train step"]["tokens_per_second"] * found["train step"]["seconds"]
    assert work == pytest.approx(sum(map(batches.tokens, rows)) / 2)
    assert "gflops" not in found["train step"]
    assert [e.id for e in bench.prompts] == [
        r["id"] for r in bench.job.stream[1].test[:3]
    ]
    decoded = benchmark.decode(bench, {}, 1)
    assert list(decoded) == ["decoding, 3 rows"]


def random_rows(cfg, shape):
    devices = jobs.open_devices(cfg)
    return benchmark.plain(cfg, shape, 5, 1, devices, hf.load(cfg.model, devices))


def test_what_has_no_room_is_left_out_and_said(capsys):
    """It is asked once JAX has what it takes of a GPU: neither gives anything back."""
    ran = []

    class Side:
        def batch(self, rows):
            return rows

        def loss(self, batch):
            return 1.0

        def lacking(self, micros, recalled):
            assert sum(map(len, micros)) == SHAPE.rows and ran
            return "out of memory"

    bench = random_rows(of_family("qwen3"), SHAPE)
    train = bench.job.steps.train
    steps = bench.job.steps._replace(
        train=lambda *given: ran.append(1) or train(*given)
    )
    bench = bench._replace(job=dataclasses.replace(bench.job, steps=steps))
    found = benchmark.step(bench, {"theirs": Side()}, 1, 1)
    assert "against" not in found["train step"]
    assert found["loss without dropout"]["theirs"] == 1.0
    assert "theirs is left out: out of memory" in capsys.readouterr().err


def test_ways_alternate_after_a_warm_up():
    called = []
    calls = {
        "a": (lambda: called.append("a"), lambda: called.append("warm a")),
        "b": (lambda: called.append("b"), lambda: called.append("warm b")),
    }
    spent = benchmark.clocked(calls, 3)
    assert called == ["warm a", "warm b", *"ababab"]
    assert all(len(v) == 3 for of in spent.values() for v in of.values())


def test_ratios_are_medians_of_rounds():
    spent = {
        ("x", ""): {"seconds": [2, 4, 60], "processor_seconds": [2, 2, 2]},
        ("x", "y"): {"seconds": [4, 8, 10], "processor_seconds": [1, 4, 8]},
    }
    way = benchmark.Way(
        lambda: None, 2, tokens=6, flops=8e9, others={"y": lambda: None}
    )
    row = benchmark._row("x", way, spent)
    assert row["seconds"] == 2 and row["tokens_per_second"] == 3
    assert row["gflops"] == 8 and row["gflops_per_second"] == 4
    assert row["against"]["y"] == {
        "seconds": 4,
        "ratio": 0.5,
        "processor_seconds": 2,
        "processor_ratio": 0.5,
    }


def test_a_shape_without_weights_gets_random_ones(tmp_path):
    source, made = tmp_path / "shape", tmp_path / "made"
    source.mkdir()
    shutil.copy(make_models.FOLDER / "qwen3" / "config.json", source)
    cfg = test_run.make(model__path=str(source))
    own = benchmark.with_weights(cfg, made)
    assert own == dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, path=str(made))
    )
    params = hf.flatten(hf.load(own.model).params)
    for path, value in params.items():
        if "norm" in path:
            assert (value == 1).all(), path
        else:
            assert 0.01 < value.std() < 0.03, path
    # Weights that cannot be used are for `hf.load` to refuse.
    (source / "pytorch_model.bin").touch()
    assert benchmark.with_weights(cfg, made) is cfg


def test_first_step_weights_and_memory():
    path = make_models.FOLDER / "llama2"
    settings = {"model.path": path, "lora.target": "q_proj,v_proj", "lora.dropout": 0}
    found = benchmark.start(
        [*(f"--set={k}={v}" for k, v in settings.items()), "--length=16", "--rows=2"]
    )
    size = sum(x.size for x in jax.tree.leaves(hf.load(config.Model(str(path))).params))
    (name,) = (key for key in found if key.startswith("loading of the weights"))
    weights = found.pop(name)
    assert weights["bytes"] == 4 * size
    rate = weights["bytes_per_second"] * weights["seconds"]
    assert rate == pytest.approx(weights["bytes"])
    assert found.pop("peak memory")["bytes"] > weights["bytes"]
    assert list(found) == [
        "first step + probe sent, nothing compiled",
        "first step + probe done, nothing compiled",
        "first step + probe sent, compilation cache",
        "first step + probe done, compilation cache",
    ]
    assert all(v > 0 for row in found.values() for v in row.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_pytorch_beside_it_does_the_same(name):
    pytest.importorskip("peft")
    made = benchmark.benchmark(
        of_family(name),
        SHAPE,
        ("step", "decode"),
        prompts=5,
        rounds=1,
        count=1,
        against="torch",
    )
    found = made["measures"]
    losses = found["loss without dropout"]
    assert losses["torch"] == pytest.approx(losses["here"], rel=1e-5)
    ways = ["torch, one by one", "torch, batched"]
    assert list(found["decoding, 5 rows"]["against"]) == ways
    assert found["rows of the same tokens"] == dict.fromkeys(ways, 5)
    for key in ("train step", "probe", "train step + probe"):
        beside = found[key]["against"]["torch"]
        assert beside["ratio"] == pytest.approx(
            found[key]["seconds"] / beside["seconds"]
        )
    assert "torch" in made["versions"]


def test_what_is_compared_with_must_be_there(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(benchmark.importlib, "import_module", missing)
    with pytest.raises(
        aim_jax.InputError, match="No module named 'torch'; pip install"
    ):
        benchmark.beside("against_torch")
    monkeypatch.setattr(aim_jax, "__file__", str(tmp_path / "aim_jax" / "__init__.py"))
    with pytest.raises(aim_jax.InputError, match="needs tests/against_torch.py of a"):
        benchmark.beside("against_torch")


@golden.needed
def test_seconds_of_the_release():
    """For the recorded merges they are the recorded ones, however often a part ran."""
    against_release = benchmark.beside("against_release")
    merges, expected = [], 0.0
    for number, name in enumerate(golden.CONTINUAL):
        data = golden.trace(name)
        steps = data.get("merge_M", np.zeros(0)).tolist()
        merges += [{"task": number, "rehearsal": m} for m in steps]
    for task in golden.read("tasks.json"):
        if task["mode"] == "ours":
            parts = [part for part in task["time"].values() if part]
            expected += sum(part["n"] * part["cpu_mean_s"] for part in parts)
    cfg = golden.settings()
    found = against_release.released(cfg, merges, len(golden.CONTINUAL))
    training, evaluation, whole = (row["processor_seconds"] for row in found.values())
    assert training == pytest.approx(expected)
    assert evaluation == pytest.approx(1000 * 0.0145, rel=0.01)
    assert whole == training + evaluation


@pytest.mark.slow
@golden.needed
def test_the_recorded_run_again():
    kept = run.run, jobs.train_batch, jobs.fresh
    found = benchmark.beside("against_release").replay()
    assert (run.run, jobs.train_batch, jobs.fresh) == kept
    recorded = [golden.trace(name) for name in golden.CONTINUAL]
    assert found["work"]["steps"] == sum(len(data["lr"]) for data in recorded)
    assert found["work"]["probes"] == sum(
        len(d.get("probe_loss", ())) for d in recorded
    )
    parts = [found[name]["seconds"] for name in ("training", "evaluation", "whole run")]
    assert parts[0] + parts[1] <= parts[2]


def test_every_way_does_the_same_work_and_is_timed(monkeypatch):
    rounds, ends = 2, {False: [], True: []}
    train = run.train

    def watched(job, task, place, log, save):
        after = train(job, task, place, log, save)
        ends[job.cfg.parallel.speculate].append(after.state.delta)
        return after

    monkeypatch.setattr(run, "train", watched)
    # A method whose compiled step carries something on.
    cfg = test_run.make(recurrent_kif.Options(), train__epochs=1)
    made = benchmark.idle(benchmark.real(cfg, 2), rounds)

    plain, speculative = ends[False], ends[True]
    assert len(plain) == len(speculative) == rounds + 1  # the first is not timed
    for delta in (*plain[1:], *speculative):
        jax.tree.map(np.testing.assert_array_equal, plain[0], delta)
    assert made["steps"] == 24 / 4
    spent = made["milliseconds a step"]
    assert set(spent) == {"device", "plain", "speculative"}
    assert min(spent.values()) > 0
    for way, idle in made["idle"].items():
        expected = 1 - spent["device"] / spent[way]
        assert idle == pytest.approx(expected, abs=0.01)


def test_padding_is_counted():
    """Two parts of two rows a step: counted here row by row."""
    cfg = test_run.make(data__buckets=(32, 40, 64), data__device_rows=2)
    made = benchmark.padding(cfg)
    assert 1 <= made["tokens"]["parts"] <= made["tokens"]["batch"]
    assert 1 <= made["tokens"]["micro_batches"] <= made["tokens"]["batch"]
    assert set(made["lengths"]) <= {32, 40, 64}
    # One bucket for all: whatever the parts, every row is as long as it.
    whole = benchmark.padding(test_run.make(data__buckets=(64,)))["tokens"]
    assert whole["parts"] == whole["batch"] > made["tokens"]["parts"]
    read = made["decoding"]
    assert read["tokens"] >= 1 and read["steps"] >= 1 and 0 < read["shared"] < 1


def test_bad_input_is_one_line(command):
    done = command("benchmark", "--set=train.epocs=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --set train.epocs=3: no train field 'epocs'")
    assert done.stderr.count("\n") == 1


def test_what_was_measured_is_not_lost(command, tmp_path):
    """Markdown has the name of the JSON, and a folder may be no place to write it."""

    def call(out):
        given = "--measure=fusion", "--rounds=1", "--steps=1", "--length=8", "--rows=1"
        return command("benchmark", *given, f"--out={out}")

    for out in (tmp_path / "a.md", tmp_path / "none" / "a.json"):
        done = call(out)
        assert done.returncode == 2 and "must end in .json, in" in done.stderr
    (tmp_path / "a.json").mkdir()
    done = call(tmp_path / "a.json")
    assert done.returncode == 2 and done.stderr.endswith("a.json: Is a directory\n")
    assert json.loads(done.stdout)["measures"]["fusion"]


def test_a_decoders_row_holds_its_answer():
    cfg = of_family("qwen3")
    with pytest.raises(aim_jax.InputError, match="--length 4: a decoder's row has"):
        random_rows(cfg, SHAPE._replace(length=4))


def test_the_second_task_needs_a_memory_of_the_first():
    with pytest.raises(
        aim_jax.InputError, match="this stream has 3 tasks, and the mem"
    ):
        benchmark.real(test_run.make(sequential.Options()), 1)
