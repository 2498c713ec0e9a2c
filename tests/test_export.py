"""The command that takes adapters and merged models out of a run."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_models

import aim_jax
from aim_jax import config, export, lora
from aim_jax.models import hf

SOURCE = make_models.FOLDER / "gemma3"
TASKS = ("sst-2", "yelp")


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    """What `run` leaves of two tasks, as far as export reads it."""
    base = hf.load(config.Model(path=str(SOURCE)))
    delta, settings = hf.load_adapter(SOURCE / "adapter", base.params, base.keys)
    cfg = config.Config(model=config.Model(path=str(SOURCE)), lora=settings)
    for number, task in enumerate(TASKS):
        changed = jax.tree.map(lambda x, n=number: x * (1 + n), delta)
        folder = tmp_path / "run" / "adapters" / f"{number:02}-{task}"
        hf.save_adapter(folder, changed, base.keys, settings, str(SOURCE))
    text = json.dumps(config.to_json(config.resolve(cfg)))
    (tmp_path / "run" / "config.json").write_text(text)
    return tmp_path / "run"


def test_peft(workdir, tmp_path):
    """The last task's adapter, or the named one's."""
    for task, number in ((None, 1), ("sst-2", 0)):
        out = tmp_path / f"out{number}"
        export.write(workdir, "peft", out, task)
        source = workdir / "adapters" / f"{number:02}-{TASKS[number]}"
        for file in source.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes()


def test_merged(workdir, tmp_path):
    """The folded model gives the adapter's logits; tokenizer files come along."""
    export.write(workdir, "merged", tmp_path / "out", "yelp")
    base = hf.load(config.Model(path=str(SOURCE)))
    merged = hf.load(config.Model(path=str(tmp_path / "out")))
    delta, settings = hf.load_adapter(
        workdir / "adapters" / "01-yelp", base.params, base.keys
    )
    tokens = jnp.arange(3, 15).reshape(2, 6)
    batch = {"inputs": tokens, "mask": tokens > 0, "targets": tokens[:, :4]}
    bound = {"params": base.params, "lora": lora.bind(delta, settings)}
    apply = jax.jit(base.model.apply)
    found = np.abs(apply({"params": merged.params}, batch) - apply(bound, batch))
    assert found.max() < 2e-5
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and "dtype" not in written


def test_merged_needs_the_base_of_the_run(workdir, tmp_path):
    base = hf.load(config.Model(path=str(SOURCE)))
    results = workdir / "results.json"
    results.write_text(json.dumps({"model": base.fingerprint}))
    export.write(workdir, "merged", tmp_path / "out", "yelp")
    results.write_text(json.dumps({"model": "another"}))
    with pytest.raises(
        aim_jax.InputError, match="its files have changed since the run"
    ):
        export.write(workdir, "merged", tmp_path / "again", "yelp")
    assert not (tmp_path / "again").exists()


def test_what_is_written_is_for_all_to_read(workdir, tmp_path):
    export.write(workdir, "merged", tmp_path / "out", None)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_merged_in_bfloat16(workdir, tmp_path):
    """The type of the run's base is that of the merged model."""
    file = workdir / "config.json"
    data = json.loads(file.read_text())
    data["model"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(data))
    export.write(workdir, "merged", tmp_path / "out", None)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("task", "out", "words"),
    [
        ("amazon", "new", "--task: no adapter after 'amazon'; there are sst-2, yelp"),
        (None, "run", "--out .* is not empty"),
    ],
)
def test_refusals(workdir, task, out, words):
    with pytest.raises(aim_jax.InputError, match=words):
        export.write(workdir, "peft", workdir.parent / out, task)


def test_not_a_run(tmp_path):
    with pytest.raises(aim_jax.InputError, match="no config.json; not a run"):
        export.write(tmp_path, "peft", tmp_path / "out", None)
    (tmp_path / "adapters").mkdir()
    with pytest.raises(aim_jax.InputError, match="no adapters/NN-TASK"):
        export.adapter(tmp_path)


def test_more_than_a_hundred_tasks(tmp_path):
    """Folders come in the order of their numbers, not of their names."""
    for name in ("11-b", "100-c", "02-a", "not-one"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    assert export.adapter(tmp_path).name == "100-c"
    with pytest.raises(aim_jax.InputError, match="there are a, b, c$"):
        export.adapter(tmp_path, "one")


def test_a_tilde_is_the_home_folder(command, workdir, tmp_path, monkeypatch):
    """As for --workdir of the main job: no shell replaces it behind `--flag=`."""
    monkeypatch.setenv("HOME", str(workdir.parent))
    given = f"--workdir=~/{workdir.name}", f"--out=~/{tmp_path.name}-out"
    done = command("export", "--format", "peft", *given)
    assert done.returncode == 0, done.stderr
    assert (workdir.parent / f"{tmp_path.name}-out/adapter_config.json").is_file()


def test_command(command, workdir, tmp_path):
    """The command itself: its files, its exit codes, its one line of an error."""

    call = functools.partial(command, "export", "--workdir", workdir)
    out = tmp_path / "out"
    done = call("--format", "merged", "--out", out, "--task", "sst-2")
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert (out / "model.safetensors").is_file()
    failed = call("--format", "peft", "--out", tmp_path / "b", "--task", "c")
    assert failed.returncode == 2
    assert (
        failed.stderr == "error: --task: no adapter after 'c'; there are sst-2, yelp\n"
    )
    failed = call("--format", "peft", "--out", tmp_path / "b", "sst-2")
    assert failed.returncode == 2 and "'sst-2': give values as" in failed.stderr
    (tmp_path / "file").touch()
    failed = call("--format", "peft", "--out", tmp_path / "file" / "b")
    assert failed.returncode == 2 and failed.stderr.startswith("error: --out")
    failed = call("--format", "peft")
    assert failed.returncode == 2 and "--out is missing" in failed.stderr
