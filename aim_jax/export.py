"""Adapters and merged models out of a run.

    python -m aim_jax.export --workdir DIR --format peft|merged --out OUT [--task NAME]

`peft` is an adapter that `peft.PeftModel` loads; `merged` a Hugging Face model with the
adapter folded into its weights, for transformers or an inference server. Without --task
the adapter is that after the last finished task.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
from absl import app, flags

import aim_jax
from aim_jax import config, lora, records
from aim_jax.models import hf

FORMATS = ("peft", "merged")


def adapter(workdir: pathlib.Path, task: str | None = None) -> pathlib.Path:
    """The folder of the adapter after `task`, or after the last one.

    Raises InputError that lists the tasks there are.
    """
    found = records.numbered(workdir / "adapters")
    if not found:
        raise aim_jax.InputError(
            f"--workdir {workdir}: no adapters/NN-TASK folder; give the workdir of a run"
            " that has finished a task"
        )
    if task is not None and task not in found:
        raise aim_jax.InputError(
            f"--task: no adapter after '{task}'; there are {', '.join(found)}"
        )
    return found[task or [*found][-1]]


def peft(cfg: config.Config, source: pathlib.Path, out: pathlib.Path) -> None:
    """Write the adapter `source` to `out`, checked against the base's config."""
    family, model_config = hf.read_config(hf.directory(cfg.model.path))
    keys = family.keys(model_config)
    shapes = hf.abstract(family.Model(model_config))
    delta, settings = hf.load_adapter(source, shapes, keys)
    hf.save_adapter(out, delta, keys, settings, cfg.model.path)


def merged(cfg: config.Config, source: pathlib.Path, out: pathlib.Path) -> None:
    """Write the base with the adapter `source` folded in, in the type of `model.dtype`.

    Beside the weights go config and tokenizer files of the base. Raises InputError if it is
    not the base that the run of the adapter began with.
    """
    base = hf.load(dataclasses.replace(cfg.model, bits=16))
    results = records.read_json(source.parents[1] / "results.json", {})
    if results.get("model") not in (None, base.fingerprint):
        raise aim_jax.InputError(
            f"model.path '{cfg.model.path}': its files have changed since the run began;"
            " its adapters are for those of then"
        )
    delta, settings = hf.load_adapter(source, base.params, base.keys)
    hf.save(out, lora.fold(base.params, delta, settings), base.keys)
    folder = hf.directory(cfg.model.path)
    for file in hf.companions(folder):
        shutil.copyfile(file, out / file.name)
    data = records.read_json(folder / "config.json")
    # Earlier transformers read torch_dtype, transformers 5 reads either.
    data.pop("dtype", None)
    data["torch_dtype"] = cfg.model.dtype
    (out / "config.json").write_text(json.dumps(data, indent=2) + "\n")


def write(
    workdir: pathlib.Path, kind: str, out: pathlib.Path, task: str | None
) -> None:
    """Write what `main` describes to the new folder `out`."""
    file = workdir / "config.json"
    if not file.is_file():
        raise aim_jax.InputError(f"--workdir {workdir}: no config.json; not a run")
    aim_jax.check_new(out)
    cfg = config.from_json(records.read_json(file))
    source = adapter(workdir, task)
    {"peft": peft, "merged": merged}[kind](cfg, source, out)


def command(
    argv: Sequence[str], needed: Sequence[str], make: Callable[[pathlib.Path], None]
) -> None:
    """A command that makes the folder --out: it ends with its name, or an error and 2.

    argv: what is no flag, after the command, which is an error; needed: flags beside --out
    without which there is one.
    """
    values = flags.FLAGS
    # Weights are taken apart and written: no work for an accelerator, nor for its memory.
    jax.config.update("jax_platforms", "cpu")
    with aim_jax.command(argv, needed=(*needed, "out")):
        try:
            make(pathlib.Path(values.out).expanduser())
        except OSError as error:
            raise aim_jax.InputError(f"--out {values.out}: {error}") from error
    print(values.out)


def main(argv: Sequence[str]) -> None:
    """The command: absl's arguments in, a folder out."""
    values = flags.FLAGS

    def make(out: pathlib.Path) -> None:
        workdir = pathlib.Path(values.workdir).expanduser()
        write(workdir, values.format, out, values.task)

    command(argv, ("workdir", "format"), make)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a run")
    flags.DEFINE_enum("format", None, FORMATS, "peft or merged")
    flags.DEFINE_string("out", None, "the folder to write")
    flags.DEFINE_string(
        "task", None, "the task after which; default: the last finished"
    )
    app.run(main)
