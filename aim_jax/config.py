"""Experiment configs: frozen dataclasses, loaded from Python files, overridden by flags.

A config file assigns `CONFIG = config.Config(...)`, or `CONFIGS`, a dict from names to
configs, for a sweep. Fields whose default is None and that
`PRESETS` lists take the value of the chosen preset (`method.preset`) unless they are set.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import runpy
import types
import typing
from collections.abc import Iterable
from typing import Any

import aim_jax
from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Model:
    """The frozen base: `embedded` or a Hugging Face directory."""

    path: str = "embedded"
    dtype: str = "float32"
    dropout: float | None = None  # the model's own; None: as its config.json says
    bits: int = 16  # of a frozen dense weight: 8 or 4 are integers with scales
    # What backward computes anew: nothing (`none`), whole layers (`full`), or what lies
    # between products and attention (`dots`).
    remat: str = "dots"
    # Or in one call: `flash`, ours, on NVIDIA GPUs and TPUs, or `cudnn`, for decoders on
    # NVIDIA GPUs.
    attention: str = "xla"


@dataclasses.dataclass(frozen=True)
class Data:
    """The stream of tasks and how its text becomes batches."""

    benchmark: str = "synthetic"
    root: str | None = None
    order: int | None = None
    tasks: tuple[str, ...] = ()  # a stream of one's own; overrides `order`
    limit_train: int | None = None
    limit_dev: int | None = None
    limit_test: int | None = None
    seed: int = 0  # of the generated tasks
    max_input: int = 1024  # of a training row; a longer one loses its end
    max_target: int = 128
    max_test_input: int = 8192  # beyond any row of the published benchmarks
    buckets: tuple[int, ...] = (64, 128, 192, 256, 384, 576, 768, 1024)
    target_buckets: tuple[int, ...] = (8, 32, 128)
    # That a device takes at once, of like lengths; None: 4 on a CPU, 8 elsewhere.
    device_rows: int | None = None
    pack: bool = True  # examples share a row that has room for them


@dataclasses.dataclass(frozen=True)
class Memory:
    """The rehearsal memory: rows of earlier tasks."""

    percent: float = 2.0
    rule: str | None = None  # `release` or `exact`
    replay: str | None = None  # run whose memory is used, in place of percent and rule
    batch_size: int = 32
    source: str = "train"  # `model`: written by it from those rows (`data.synthesis`)
    rows: int = 200  # source=model: kept of each task
    clusters: int = 20  # which they are picked from
    prompts: int | None = None  # pairs of rows to show, drawn by lot; None: all
    samples: int = 3  # written for each pair
    max_tokens: int = 512  # of a sample
    temperature: float = 0.9
    top_p: float = 0.6
    repetition: float = 1.2  # penalty of tokens that were said


@dataclasses.dataclass(frozen=True)
class Train:
    """One task's training; 0 epochs leave the adapter as it is."""

    seed: int = 42
    epochs: int = 10
    batch_size: int = 32
    micro_batch_size: int | None = None  # None: the whole batch at once
    learning_rate: float = 3e-4
    warmup_steps: int = 50
    clip_norm: float = 1.0  # inf: gradients stay as they are
    weight_decay: float = 0.0
    average: str | None = None  # `micro_batch`: mean of means; `token`: one mean
    eval_every: int = 40
    validation_rows: int = 25  # per task seen so far
    validation_leaks: bool | None = None  # keep validation rows that are test rows
    single_holdout: float | None = None  # part of train that validates single-task runs
    select: str = "best"  # the adapter of a task: `best` dev loss or `last`

    @property
    def micro(self) -> int:
        """Rows of a micro-batch."""
        return self.micro_batch_size or self.batch_size


@dataclasses.dataclass(frozen=True)
class Lora:
    """The low-rank delta, in PEFT's terms."""

    r: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    target: tuple[str, ...] = ("q", "v")  # names, one pattern, `all-linear`
    use_rslora: bool = False
    path: str | None = None  # PEFT adapter that the stream starts from; None: a new one


@dataclasses.dataclass(frozen=True)
class Eval:
    """Decoding and scoring."""

    fwt: bool = True
    batch_size: int = 64
    max_length: int = 128  # decoder tokens, the start token included
    before_after: tuple[str, ...] = ()  # folders of tasks to score before and after


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices."""

    mode: str = "auto"  # `auto`, `pmap` or `jit`
    tensor: int = 1  # devices that share a matrix product; the others share the rows
    exact: bool = False  # bitwise the same result on 1, 2, 4 and 8 devices; slower
    speculate: bool = True  # send a step before the signals of the last one are read


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the state is saved: a task that begins or ends always is."""

    steps: int = 200  # every so many of a task
    minutes: float = 10.0  # or as soon as the last is so old
    keep: int = 2  # the newest ones


@dataclasses.dataclass(frozen=True)
class Logs:
    """What is shown while a run goes on."""

    progress: bool = True
    tensorboard: bool = False  # event files in the run's folder tensorboard/


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    model: Model = Model()
    data: Data = Data()
    memory: Memory = Memory()
    train: Train = Train()
    lora: Lora = Lora()
    method: methods.Options = methods.Options(name="aim")
    eval: Eval = Eval()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    logs: Logs = Logs()


# A run may go on under other values of these sections.
INCIDENTAL = ("parallel", "checkpoint", "logs")

PRESETS = {
    "release": {
        "memory.rule": "release",
        "train.average": "micro_batch",
        "train.validation_leaks": True,
        "train.single_holdout": 0.1,
        "method.divisor": "planned",
        "method.trend": "ratio",
        "method.probe_dropout": True,
        "method.loss_scale": "accumulation",
    },
    "paper": {
        "memory.rule": "exact",
        "train.average": "token",
        "train.validation_leaks": False,
        "train.single_holdout": 0.0,
        "method.divisor": "taken",
        "method.trend": "window",
        "method.probe_dropout": False,
        "method.loss_scale": "mean",
    },
}

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "memory.rule": ("release", "exact"),
    "memory.source": ("train", "model"),
    "train.average": ("micro_batch", "token"),
    "train.select": ("best", "last"),
    "method.preset": tuple(PRESETS),
    "method.divisor": ("planned", "taken"),
    "method.trend": ("ratio", "window"),
    "method.loss_scale": ("accumulation", "mean"),
    "method.measure": ("l1", "frobenius"),
    "method.space": ("factor", "product"),
    "method.unit": ("matrix", "rank"),
    "method.drop_into": ("linear", "ties"),
    "model.bits": (4, 8, 16),
    "model.remat": ("none", "full", "dots"),
    "model.attention": ("xla", "flash", "cudnn"),
    "parallel.mode": ("auto", "pmap", "jit"),
}

# Least and greatest value.
BOUNDS = {
    **dict.fromkeys(
        (
            "data.limit_train",
            "data.limit_dev",
            "data.limit_test",
            "data.max_input",
            "data.max_target",
            "data.max_test_input",
            "data.device_rows",
            "memory.batch_size",
            "memory.rows",
            "memory.clusters",
            "memory.prompts",
            "memory.samples",
            "memory.max_tokens",
            "train.batch_size",
            "train.micro_batch_size",
            "train.eval_every",
            "checkpoint.steps",
            "checkpoint.keep",
            "lora.r",
            "method.interval",
            "method.every",
            "method.probe_every",
            "method.min_interval",
            "method.max_interval",
            "method.window",
            "method.shrink",
            "method.grow",
            "method.fisher_rows",
            "method.calibration",
            "eval.batch_size",
            "parallel.tensor",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "train.epochs",
            "train.learning_rate",
            "train.warmup_steps",
            "train.weight_decay",
            "train.validation_rows",
            "method.rehearsal",
            "method.cold_start",
            "method.strength",
            "method.beta",
            "method.orthogonal",
            "method.norm",
            "checkpoint.minutes",
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(
        ("model.dropout", "lora.dropout", "train.single_holdout"), (0, 0.99)
    ),
    **dict.fromkeys(
        (
            "method.smoothing",
            "method.quantile",
            "method.beta1",
            "method.beta2",
            "method.fresh",
            "method.both",
        ),
        (0, 1),
    ),
    **dict.fromkeys(
        ("method.temperature", "memory.temperature", "memory.repetition"),
        (1e-6, math.inf),
    ),
    "memory.top_p": (1e-6, 1),
    "lora.alpha": (1e-6, math.inf),
    "train.clip_norm": (1e-6, math.inf),  # 0 would train nothing, inf clips nothing
    "eval.max_length": (2, math.inf),  # one of them begins the answer of T5
    **dict.fromkeys(("train.seed", "data.seed"), (0, 2**32 - 1)),
    "memory.percent": (0, 100),
    "method.halve_at": (2, math.inf),  # half of 1 is no interval
}


def load(path: str, overrides: Iterable[str] = ()) -> Config:
    """The config of a Python file after `a.b=value` overrides, presets filled in.

    Raises InputError for a missing or broken file, a file without CONFIG, an unknown field
    (listing those there are) or a value that is of the wrong type or out of its range.
    """
    configs = sweep(path, overrides)
    if list(configs) != [""]:
        raise aim_jax.InputError(
            f"--config {path}: CONFIGS are several; a file with one CONFIG is needed here"
        )
    return configs[""]


def sweep(path: str, overrides: Iterable[str] = ()) -> dict[str, Config]:
    """Folder name -> config: those of CONFIGS in a Python file, or CONFIG under "".

    Overrides go to every one. Raises InputError as `load`, and for a name that is no
    folder's.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        near = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
        what = f"no file '{path}'" if path else "name a file"
        raise aim_jax.InputError(
            f"--config: {what}; configs here: {', '.join(near) or 'none'}"
        )
    try:
        found = runpy.run_path(str(file))
    except Exception as error:
        kind = type(error).__name__
        raise aim_jax.InputError(f"--config {path}: {kind}: {error}") from error
    configs = found.get("CONFIGS") or {"": found.get("CONFIG")}
    if not isinstance(configs, dict) or not all(
        isinstance(config, Config) for config in configs.values()
    ):
        raise aim_jax.InputError(
            f"--config {path}: must assign CONFIG = config.Config(...), or CONFIGS, a dict"
            " from names to such configs"
        )
    for name in configs:
        if name and not re.fullmatch(r"[\w=,+-][\w=,+.-]*", str(name)):
            raise aim_jax.InputError(
                f"--config {path}: '{name}' in CONFIGS cannot name a folder; use letters,"
                " digits and any of _ = , + . -"
            )
    return {str(name): _complete(config, overrides) for name, config in configs.items()}


def _complete(config: Config, overrides: Iterable[str]) -> Config:
    """`config` after overrides, with its presets filled in."""
    config = _typed(config)
    # The method decides which `method.*` fields there are, so its name comes first.
    for text in sorted(overrides, key=lambda o: not o.startswith("method.name=")):
        config = override(config, text)
    return resolve(config)


def override(config: Config, text: str) -> Config:
    """`config` with one `a.b=value` applied."""
    path, equals, value = text.partition("=")
    if not equals:
        raise aim_jax.InputError(f"--set {text}: must look like section.field=value")
    section, _, field = path.partition(".")
    _check(section, [f.name for f in dataclasses.fields(config)], "section", text)
    part = getattr(config, section)
    _check(field, [f.name for f in dataclasses.fields(part)], f"{section} field", text)
    if path == "method.name":
        # Another method has defaults of its own: what was chosen goes over, no more.
        plain = dataclasses.asdict(type(part)())
        chosen = {k: v for k, v in dataclasses.asdict(part).items() if v != plain[k]}
        part = _method(value, chosen)
    else:
        kind = typing.get_type_hints(type(part))[field]
        part = dataclasses.replace(part, **{field: _parse(path, value, kind)})
    return dataclasses.replace(config, **{section: part})


def resolve(config: Config) -> Config:
    """`config` with the fields its preset decides filled in, and every value checked."""
    config = _typed(config)
    _check_types(config)
    _check_choice(config, "method.preset")
    for path, value in PRESETS[config.method.preset].items():
        section, field = path.split(".")
        part = getattr(config, section)
        if getattr(part, field, value) is None:
            part = dataclasses.replace(part, **{field: value})
            config = dataclasses.replace(config, **{section: part})
    for path in CHOICES:
        _check_choice(config, path)
    _check_numbers(config)
    least = getattr(config.method, "min_interval", 1)
    if least > getattr(config.method, "max_interval", math.inf):
        raise aim_jax.InputError(
            f"method.min_interval: {least} is more than method.max_interval,"
            f" {config.method.max_interval}"
        )
    best = config.train.select == "best" and config.train.validation_rows
    if getattr(config.method, "merge_at_end", False) and best:
        raise aim_jax.InputError(
            "method.merge_at_end: needs train.select=last; `best` goes back to an adapter"
            " of before that merge"
        )
    return config


def to_json(config: Config) -> dict[str, Any]:
    """`config` as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(data: dict[str, Any]) -> Config:
    """The config that `to_json` gave `data` for.

    Raises InputError for fields or values that another version may have written.
    """
    parts = {}
    try:
        for field in dataclasses.fields(Config):
            values = {
                k: tuple(v) if isinstance(v, list) else v
                for k, v in data[field.name].items()
            }
            kind = field.type
            if field.name == "method":
                kind = methods.module(values["name"]).Options
            parts[field.name] = kind(**values)
        return resolve(Config(**parts))
    except (AttributeError, KeyError, TypeError, aim_jax.InputError) as error:
        raise aim_jax.InputError(
            f"config.json: not of this version of aim_jax ({error}); use that version,"
            " or another --workdir"
        ) from error


def sha256(config: Config) -> str:
    """Hash of everything in `config` that can change a result."""
    data = {k: v for k, v in to_json(config).items() if k not in INCIDENTAL}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(a: Config, b: Config) -> list[str]:
    """Lines `path: value in a, not value in b` for the fields that can change a result."""
    a, b = to_json(a), to_json(b)
    lines = []
    for section in (s for s in a if s not in INCIDENTAL):
        for field in sorted(a[section].keys() | b[section].keys()):
            x, y = (c[section].get(field, "unset") for c in (a, b))
            if x != y:
                lines.append(f"{section}.{field}: {x}, not {y}")
    return lines


def _typed(config: Config) -> Config:
    """`config` with its method's own options, which a bare name stands for."""
    for section in dataclasses.fields(config):
        part, kind = getattr(config, section.name), section.type
        if not isinstance(part, kind):
            raise aim_jax.InputError(
                f"{section.name}: {part!r} must be a {kind.__module__}.{kind.__name__}"
            )
    name = config.method.name
    if type(config.method) is methods.module(name).Options:
        return config
    method = _method(name, dataclasses.asdict(config.method))
    return dataclasses.replace(config, method=method)


def _method(name: str, values: dict[str, Any]) -> methods.Options:
    kind = methods.module(name).Options
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in known} | {"name": name})


def _check(name: str, known: list[str], what: str, text: str) -> None:
    if name not in known:
        raise aim_jax.InputError(
            f"--set {text}: no {what} '{name}'; there are {', '.join(known)}"
        )


def _parse(path: str, text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(
            _parse(path, t.strip(), item) for t in text.split(",") if t.strip()
        )
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise aim_jax.InputError(
            f"--set {path}={text}: must be {kind.__name__}"
        ) from None


def _value(config: Config, path: str) -> Any:
    """The value at `path`; None also where this method has no such field."""
    section, field = path.split(".")
    return getattr(getattr(config, section), field, None)


def _check_types(config: Config) -> None:
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for field, kind in typing.get_type_hints(type(part)).items():
            value = getattr(part, field)
            if not _is(value, kind):
                name = kind.__name__ if isinstance(kind, type) else kind
                raise aim_jax.InputError(
                    f"{section.name}.{field}: {value!r} must be {name}"
                )


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_is(v, item) for v in value)
    if kind is float:
        return type(value) in (int, float)
    # Not isinstance, for which True is an int.
    return type(value) is kind


def _check_choice(config: Config, path: str) -> None:
    value = _value(config, path)
    if value is not None and value not in CHOICES[path]:
        raise aim_jax.InputError(
            f"{path}: no '{value}'; there are {', '.join(map(str, CHOICES[path]))}"
        )


def _check_numbers(config: Config) -> None:
    """Raise InputError for a number out of its range, or one that does not suit others."""
    for path, (least, most) in BOUNDS.items():
        value = _value(config, path)
        if value is not None and not least <= value <= most:
            limit = f" and at most {most}" if most < math.inf else ""
            raise aim_jax.InputError(f"{path}: {value} must be at least {least}{limit}")
    for path in ("data.buckets", "data.target_buckets"):
        sizes = _value(config, path)
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise aim_jax.InputError(f"{path}: {sizes} must be lengths that rise")
    size, micro = config.train.batch_size, config.train.micro_batch_size
    if micro and size % micro:
        raise aim_jax.InputError(
            f"train.micro_batch_size: {micro} does not divide batch size {size}"
        )
