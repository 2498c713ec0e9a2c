"""Hugging Face checkpoints: safetensors -> base tree on its devices, and back.

A parameter that is stacked over layers is read layer by layer, and each device reads only
its slice. Pickle files are never opened.
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

import aim_jax
from aim_jax import config, lora, models, parallel, records
from aim_jax.models import flash, layers

ASSETS = pathlib.Path(aim_jax.__file__).parent / "assets"
# What a model directory of the hub is read for: config, tokenizer, weights.
FILES = ["*.json", "*.model", "*.txt", "*.jinja", "model*.safetensors"]
# Elements of a tensor that are read at once; only a row that is longer exceeds it.
PIECE = 2**23
# Fields of a PEFT config that are ours, or that change no number.
PEFT_KNOWN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
PEFT_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Fields that say which modules have A and B, where those are not known by name alone.
PEFT_CHOICE = {"exclude_modules", "layers_pattern", "layers_to_transform"}
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]


class Base(NamedTuple):
    """A frozen base model.

    family: its module (`aim_jax.models`); model: Linen module; params: base tree;
    keys: path of each parameter -> Hugging Face name; fingerprint: hash of its files.
    """

    family: ModuleType
    model: Any
    params: dict[str, Any]
    keys: dict[str, str]
    fingerprint: str

    @property
    def embedding(self) -> jax.Array:
        """The token embeddings (v, i)."""
        return flatten(self.params)[self.family.EMBEDDING]


def directory(path: str) -> pathlib.Path:
    """The folder of a `model.path`: the embedded model, a local directory or a hub id's.

    A hub id's files come from the cache of huggingface_hub, downloaded if need be.
    """
    folder = ASSETS if path == "embedded" else snapshot(path, "model.path", FILES)
    if not (folder / "config.json").is_file():
        raise aim_jax.InputError(
            f"model.path: no config.json in '{path}'; give a Hugging Face model directory,"
            " a hub id or `embedded`"
        )
    return folder


def snapshot(path: str, field: str, patterns: list[str]) -> pathlib.Path:
    """The local folder `path`, or that of a hub id; no network if HF_HUB_OFFLINE is set.

    field: what gave the path; patterns: the files that are read.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return folder
    import huggingface_hub  # slow to import, and only this function needs it

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(path, allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise aim_jax.InputError(
            f"{field}: '{path}' is no local directory, and the hub does not give it:"
            f" {why}"
        ) from None


def load(cfg: config.Model, devices: parallel.Devices | None = None) -> Base:
    """The base model of `model.path` with float parameters in `model.dtype`.

    Each parameter goes straight onto its devices, split by the rules of the family (onto
    the first device without `devices`), and becomes integers there for `model.bits`.
    Raises InputError for an unsupported architecture, missing files, pickle files, and
    for tensors that are missing, unknown, repeated or of another shape, naming them.
    """
    folder = directory(cfg.path)
    family, model = build(cfg, devices)
    keys = family.keys(model.config)
    stored, kept = flatten(abstract(model)), parameters(cfg, model, keys)
    files = tensor_files(folder)
    if devices:
        places = parallel.shardings(kept, family.RULES, devices)
    else:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = dict.fromkeys(kept, first)
    files = _without_copies(folder, files, set(keys.values()), family.COPIES)
    _check(folder, files, stored, keys, family.IGNORED)
    flat = {}
    for path, leaf in stored.items():
        value = _place(files, keys[path], leaf, jnp.dtype(cfg.dtype), places[path])
        parts = {"weight": path, "scale": path.removesuffix("weight") + "scale"}
        if parts["scale"] in kept:
            there = {name: places[part] for name, part in parts.items()}
            quantize = functools.partial(layers.quantize, bits=cfg.bits)
            value = jax.jit(quantize, out_shardings=there)(value)
            flat |= {part: value[name] for name, part in parts.items()}
        else:
            flat[path] = value
    return Base(family, model, unflatten(flat), keys, _fingerprint(folder, files))


def build(
    cfg: config.Model, devices: parallel.Devices | None = None
) -> tuple[ModuleType, Any]:
    """Family and Linen module of a `model` section; no weight is read.

    Raises InputError for an attention that the model does not have on these devices.
    """
    family, model_config = read_config(directory(cfg.path))
    changes: dict[str, Any] = {
        "dtype": jnp.dtype(cfg.dtype),
        "remat": cfg.remat,
        # Without devices weights alone are wanted, on whatever is to run them.
        "attention": cfg.attention if devices else "xla",
    }
    if cfg.dropout is not None:
        changes["dropout"] = cfg.dropout
    made = dataclasses.replace(model_config, **changes)
    platform = devices.mesh.devices.flat[0].platform if devices else ""
    gpu = platform in ("gpu", "cuda")
    if made.attention == "flash":
        name = "triton" if gpu else {"tpu": "mosaic"}.get(platform)
        if not name or made.head_width not in flash.COMPILERS[name].widths:
            raise aim_jax.InputError(
                "model.attention: flash is for NVIDIA GPUs, with heads of 16, 32, 64 or"
                " 128 features, and for TPUs, with heads of 8, 16, ... 256; use xla"
            )
        made = dataclasses.replace(made, attention=name)
    if made.attention == "cudnn":
        fits = family.KIND == "decoder" and made.dropout == 0
        fits = fits and made.head_width in range(8, 129, 8)
        if not (fits and cfg.dtype == "bfloat16" and gpu):
            raise aim_jax.InputError(
                "model.attention: cudnn is for decoders without attention dropout"
                " (model.dropout=0), with heads of 8, 16, ... 128 features, in bfloat16"
                " (model.dtype), on NVIDIA GPUs; use xla"
            )
    return family, family.Model(made)


def parameters(
    cfg: config.Model, model: Any, keys: dict[str, str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and type of each parameter as it is kept on its devices."""
    kept = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(cfg.dtype))
        for path, x in flatten(abstract(model)).items()
    }
    for module in lora.dense(keys) if cfg.bits < 16 else ():
        quantize = functools.partial(layers.quantize, bits=cfg.bits)
        made = jax.eval_shape(quantize, kept[f"{module}/weight"])
        kept |= {f"{module}/{name}": x for name, x in made.items()}
    return kept


def size(cfg: config.Model) -> int:
    """Bytes of the base model of a `model` section, as it is kept."""
    family, model = build(cfg)
    kept = parameters(cfg, model, family.keys(model.config))
    return sum(x.size * x.dtype.itemsize for x in kept.values())


def companions(folder: pathlib.Path) -> list[pathlib.Path]:
    """Tokenizer and generation files of a model directory: all that is no weight."""
    kinds = (".json", ".model", ".txt", ".jinja")
    spare = ("config.json", "model.safetensors.index.json")
    found = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file())
    return [p for p in found if p.name not in spare]


def ends(folder: pathlib.Path, eos: int) -> tuple[int, ...]:
    """The tokens that end an answer: `eos`, then what generation_config.json adds to it."""
    file = folder / "generation_config.json"
    told = records.read_json(file, {}).get("eos_token_id")
    more = told if isinstance(told, list) else [told]
    return eos, *(token for token in more if token not in (None, eos))


def read_config(folder: pathlib.Path) -> tuple[ModuleType, Any]:
    """Family module and its Config from a folder's config.json."""
    file = folder / "config.json"
    data = records.read_json(file)
    if "text_config" in data:
        raise aim_jax.InputError(
            f"{file}: model_type '{data.get('model_type')}' is not text alone; save its"
            " language model by itself and give that directory"
        )
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method")
        raise aim_jax.InputError(
            f"{file}: quantized weights ({method}) are not supported; give the model"
            " before its quantization"
        )
    family = models.family(data.get("model_type", "none"))
    try:
        return family, family.config_from_hf(data)
    except aim_jax.InputError:
        raise
    except KeyError as error:
        raise aim_jax.InputError(f"{file}: no field {error}") from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise aim_jax.InputError(
            f"{file}: a field is not what transformers writes there: {error}"
        ) from error


def abstract(model: Any) -> dict[str, Any]:
    """Shapes of a model's base tree; nothing is allocated."""

    def made() -> dict[str, Any]:
        row = jnp.zeros((1, 2), jnp.int32)
        batch = {"inputs": row, "mask": row > 0, "targets": row[:, :1]}
        return model.init(jax.random.key(0), batch)["params"]

    return jax.eval_shape(made)


def save(
    folder: pathlib.Path,
    params: dict[str, Any],
    keys: dict[str, str],
    limit: int = 5 * 10**9,
) -> None:
    """Write `params` under Hugging Face names: model.safetensors, or shards and an index.

    limit: bytes of tensors in one file; only a tensor that is larger alone exceeds it.
    """
    import huggingface_hub  # slow to import, and few functions need it

    tensors: dict[str, np.ndarray] = {}
    for path, value in flatten(params).items():
        tensors |= _parts(keys[path], np.asarray(value))
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(index, indent=2) + "\n")


def save_adapter(
    folder: pathlib.Path,
    delta: dict[str, Any],
    keys: dict[str, str],
    cfg: config.Lora,
    base_path: str,
) -> None:
    """Write `delta` as a PEFT adapter that `peft.PeftModel` loads.

    Of whatever rank `delta` is, its scale is that of `cfg`. keys: those of the base;
    base_path: the `model.path` that the adapter belongs to.
    """
    tensors = {}
    for path, value in flatten(delta).items():
        module, _, side = path.rpartition("/")
        if side == "a":
            cfg = lora.of_rank(cfg, value.shape[-2])
        name = _adapter_name(keys[f"{module}/weight"], side)
        tensors |= _parts(name, np.asarray(value, np.float32))
    named = lora.named(keys, cfg)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if _encodes(keys) else "CAUSAL_LM",
        "base_model_name_or_path": str(ASSETS)
        if base_path == "embedded"
        else os.path.expanduser(base_path),
        "r": cfg.r,
        # PEFT's type is int; its own configs hold a float only where one was given.
        "lora_alpha": int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.use_rslora,
        "target_modules": sorted(cfg.target) if named else cfg.target[0],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    write_adapter(folder, tensors, settings)


def write_adapter(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]
) -> None:
    """Write the files of a PEFT adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def read_adapter(
    folder: pathlib.Path, file: str = "adapter_model.safetensors"
) -> tuple[dict[str, Any], dict[str, Any], config.Lora]:
    """{module: {a (r, in), b (out, r)}} of a PEFT adapter, its JSON, and what that says.

    Its base is not asked for, so a module may be any that PEFT gives A and B; it is named
    as in the file, up to `.lora_`. file: another file of such tensors. Values are float32.
    Raises InputError as `load_adapter` does.
    """
    cfg = _adapter_config(folder / "adapter_config.json", PEFT_CHOICE)
    settings = records.read_json(folder / "adapter_config.json")
    where = folder / file
    modules: dict[str, Any] = {}
    for name in _tensors(where):
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if not found:
            raise aim_jax.InputError(f"{where}: {name} is neither A nor B of a LoRA")
        with safetensors.safe_open(where, "numpy") as handle:
            value = handle.get_tensor(name)
        side, rank = found[2].lower(), value.shape[found[2] == "B" :][:1]
        if value.ndim != 2 or rank != (cfg.r,):
            wanted = "(r, in)" if side == "a" else "(out, r)"
            raise aim_jax.InputError(
                f"{where}: {name} is {value.shape}; it must be {wanted}, r = {cfg.r}"
            )
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise aim_jax.InputError(f"{where}: values that are not finite in {name}")
        modules.setdefault(found[1], {})[side] = value
    if not modules:
        raise aim_jax.InputError(f"{where}: no tensors")
    for module, sides in modules.items():
        for side in {"a", "b"} - sides.keys():
            raise aim_jax.InputError(
                f"{where}: no {module}.lora_{side.upper()}.weight beside its other factor"
            )
    return modules, settings, cfg


def load_adapter(
    folder: pathlib.Path, params: dict[str, Any], keys: dict[str, str]
) -> tuple[dict[str, Any], config.Lora]:
    """The float32 delta and the settings of a PEFT adapter.

    params, keys: those of the base (or its shapes). Raises InputError for whatever PEFT
    can express and a delta cannot (DoRA, rank patterns, saved modules, ...), for tensors
    that are missing, unknown or of another shape, and for values that are not finite.
    """
    cfg = _adapter_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    shapes = flatten(
        jax.eval_shape(lambda: lora.init(jax.random.key(0), params, keys, cfg))
    )
    names = {}
    for path in shapes:
        module, _, side = path.rpartition("/")
        names[path] = _adapter_name(keys[f"{module}/weight"], side)
    files = dict.fromkeys(_tensors(file), file)
    _check(folder, files, shapes, names)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat = {
        path: _place(files, names[path], leaf, jnp.dtype("float32"), device)
        for path, leaf in shapes.items()
    }
    bad = []
    for path, value in flat.items():
        finite = np.isfinite(value).all(axis=(-2, -1), keepdims=True)
        parts = zip(_names(names[path], value.shape), finite.ravel(), strict=True)
        bad += [name for name, good in parts if not good]
    if bad:
        raise aim_jax.InputError(f"{file}: values that are not finite in {_some(bad)}")
    return unflatten(flat), cfg


def start(cfg: config.Lora, base: config.Model) -> dict[str, Any]:
    """The delta of the adapter `lora.path`, to continue or to evaluate.

    Of the base no weight is read. Raises InputError as `load_adapter`, and where `cfg` says
    other than the adapter, with the settings to give; its dropout may be another.
    """
    folder = snapshot(cfg.path, "lora.path", ADAPTER_FILES)
    family, model = build(base)
    delta, own = load_adapter(folder, abstract(model), family.keys(model.config))
    told = []
    if sorted(own.target) != sorted(cfg.target):
        told.append(f"--set lora.target={','.join(own.target)}")
    for field in ("r", "alpha", "use_rslora"):
        if getattr(own, field) != getattr(cfg, field):
            told.append(f"--set lora.{field}={getattr(own, field)}")
    if told:
        raise aim_jax.InputError(
            f"lora.path: the adapter '{cfg.path}' has other settings: {' '.join(told)}"
        )
    return delta


def _adapter_config(file: pathlib.Path, known: Collection[str] = ()) -> config.Lora:
    """The settings of an adapter_config.json that says nothing but what they can hold.

    known: fields beside them that the caller can do with.
    """
    if not file.is_file():
        inside = [*records.numbered(file.parent / "adapters").values()]  # of a run
        such = f", such as {inside[-1]}" if inside else ""
        raise aim_jax.InputError(
            f"{file}: No such file; give the folder of a PEFT adapter{such}"
        )
    data = records.read_json(file)
    if data.get("peft_type") != "LORA":
        raise aim_jax.InputError(
            f"{file}: peft_type {data.get('peft_type')} is not supported; it must be LORA"
        )
    refused = {
        field: value
        for field, value in data.items()
        # PEFT writes every field; those not in use are empty.
        if value and field not in {*PEFT_KNOWN, *PEFT_INERT, *known}
    }
    if refused.get("bias") == "none":
        del refused["bias"]
    if refused.get("init_lora_weights") in (True, "gaussian"):
        del refused["init_lora_weights"]
    if refused:
        shown = ", ".join(f"{k} = {v!r}" for k, v in sorted(refused.items()))
        raise aim_jax.InputError(
            f"{file}: not supported: {shown}; an adapter here is A and B of one rank and"
            " scale for whole kinds of dense layers"
        )
    target = data.get("target_modules") or ()
    try:
        found = config.Lora(
            r=int(data["r"]),
            alpha=float(data["lora_alpha"]),
            dropout=float(data.get("lora_dropout", 0.0)),
            target=(target,) if isinstance(target, str) else tuple(sorted(target)),
            use_rslora=data.get("use_rslora", False),
        )
    except KeyError as error:
        raise aim_jax.InputError(f"{file}: no field {error}") from None
    except (TypeError, ValueError) as error:
        raise aim_jax.InputError(
            f"{file}: a field is not what PEFT writes there: {error}"
        ) from None
    if found.r < 1 or not found.alpha:
        raise aim_jax.InputError(
            f"{file}: r is {found.r} and lora_alpha {found.alpha:g}; such an adapter does"
            " nothing"
        )
    return found


# A nested dict as {`a/b/c`: leaf}, and back.
flatten = functools.partial(traverse_util.flatten_dict, sep="/")
unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


def tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name of each tensor in the checkpoint -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    # As transformers: beside a whole file an index, of an earlier save, says nothing.
    if index.is_file() and not files[0].is_file():
        weights = records.read_json(index).get("weight_map", {})
        names = {str(name) for name in weights.values()}
        outside = [n for n in names if pathlib.PurePath(n).name != n]
        if outside:
            raise aim_jax.InputError(
                f"{index}: {_some(outside)}: must be names of files beside it"
            )
        files = sorted(folder / name for name in names)
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise aim_jax.InputError(f"{folder}: no {_some(absent)}{_pickles(folder)}")
    where: dict[str, pathlib.Path] = {}
    repeated = []
    for file in files:
        names = _tensors(file)
        repeated += [name for name in names if name in where]
        where |= dict.fromkeys(names, file)
    if repeated:
        raise aim_jax.InputError(f"{folder}: repeated tensors {_some(repeated)}")
    return where


def _tensors(file: pathlib.Path) -> list[str]:
    """Names of the tensors in a file."""
    if not file.is_file():
        raise aim_jax.InputError(
            f"{file.parent}: no {file.name}{_pickles(file.parent)}"
        )
    try:
        with safetensors.safe_open(file, "numpy") as handle:
            return list(handle.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise aim_jax.InputError(f"{file}: not readable: {error}") from None


def _pickles(folder: pathlib.Path) -> str:
    """Why the pickle files of a folder do not serve, if there are any."""
    found = sorted(p.name for s in ("bin", "pt", "pth") for p in folder.glob(f"*.{s}"))
    if not found:
        return ""
    return (
        f"; {found[0]} is a pickle, which can run code when opened: convert it with"
        " save_pretrained(..., safe_serialization=True)"
    )


def _names(template: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names, and their shapes, of one parameter of our tree."""
    if "{}" not in template:
        return {template: shape}
    return {template.format(i): shape[1:] for i in range(shape[0])}


def _parts(template: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that one parameter of our tree is, by their Hugging Face names."""
    tensors = value if "{}" in template else [value]
    return dict(zip(_names(template, value.shape), tensors, strict=True))


def _write(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from error
    # It is for its owner alone, unlike what else is written.
    file.chmod(file.parent.stat().st_mode & 0o666)


def _adapter_name(weight: str, side: str) -> str:
    """PEFT's name of A or B (`side` a or b) beside a weight."""
    module = weight.removesuffix(".weight")
    return f"base_model.model.{module}.lora_{side.upper()}.weight"


def _encodes(keys: dict[str, str]) -> bool:
    """Whether the model is an encoder-decoder."""
    return any(name.startswith("encoder.") for name in keys.values())


def _check(
    folder: pathlib.Path,
    files: dict[str, pathlib.Path],
    shapes: dict[str, Any],
    keys: dict[str, str],
    ignored: tuple[str, ...] = (),
) -> None:
    """Raise InputError unless the tensors of `files` are exactly those of `shapes`."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        wanted |= _names(keys[path], leaf.shape)
    spare = re.compile("|".join(ignored) or "$^")
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values())):
        with safetensors.safe_open(file, "numpy") as handle:
            names = [n for n in handle.keys() if n in files]
            found |= {n: tuple(handle.get_slice(n).get_shape()) for n in names}
    problems = {
        "missing": [n for n in wanted if n not in found],
        "unknown": [n for n in found if n not in wanted and not spare.fullmatch(n)],
        "misshapen": [
            f"{n} {found[n]}, not {wanted[n]}"
            for n in wanted.keys() & found.keys()
            if found[n] != wanted[n]
        ],
    }
    text = "; ".join(f"{k}: {_some(v)}" for k, v in problems.items() if v)
    if text:
        raise aim_jax.InputError(f"{folder}: tensors do not fit its config: {text}")


def _without_copies(
    folder: pathlib.Path,
    files: dict[str, pathlib.Path],
    wanted: set[str],
    copies: dict[str, str],
) -> dict[str, pathlib.Path]:
    """`files` less the tensors that repeat another. Raises InputError if they differ."""
    left = dict(files)
    for name in (files.keys() & copies.keys()) - wanted:
        if copies[name] not in files:
            continue
        parts = itertools.zip_longest(_read(files, name), _read(files, copies[name]))
        if not all(np.array_equal(first, second) for first, second in parts):
            raise aim_jax.InputError(
                f"{folder}: by its config.json {name} is {copies[name]}, but their values"
                " differ; check tie_word_embeddings"
            )
        del left[name]
    return left


def _read(
    files: dict[str, pathlib.Path],
    name: str,
    index: tuple[slice, ...] = (slice(None),),
) -> Iterator[np.ndarray]:
    """A slice of a tensor, some rows at a time."""
    with safetensors.safe_open(files[name], "numpy") as handle:
        shape = handle.get_slice(name).get_shape()
    rows = range(*index[0].indices(shape[0]))
    step = max(1, PIECE // math.prod(shape[1:]))
    for start in rows[::step]:
        piece = (slice(start, min(start + step, rows.stop)), *index[1:])
        # Opened for each piece: a mapped file's pages stay in memory until it is closed.
        with safetensors.safe_open(files[name], "numpy") as handle:
            part = handle.get_slice(name)[piece]
        yield part


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _place(
    files: dict[str, pathlib.Path],
    template: str,
    leaf: jax.ShapeDtypeStruct,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One parameter on its devices, each device's slice read from the files alone."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        sizes = [
            len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)
        ]
        out = _aligned(sizes, dtype)
        stacked = "{}" in template
        numbers = range(*index[0].indices(leaf.shape[0])) if stacked else [0]
        for tensor, number in zip(out if stacked else [out], numbers, strict=True):
            row = 0
            for part in _read(files, template.format(number), index[stacked:]):
                tensor[row : row + len(part)] = part
                row += len(part)
        return out

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _aligned(shape: Sequence[int], dtype: jnp.dtype) -> np.ndarray:
    """An uninitialised array that a CPU device takes as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _fingerprint(folder: pathlib.Path, files: dict[str, pathlib.Path]) -> str:
    """Hash of config, tokenizer and weight files, of each above 1 GiB 16,384 blocks."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in (*companions(folder), *sorted(set(files.values()))):
        size, block = file.stat().st_size, 1 << 16
        digest.update(f"{file.name} {size}".encode())
        count = min(-(-size // block), 1 << 14)
        with file.open("rb") as stream:
            for offset in np.linspace(0, max(size - block, 0), count).astype(int):
                stream.seek(int(offset))
                digest.update(stream.read(block))
    return digest.hexdigest()
