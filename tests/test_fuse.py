"""The command that merges PEFT adapters."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from fixtures import make_models

import aim_jax
from aim_jax import fuse, fusion

BASE = make_models.FOLDER / "gemma3"
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PATH = "base_model.model.model.layers.0.self_attn.q_proj/a"
NAME = PATH.replace("/a", ".lora_A.weight")


def write(folder: pathlib.Path, seed: int, rank: int = 2, **settings) -> pathlib.Path:
    """An adapter for the fixture model with random factors."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, value in safetensors.numpy.load_file(BASE / "adapter" / TENSORS).items():
        shape = [rank if n == 2 else n for n in value.shape]
        tensors[name] = np.float32(0.3 * rng.normal(size=shape))
    safetensors.numpy.save_file(tensors, folder / TENSORS)
    data = json.loads((BASE / "adapter" / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(data | {"r": rank} | settings))
    return folder


def products(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The change of every weight, float64."""
    data = json.loads((folder / SETTINGS).read_text())
    root = data["r"] ** 0.5 if data["use_rslora"] else data["r"]
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    return {
        name: data["lora_alpha"]
        / root
        * np.float64(tensors[name.replace("lora_A", "lora_B")])
        @ np.float64(a)
        for name, a in tensors.items()
        if "lora_A" in name
    }


def change(folder: pathlib.Path, **tensors) -> None:
    """Write other tensors, or none, in place of some."""
    found = safetensors.numpy.load_file(folder / TENSORS) | tensors
    found = {k: v for k, v in found.items() if v is not None}
    safetensors.numpy.save_file(found, folder / TENSORS)


@pytest.mark.parametrize("name", ["linear", "ties", "slao"])
def test_one_adapter(name, tmp_path):
    """The same tensors, bit by bit, and the same settings."""
    folder = write(tmp_path / "a", 0, layers_to_transform=[0, 1])
    fuse.fuse([folder], fusion.Rule(name), tmp_path / "out")
    one, other = (
        safetensors.numpy.load_file(f / TENSORS) for f in (folder, tmp_path / "out")
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key])
    assert json.loads((folder / SETTINGS).read_text()) == json.loads(
        (tmp_path / "out" / SETTINGS).read_text()
    )


def test_other_ranks_and_scales(tmp_path):
    """Products know no rank nor alpha: their weighted mean is met with rank enough."""
    folders = [
        write(tmp_path / "a", 0),
        write(tmp_path / "b", 1, rank=3, lora_alpha=7.5),
        write(tmp_path / "c", 2, rank=1, use_rslora=True),
    ]
    weights = (1.0, 2.0, 0.5)
    rule = fusion.Rule("linear", "product")
    each = [products(f) for f in folders]
    for out, step in (("out", 1), ("rslora", -1)):  # after the first's settings
        fuse.fuse(folders[::step], rule, tmp_path / out, weights[::step], rank=6)
        for name, value in products(tmp_path / out).items():
            mean = sum(w * p[name] for w, p in zip(weights, each, strict=True)) / 3.5
            np.testing.assert_allclose(value, mean, atol=1e-5)
    assert json.loads((tmp_path / "rslora" / SETTINGS).read_text())["use_rslora"]


def test_fisher(tmp_path):
    """Squared gradients come from a file beside each adapter."""
    folders = [write(tmp_path / name, seed) for seed, name in enumerate("ab")]
    tensors = [safetensors.numpy.load_file(f / TENSORS) for f in folders]
    fishers = [{k: v**2 for k, v in t.items()} for t in reversed(tensors)]
    for folder, values in zip(folders, fishers, strict=True):
        safetensors.numpy.save_file(values, folder / fuse.FISHER)
    fuse.fuse(folders, fusion.Rule("fisher"), tmp_path / "out")
    found = safetensors.numpy.load_file(tmp_path / "out" / TENSORS)
    for name, value in found.items():
        f, g = (np.float64(x[name]) + 1e-6 for x in fishers)
        expected = (f * tensors[0][name] + g * tensors[1][name]) / (f + g)
        np.testing.assert_allclose(value, expected, atol=1e-6)
    (folders[1] / fuse.FISHER).unlink()
    with pytest.raises(aim_jax.InputError, match="b: no fisher.safetensors"):
        fuse.fuse(folders, fusion.Rule("fisher"), tmp_path / "more")
    fishers[0][NAME][0, 0] = -1
    safetensors.numpy.save_file(fishers[0], folders[1] / fuse.FISHER)
    with pytest.raises(
        aim_jax.InputError, match=f"{fuse.FISHER}: {NAME} has values be"
    ):
        fuse.fuse(folders, fusion.Rule("fisher"), tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        ({"rank": 3}, {}, "/b: r is 3, but 2 in .*/a; --space product"),
        (
            {"lora_alpha": 8},
            {},
            "/b: scale of B A is 4, but 2 in .*/a; --space product",
        ),
        ({"use_rslora": True}, {}, "/b: scale of B A is 2.8"),
        ({"use_dora": True}, {}, "/b/.*: not supported: use_dora"),
        (
            {},
            {NAME: np.zeros((2, 5), np.float32)},
            rf"/b: {PATH} is \(2, 5\), but \(2, ",
        ),
        (
            {},
            {NAME: np.zeros((5, 2), np.float32)},
            rf"/b/.*: {NAME} is \(5, 2\); it must",
        ),
        (
            {},
            {NAME: np.full((2, 16), np.inf)},
            f"/b/.*: values that are not finite in {NAME}",
        ),
        ({}, {NAME: None}, f"/b/.*: no {NAME} beside its other factor"),
        (
            {},
            {NAME: None, NAME.replace("lora_A", "lora_B"): None},
            f"/b: no {PATH}, which .*/a has",
        ),
        (
            {},
            {"lm_head.weight": np.zeros(3)},
            "/b/.*: lm_head.weight is neither A nor B",
        ),
    ],
)
def test_adapters_that_do_not_go_together(settings, tensors, words, tmp_path):
    folders = [write(tmp_path / "a", 0), write(tmp_path / "b", 1, **settings)]
    change(folders[1], **tensors)
    with pytest.raises(aim_jax.InputError, match=words):
        fuse.fuse(folders, fusion.Rule("linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(command, tmp_path):
    """Flags, exit codes and the one line of an error."""
    folders = [str(write(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    call = functools.partial(command, "fuse")
    out = str(tmp_path / "out")
    options = ["--method", "task_arithmetic", "--weights", "1,-2", "--scale", "0.5"]
    done = call(*options, *folders, "--out", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    a, b, found = (
        safetensors.numpy.load_file(pathlib.Path(f) / TENSORS) for f in (*folders, out)
    )
    for name, value in found.items():
        np.testing.assert_allclose(value, 0.5 * (a[name] - 2 * b[name]), atol=1e-6)
    failed = call("--method", "ties", *folders, "--out", out)
    assert failed.returncode == 2
    assert failed.stderr == f"error: --out {out} is not empty; give a new folder\n"
    failed = call("--method", "ties", "--weights", "1,x", *folders, "--out", out + "2")
    assert failed.stderr == "error: --weights: 'x' is no number\n"
    failed = call("--method", "magmax", "--density", "1", *folders, "--out", out + "2")
    assert failed.stderr == "error: --density: is for --method ties or dare alone\n"
    failed = call("--method", "dare", "--drop_into", "x", out + "3", "--out", out + "2")
    assert failed.stderr == "error: drop_into: no 'x'; there are linear, ties\n"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(aim_jax.InputError, match="adapter_config.json: No such file"):
        fuse.fuse([tmp_path / "a"], fusion.Rule("linear"), tmp_path / "out")
    (tmp_path / "run/adapters").mkdir(parents=True)
    run = write(tmp_path / "run/adapters/00-a", 0).parents[1]
    with pytest.raises(aim_jax.InputError, match="such as .*run/adapters/00-a$"):
        fuse.fuse([run], fusion.Rule("linear"), tmp_path / "out")
    with pytest.raises(aim_jax.InputError, match="no adapters"):
        fuse.fuse([], fusion.Rule("linear"), tmp_path / "out")


@pytest.mark.parametrize(
    ("ours", "theirs", "weights"),
    [
        # PEFT's `linear` is a sum, and its results have alpha = r.
        (fusion.Rule("task_arithmetic", scale=1.0, roots=True), "linear", (0.7, -0.4)),
        (fusion.Rule("task_arithmetic", "product", scale=1.0), "svd", (0.7, -0.4)),
        (fusion.Rule("ties", "product", density=0.5), "ties_svd", (1.0, 1.0)),
        (fusion.Rule("ties", density=0.5), "ties", (1.0, 1.0)),
    ],
)
def test_peft_merges_alike(ours, theirs, weights, tmp_path):
    """PEFT loads what is written, and its own merge changes the weights as ours does."""
    peft = pytest.importorskip("peft")
    folders = [write(tmp_path / name, seed) for seed, name in enumerate("ab")]
    fuse.fuse(folders, ours, tmp_path / "out", weights)
    model = peft.PeftModel.from_pretrained(make_models.load(BASE), folders[0], "a")
    model.load_adapter(folders[1], "b")
    model.load_adapter(tmp_path / "out", "ours")
    model.add_weighted_adapter(
        ["a", "b"], list(weights), "theirs", theirs, density=ours.density
    )
    compared = 0
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            one, other = (module.get_delta_weight(n) for n in ("ours", "theirs"))
            assert one.abs().max() > 1e-2
            np.testing.assert_allclose(
                one.numpy(force=True), other.numpy(force=True), atol=1e-5
            )
            compared += 1
    assert compared == 6


@pytest.mark.slow
@pytest.mark.parametrize("space", fusion.SPACES)
@pytest.mark.parametrize("name", ["linear", "ties"])
def test_time_and_memory(name, space, tmp_path):
    """Eight modules of the width of a 7B model: seconds and peak memory, with -s."""
    rng = np.random.default_rng(0)
    folders = []
    for which in "abc":
        folders.append(write(tmp_path / which, 0, r=16))
        tensors = {
            f"base_model.model.layers.{i}.q.lora_{side}.weight": np.float32(
                rng.normal(size=shape)
            )
            for i in range(8)
            for side, shape in (("A", (16, 4096)), ("B", (4096, 16)))
        }
        safetensors.numpy.save_file(tensors, folders[-1] / TENSORS)
    code = (
        "import resource, runpy, sys, time; began = time.perf_counter()\n"
        "try: runpy.run_module('aim_jax.fuse', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code\n"
        "print(round(time.perf_counter() - began, 1),"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    args = ["--method", name, "--space", space, "--out", tmp_path / "out", *folders]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    seconds, peak = done.stdout.split()[-2:]
    print(f"{name}, {space}: {seconds} s, {peak} MiB")
    # The three products of one module alone would be 192 MiB, those of all 1536.
    assert int(peak) < 1536
