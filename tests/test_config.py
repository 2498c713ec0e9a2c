"""Configs: overrides with types, presets, JSON, and one clear line for every mistake."""

import dataclasses
import json
import math
import pathlib
import re
import typing

import hypothesis
import pytest
from hypothesis import strategies

import aim_jax
from aim_jax import config, methods
from aim_jax.data import tasks
from aim_jax.methods import aim, sequential

ROOT = pathlib.Path(__file__).parents[1]
DEFAULT = config.Config(method=aim.Options())
FILES = sorted((ROOT / "configs").glob("*.py"))


def value(cfg, path):
    section, field = path.split(".")
    return getattr(getattr(cfg, section), field)


def put(cfg, path, new):
    section, field = path.split(".")
    part = dataclasses.replace(getattr(cfg, section), **{field: new})
    return dataclasses.replace(cfg, **{section: part})


def write(folder, text):
    file = folder / "mine.py"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", 3),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=1", 1.0),
        ("lora.alpha=16", 16.0),
        ("eval.fwt=false", False),
        ("eval.fwt=True", True),
        ("eval.fwt=1", True),
        ("eval.fwt=0", False),
        ("model.remat=full", "full"),
        ("model.path=/a/b=c", "/a/b=c"),
        ("model.path=none", "none"),
        ("data.root=none", None),
        ("data.root=some", "some"),
        ("data.limit_train=None", None),
        ("data.limit_train=200", 200),
        ("train.micro_batch_size=8", 8),
        ("model.dropout=0.5", 0.5),
        ("data.tasks=agnews, dbpedia", ("agnews", "dbpedia")),
        ("data.tasks=", ()),
        ("data.buckets=32,64", (32, 64)),
        ("lora.target=q", ("q",)),
        ("method.interval=4", 4),
        ("method.shrink=1.5", 1.5),
        ("method.probe_dropout=false", False),
        ("method.probe_dropout=none", None),
        ("method.preset=paper", "paper"),
    ],
)
def test_override_has_the_type_of_its_field(text, expected):
    path = text.partition("=")[0]
    cfg = config.override(DEFAULT, text)
    new = value(cfg, path)
    assert new == expected and type(new) is type(expected)
    assert put(cfg, path, value(DEFAULT, path)) == DEFAULT, "another field has changed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.epochs", "--set train.epochs: must look like section.field=value"),
        ("train.epochs=many", "--set train.epochs=many: must be int"),
        ("train.epochs=1.5", "--set train.epochs=1.5: must be int"),
        ("train.epochs=", "--set train.epochs=: must be int"),
        ("train.epochs=none", "--set train.epochs=none: must be int"),
        ("data.limit_train=x", "--set data.limit_train=x: must be int"),
        ("train.learning_rate=fast", "--set train.learning_rate=fast: must be float"),
        ("eval.fwt=maybe", "--set eval.fwt=maybe: must be bool"),
        ("data.buckets=32,wide", "--set data.buckets=wide: must be int"),
    ],
)
def test_override_of_the_wrong_type(text, message):
    with pytest.raises(aim_jax.InputError) as caught:
        config.override(DEFAULT, text)
    assert str(caught.value) == message


def names(kind):
    return ", ".join(field.name for field in dataclasses.fields(kind))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian.epochs=1", f"no section 'trian'; there are {names(config.Config)}"),
        ("epochs=1", f"no section 'epochs'; there are {names(config.Config)}"),
        ("train.epoch=1", f"no train field 'epoch'; there are {names(config.Train)}"),
        ("train=1", f"no train field ''; there are {names(config.Train)}"),
        ("train.a.b=1", f"no train field 'a.b'; there are {names(config.Train)}"),
        (
            "method.lambda=1",
            f"no method field 'lambda'; there are {names(aim.Options)}",
        ),
    ],
)
def test_unknown_names_list_those_there_are(text, message):
    with pytest.raises(aim_jax.InputError) as caught:
        config.override(DEFAULT, text)
    assert str(caught.value) == f"--set {text}: {message}"


def test_an_unknown_method_lists_the_methods():
    with pytest.raises(aim_jax.InputError) as caught:
        config.override(DEFAULT, "method.name=aims")
    there = ", ".join(methods.names())
    assert str(caught.value) == f"method.name: no method 'aims'; there are {there}"
    assert {"aim", "sequential"} <= set(methods.names())


def test_another_method_keeps_what_both_have():
    cfg = put(put(DEFAULT, "method.preset", "paper"), "method.interval", 4)
    swapped = config.override(cfg, "method.name=sequential")
    assert swapped.method == sequential.Options(preset="paper")
    back = config.override(swapped, "method.name=aim")
    assert back.method == aim.Options(preset="paper")
    assert dataclasses.replace(swapped, method=cfg.method) == cfg


def test_another_method_has_its_own_defaults():
    file = ROOT / "configs/quickstart.py"
    for name in ("replay_interval", "recurrent_kif"):
        options = config.load(file, [f"method.name={name}"]).method
        assert options == methods.module(name).Options()
    options = config.override(
        put(DEFAULT, "method.rehearsal", 5), "method.name=forever"
    )
    assert options.method.rehearsal == 5  # what was chosen goes over


@pytest.mark.parametrize(
    ("section", "value"), [("method", "aim"), ("train", {"epochs": 1})]
)
def test_a_section_is_of_its_class(section, value):
    wrong = dataclasses.replace(DEFAULT, **{section: value})
    with pytest.raises(aim_jax.InputError, match=f"{section}: .* must be a aim_jax"):
        config.resolve(wrong)


def test_the_least_interval_is_not_above_the_greatest():
    wrong = put(put(DEFAULT, "method.min_interval", 9), "method.max_interval", 8)
    with pytest.raises(aim_jax.InputError, match="min_interval: 9 is more than"):
        config.resolve(wrong)


def test_the_merge_at_the_end_needs_the_adapter_of_the_end():
    merging = put(DEFAULT, "method.merge_at_end", True)
    with pytest.raises(aim_jax.InputError, match="needs train.select=last"):
        config.resolve(merging)
    config.resolve(put(merging, "train.select", "last"))


def test_the_method_comes_before_its_fields(tmp_path):
    file = write(
        tmp_path,
        "from aim_jax import config\n"
        "from aim_jax.methods import sequential\n"
        "CONFIG = config.Config(method=sequential.Options())\n",
    )
    cfg = config.load(file, ["method.interval=4", "method.name=aim"])
    assert cfg.method.name == "aim" and cfg.method.interval == 4
    with pytest.raises(aim_jax.InputError, match="no method field 'interval'"):
        config.load(file, ["method.interval=4"])


def test_later_overrides_win(tmp_path):
    file = write(tmp_path, "from aim_jax import config\nCONFIG = config.Config()\n")
    cfg = config.load(file, ["train.epochs=2", "train.epochs=3"])
    assert cfg.train.epochs == 3


def test_a_bare_method_name_has_that_methods_fields(tmp_path):
    file = write(tmp_path, "from aim_jax import config\nCONFIG = config.Config()\n")
    assert config.load(file, ["method.interval=4"]).method.interval == 4
    named = config.Config(method=aim.Options(name="sequential"))
    assert type(config.resolve(named).method) is sequential.Options


@pytest.mark.parametrize("preset", config.PRESETS)
def test_a_preset_fills_every_field_that_is_open(preset):
    cfg = config.resolve(put(DEFAULT, "method.preset", preset))
    for path, decided in config.PRESETS[preset].items():
        assert value(DEFAULT, path) is None
        assert value(cfg, path) == decided, path


@pytest.mark.parametrize("preset", config.PRESETS)
def test_an_explicit_value_wins_over_the_preset(preset):
    others = next(values for name, values in config.PRESETS.items() if name != preset)
    for path, other in others.items():
        cfg = put(put(DEFAULT, "method.preset", preset), path, other)
        cfg = config.resolve(cfg)
        expected = config.PRESETS[preset] | {path: other}
        assert {p: value(cfg, p) for p in expected} == expected


def test_presets_decide_the_same_fields_differently():
    release, paper = config.PRESETS["release"], config.PRESETS["paper"]
    assert release.keys() == paper.keys()
    assert all(release[path] != paper[path] for path in release)


def test_resolve_twice_changes_nothing():
    once = config.resolve(DEFAULT)
    assert config.resolve(once) == once != DEFAULT


def test_the_preset_is_read_after_the_overrides():
    cfg = config.load(str(ROOT / "configs/quickstart.py"), ["method.preset=paper"])
    assert cfg.train.average == "token" and cfg.method.divisor == "taken"


@pytest.mark.parametrize(
    ("path", "bad", "message"),
    [
        ("train.epochs", -1, "train.epochs: -1 must be at least 0"),
        ("train.epochs", "3", "train.epochs: '3' must be int"),
        ("train.epochs", True, "train.epochs: True must be int"),
        ("train.micro_batch_size", 0, "train.micro_batch_size: 0 must be at least 1"),
        ("train.micro_batch_size", 2.0, "2.0 must be int | None"),
        ("train.micro_batch_size", 5, "5 does not divide batch size 32"),
        (
            "train.learning_rate",
            math.nan,
            "train.learning_rate: nan must be at least 0",
        ),
        ("train.seed", -1, "-1 must be at least 0 and at most 4294967295"),
        ("eval.max_length", 1, "eval.max_length: 1 must be at least 2"),
        ("train.clip_norm", 0.0, "train.clip_norm: 0.0 must be at least 1e-06"),
        ("memory.top_p", 0.0, "0.0 must be at least 1e-06 and at most 1"),
        ("train.average", "mean", "no 'mean'; there are micro_batch, token"),
        ("train.select", "first", "train.select: no 'first'; there are best, last"),
        ("lora.alpha", "16", "lora.alpha: '16' must be float"),
        ("lora.dropout", 1.0, "1.0 must be at least 0 and at most 0.99"),
        ("lora.target", "q", "lora.target: 'q' must be tuple[str, ...]"),
        ("lora.target", ("q", 1), "must be tuple[str, ...]"),
        ("memory.percent", 101.0, "101.0 must be at least 0 and at most 100"),
        ("data.buckets", (), "data.buckets: () must be lengths that rise"),
        ("data.buckets", (64, 32), "(64, 32) must be lengths that rise"),
        ("data.target_buckets", (0, 8), "(0, 8) must be lengths that rise"),
        ("method.preset", "newest", "no 'newest'; there are release, paper"),
        ("method.divisor", "all", "no 'all'; there are planned, taken"),
        ("method.interval", 0, "method.interval: 0 must be at least 1"),
        ("method.cold_start", -1, "method.cold_start: -1 must be at least 0"),
        ("method.halve_at", 1, "method.halve_at: 1 must be at least 2"),
        ("parallel.mode", "gpu", "no 'gpu'; there are auto, pmap, jit"),
        ("model.dtype", "int8", "no 'int8'; there are float32, bfloat16"),
    ],
)
def test_values_that_cannot_be(path, bad, message):
    with pytest.raises(aim_jax.InputError) as caught:
        config.resolve(put(DEFAULT, path, bad))
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(message)


def test_checks_name_fields_that_exist():
    fields = {
        f"method.{field.name}"
        for name in methods.names()
        for field in dataclasses.fields(methods.module(name).Options)
    }
    for path in {*config.CHOICES, *config.BOUNDS, *config.PRESETS["release"]}:
        if path not in fields:
            value(DEFAULT, path)  # raises AttributeError


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("preset", config.PRESETS)
def test_json_round_trip(method, preset):
    cfg = config.override(DEFAULT, f"method.name={method}")
    cfg = config.resolve(put(cfg, "method.preset", preset))
    cfg = put(cfg, "data.tasks", ("one", "two"))
    text = json.dumps(config.to_json(cfg))
    again = config.from_json(json.loads(text))
    assert again == cfg
    assert config.sha256(again) == config.sha256(cfg)
    assert not config.differences(again, cfg)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "config.json: not of this version of aim_jax"),
        ({}, "('model')"),
        (config.to_json(DEFAULT) | {"train": {"epoch": 1}}, "argument 'epoch'"),
        (config.to_json(DEFAULT) | {"method": {"name": "gone"}}, "no method 'gone'"),
        (config.to_json(DEFAULT) | {"model": {"remat": False}}, "remat: False must be"),
        (config.to_json(DEFAULT) | {"model": {"remat": "all"}}, "remat: no 'all'"),
    ],
)
def test_json_of_something_else(data, message):
    with pytest.raises(aim_jax.InputError) as caught:
        config.from_json(data)
    assert message in str(caught.value)


def test_the_hash_is_of_what_can_change_a_result():
    same = (
        put(put(DEFAULT, "parallel.mode", "pmap"), "parallel.speculate", False),
        put(DEFAULT, "logs.progress", False),
    )
    for cfg in same:
        assert cfg != DEFAULT
        assert config.sha256(cfg) == config.sha256(DEFAULT)
        assert config.differences(cfg, DEFAULT) == []


def another(old):
    if isinstance(old, bool):
        return not old
    if isinstance(old, (int, float)):
        return old + 1
    return ("other",) if isinstance(old, tuple) else "other"


@pytest.mark.parametrize(
    "path",
    [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config.Config)
        if section.name not in config.INCIDENTAL
        for field in dataclasses.fields(getattr(DEFAULT, section.name))
    ],
)
def test_every_field_counts_in_hash_and_differences(path):
    old = value(DEFAULT, path)
    new = another(old)
    cfg = put(DEFAULT, path, new)
    assert config.sha256(cfg) != config.sha256(DEFAULT)
    shown = [list(v) if isinstance(v, tuple) else v for v in (old, new)]
    assert config.differences(DEFAULT, cfg) == [f"{path}: {shown[0]}, not {shown[1]}"]


def test_differences_across_methods():
    other = config.Config(method=sequential.Options())
    lines = config.differences(DEFAULT, other)
    assert "method.name: aim, not sequential" in lines
    assert "method.interval: 8, not unset" in lines
    assert all(line.startswith("method.") for line in lines)


scalars = {
    int: strategies.integers(-(10**9), 10**9),
    float: strategies.floats(allow_nan=False),
    bool: strategies.booleans(),
    str: strategies.text(strategies.characters(codec="ascii", exclude_characters=",")),
}


@hypothesis.given(strategies.data())
def test_what_is_written_is_read_back(data):
    """For any field of any section, `str` of a value is parsed to that value."""
    section = data.draw(strategies.sampled_from(dataclasses.fields(config.Config)))
    part = getattr(DEFAULT, section.name)
    hints = {k: v for k, v in typing.get_type_hints(type(part)).items() if k != "name"}
    field = data.draw(strategies.sampled_from(sorted(hints)))
    kinds = typing.get_args(hints[field]) or (hints[field],)
    kind = data.draw(strategies.sampled_from([k for k in kinds if k is not Ellipsis]))
    if kind is type(None):
        new, text = None, "none"
    else:
        new = data.draw(scalars[kind])
        text = str(new)
    if typing.get_origin(hints[field]) is tuple:
        hypothesis.assume(text.strip() == text != "")
        new = (new, new)
        text = f"{text}, {text}"
    hypothesis.assume(text.lower() != "none" or kind is type(None))
    path = f"{section.name}.{field}"
    cfg = config.override(DEFAULT, f"{path}={text}")
    assert value(cfg, path) == new


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_committed_configs_load_and_show_their_command(file):
    for cfg in config.sweep(str(file)).values():
        assert config.from_json(config.to_json(cfg)) == cfg
    text = file.read_text()
    assert f"python -m aim_jax.main --config configs/{file.name}" in text


BENCHMARKS = ("standard_cl", "long_sequence", "superni")
MODELS = ("t5_large", "qwen3_1p7b", "llama2_7b", "llama2_13b", "gemma3_270m")


def test_there_are_committed_configs():
    assert {"quickstart", *BENCHMARKS, *MODELS} <= {file.stem for file in FILES}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_preset_takes_every_benchmark_with_its_settings(name):
    for benchmark in BENCHMARKS:
        path = ROOT / f"configs/{name}.py"
        preset = config.load(path, [f"data.benchmark={benchmark}"])
        alone = config.load(ROOT / f"configs/{benchmark}.py")
        assert preset.model.path.startswith("models/")
        order = next(iter(tasks.BENCHMARKS[benchmark].orders))
        assert preset.data.order is None and alone.data.order == order
        for section in ("train", "memory", "method", "eval"):
            assert getattr(preset, section) == getattr(alone, section)


@pytest.mark.parametrize("path", ["", "configs/no.py", "configs"])
def test_a_missing_file_lists_the_configs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(aim_jax.InputError) as caught:
        config.load(path)
    what = f"no file '{path}'" if path else "name a file"
    listed = ", ".join(f"configs/{file.name}" for file in FILES)
    assert str(caught.value) == f"--config: {what}; configs here: {listed}"


def test_a_missing_file_where_there_are_no_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(aim_jax.InputError, match="configs here: none"):
        config.load("my.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must assign CONFIG = config.Config(...)"),
        ("CONFIGS = {'a': 1}\n", "or CONFIGS, a dict from names to such configs"),
        (
            "from aim_jax import config\nCONFIGS = {'../a': config.Config()}\n",
            "'../a' in CONFIGS cannot name a folder",
        ),
        (
            "from aim_jax import config\nCONFIGS = {'a': config.Config()}\n",
            "CONFIGS are several",
        ),
        ("CONFIG = {'train': {}}\n", "must assign CONFIG = config.Config(...)"),
        ("CONFIG = (\n", "SyntaxError: "),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named"),
        (
            "from aim_jax import config\n"
            "CONFIG = config.Config(train=config.Train(epoch=1))\n",
            "TypeError: Train.__init__() got an unexpected keyword argument 'epoch'",
        ),
        (
            "from aim_jax import config, methods\n"
            "CONFIG = config.Config(method=methods.Options(name='aims'))\n",
            "method.name: no method 'aims'; there are ",
        ),
    ],
    ids=[
        "empty",
        "values",
        "name",
        "sweep",
        "other type",
        "syntax",
        "import",
        "unknown field",
        "method",
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(aim_jax.InputError) as caught:
        config.load(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if "method.name" not in message:
        assert str(caught.value).startswith(f"--config {file}: ")


def test_the_method_page_has_every_field_of_the_presets_and_settings_that_load():
    page = (ROOT / "docs/method.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| (.+? \| .+?) \|", page, re.M))
    assert rows == {
        path: " | ".join(
            f"`{v}`" if isinstance(v, str) else str(v).lower()
            for v in (config.PRESETS[p][path] for p in ("release", "paper"))
        )
        for path in config.PRESETS["release"]
    }
    for line in page.splitlines():
        settings = re.findall(r"--set (\S+?=\w+)", line)
        config.load(ROOT / "configs/quickstart.py", settings)
