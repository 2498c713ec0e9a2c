"""Hugging Face checkpoints: safetensors -> base tree on its devices, and back.

A parameter that is stacked over layers is read layer by layer, and each device reads only
its slice. Pickle files are never opened.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import aim_jax
from aim_jax import config, lora, models

ASSETS = pathlib.Path(aim_jax.__file__).parent / "assets"


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


def directory(path: str) -> pathlib.Path:
    """The folder of a `model.path`: the embedded model or a local directory."""
    folder = ASSETS if path == "embedded" else pathlib.Path(path)
    if not (folder / "config.json").is_file():
        raise aim_jax.InputError(
            f"model.path: no config.json in '{path}'; give a Hugging Face model directory"
            " or `embedded`"
        )
    return folder


def load(cfg: config.Model, sharding: jax.sharding.Sharding | None = None) -> Base:
    """The base model of `model.path` with float parameters in `model.dtype`.

    Raises InputError for an unsupported architecture, missing files, pickle files, and
    for tensors that are missing, unknown, repeated or of another shape, naming them.
    """
    folder = directory(cfg.path)
    family, model_config = read_config(folder)
    dtype = jnp.dtype(cfg.dtype)
    changes: dict[str, Any] = {"dtype": dtype, "remat": cfg.remat}
    if cfg.dropout is not None:
        changes["dropout"] = cfg.dropout
    model_config = dataclasses.replace(model_config, **changes)
    model, keys = family.Model(model_config), family.keys(model_config)
    shapes = flatten(abstract(model))
    files = tensor_files(folder)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with contextlib.ExitStack() as stack:
        opened = {
            file: stack.enter_context(safetensors.safe_open(file, "numpy"))
            for file in sorted(set(files.values()))
        }
        handles = {name: opened[file] for name, file in files.items()}
        _check(folder, handles, shapes, keys, family.IGNORED)
        flat = {
            path: _place(handles, keys[path], shape, dtype, sharding)
            for path, shape in shapes.items()
        }
    return Base(family, model, unflatten(flat), keys, _fingerprint(folder, files))


def read_config(folder: pathlib.Path) -> tuple[ModuleType, Any]:
    """Family module and its Config from a folder's config.json."""
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise aim_jax.InputError(f"{file}: not JSON: {error}") from None
    family = models.family(data.get("model_type", "none"))
    try:
        return family, family.config_from_hf(data)
    except KeyError as error:
        raise aim_jax.InputError(f"{file}: no field {error}") from None


def abstract(model: Any) -> dict[str, Any]:
    """Shapes of a model's base tree; nothing is allocated."""
    row = jnp.zeros((1, 2), jnp.int32)
    batch = {"inputs": row, "mask": row > 0, "targets": row[:, :1]}
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


def save(
    folder: pathlib.Path, params: dict[str, Any], keys: dict[str, str]
) -> pathlib.Path:
    """Write `params` as model.safetensors under Hugging Face names; returns the file."""
    tensors = {}
    for path, value in flatten(params).items():
        tensors.update(_unstack(keys[path], np.asarray(value)))
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder / "model.safetensors", tensors)


def save_adapter(
    folder: pathlib.Path,
    delta: dict[str, Any],
    keys: dict[str, str],
    cfg: config.Lora,
    base_path: str,
) -> pathlib.Path:
    """Write `delta` as a PEFT adapter that `peft.PeftModel` loads; returns its folder.

    keys: those of the base; base_path: the `model.path` that the adapter belongs to.
    """
    tensors = {}
    for path, value in flatten(delta).items():
        module, _, side = path.rpartition("/")
        template = _adapter_name(keys[f"{module}/weight"], side)
        for name, tensor in _unstack(template, np.asarray(value, np.float32)):
            tensors[name] = tensor
    named = lora.named(keys, cfg)
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if _encodes(keys) else "CAUSAL_LM",
        "base_model_name_or_path": str(ASSETS)
        if base_path == "embedded"
        else base_path,
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
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {`a/b/c`: leaf}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` came from."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name of each tensor in the checkpoint -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [
            folder / n for n in json.loads(index.read_text())["weight_map"].values()
        ]
    else:
        files = [folder / "model.safetensors"]
    files = sorted(set(files))
    absent = [f.name for f in files if not f.is_file()]
    pickles = sorted(
        p.name for s in ("bin", "pt", "pth") for p in folder.glob(f"*.{s}")
    )
    if absent:
        why = ""
        if pickles:
            why = (
                f"; {pickles[0]} is a pickle, which can run code when opened: convert it"
                " with save_pretrained(..., safe_serialization=True)"
            )
        raise aim_jax.InputError(f"{folder}: no {', '.join(absent)}{why}")
    where: dict[str, pathlib.Path] = {}
    repeated = []
    for file in files:
        try:
            with safetensors.safe_open(file, "numpy") as handle:
                names = list(handle.keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise aim_jax.InputError(f"{file}: not readable: {error}") from None
        repeated += [name for name in names if name in where]
        where |= dict.fromkeys(names, file)
    if repeated:
        raise aim_jax.InputError(f"{folder}: repeated tensors {_some(repeated)}")
    return where


def _names(template: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names, and their shapes, of one parameter of our tree."""
    if "{}" not in template:
        return {template: shape}
    return {template.format(i): shape[1:] for i in range(shape[0])}


def _unstack(template: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Hugging Face names and tensors of one parameter of our tree."""
    if "{}" not in template:
        return [(template, value)]
    return [(template.format(i), layer) for i, layer in enumerate(value)]


def _write(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return file


def _adapter_name(weight: str, side: str) -> str:
    """PEFT's name of A or B (`side` a or b) beside a weight."""
    module = weight.removesuffix(".weight")
    return f"base_model.model.{module}.lora_{side.upper()}.weight"


def _encodes(keys: dict[str, str]) -> bool:
    """Whether the model is an encoder-decoder."""
    return any(name.startswith("encoder.") for name in keys.values())


def _check(
    folder: pathlib.Path,
    handles: dict[str, Any],
    shapes: dict[str, Any],
    keys: dict[str, str],
    ignored: tuple[str, ...],
) -> None:
    """Raise InputError unless the checkpoint holds exactly the tensors of the model."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        wanted |= _names(keys[path], leaf.shape)
    spare = re.compile("|".join(ignored) or "$^")
    missing = [n for n in wanted if n not in handles]
    unknown = [n for n in handles if n not in wanted and not spare.fullmatch(n)]
    misshapen = []
    for name in wanted.keys() & handles.keys():
        found = tuple(handles[name].get_slice(name).get_shape())
        if found != wanted[name]:
            misshapen.append(f"{name} {found}, not {wanted[name]}")
    problems = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    text = "; ".join(f"{k} tensors {_some(v)}" for k, v in problems.items() if v)
    if text:
        raise aim_jax.InputError(f"{folder}: does not fit its config.json: {text}")


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _place(
    handles: dict[str, Any],
    template: str,
    leaf: jax.ShapeDtypeStruct,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One parameter on its devices, each device's slice read from the files alone."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if "{}" not in template:
            return np.asarray(handles[template].get_slice(template)[index], dtype)
        numbers = range(*index[0].indices(leaf.shape[0]))
        sizes = [
            len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)
        ]
        out = np.empty(sizes, dtype)
        for row, number in enumerate(numbers):
            name = template.format(number)
            out[row] = handles[name].get_slice(name)[index[1:]]
        return out

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _fingerprint(folder: pathlib.Path, files: dict[str, pathlib.Path]) -> str:
    """Hash of config.json and of 64 evenly spaced blocks of each weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(files.values())):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for offset in np.linspace(0, max(size - 65536, 0), 64).astype(int):
                stream.seek(int(offset))
                digest.update(stream.read(65536))
    return digest.hexdigest()
