"""The main job: `python -m aim_jax.main --config configs/X.py --workdir DIR`."""

import os
import pathlib
import statistics
import sys
from typing import Any

import jax
from absl import app, flags, logging

import aim_jax
from aim_jax import config, preemption, run

_CONFIG = flags.DEFINE_string("config", None, "Python file that assigns CONFIG.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if begun.")
_SEEDS = flags.DEFINE_list("seeds", [], "One run for each, in WORKDIR/seed-N.")
_SET = flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")


def main(argv: list[str]) -> None:
    """Load the config, run the stream, print the results."""
    if not flags.FLAGS["verbosity"].present:
        # JAX tells at level INFO which kinds of device are not there.
        logging.set_verbosity(logging.WARNING)
    # transformers tells that torch is missing; only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if len(argv) > 1:
            raise aim_jax.InputError(f"'{argv[1]}': give values as --flag=value")
        cfg = config.load(_CONFIG.value or "", _SET.value)
        if not _WORKDIR.value:
            raise aim_jax.InputError("--workdir: name the folder of the run")
        cache_compilations()
        preemption.watch()
        results = [run.run(c, f) for c, f in runs(cfg, pathlib.Path(_WORKDIR.value))]
    except aim_jax.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except preemption.Preempted:
        print("stopped by SIGTERM; the same command goes on from here", file=sys.stderr)
        sys.exit(0)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(table(results))


def runs(
    cfg: config.Config, folder: pathlib.Path
) -> list[tuple[config.Config, pathlib.Path]]:
    """Config and folder of each run: `folder` itself, or one below it for each seed."""
    if not _SEEDS.value:
        return [(cfg, folder)]
    return [
        (config.override(cfg, f"train.seed={seed}"), folder / f"seed-{int(seed)}")
        for seed in _SEEDS.value
    ]


def table(results: list[dict[str, Any]]) -> str:
    """A line a run: method, seed, OP, FWT, BWT in percent, minutes; then their mean."""
    rows = [
        [*(r[k] for k in ("op", "fwt", "bwt")), r["seconds"]["total"] / 6000]
        for r in results
    ]
    names = [f"{r['method']}, seed {r['seed']}" for r in results]
    if len(rows) > 1:
        columns = list(zip(*rows, strict=True))
        for name, figure in (("mean", statistics.mean), ("std", statistics.stdev)):
            names.append(name)
            rows.append([None if None in c else figure(c) for c in columns])
    lines = [f"{'':<20}" + "".join(f"{h:>9}" for h in ("OP", "FWT", "BWT", "minutes"))]
    for name, row in zip(names, rows, strict=True):
        cells = ("-" if value is None else f"{100 * value:.1f}" for value in row)
        lines.append(f"{name:<20}" + "".join(f"{c:>9}" for c in cells))
    return "\n".join(lines)


def cache_compilations() -> None:
    """Keep compiled programs on disk, so that the next run starts at once."""
    home = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{home}/aim_jax/jax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


if __name__ == "__main__":
    app.run(main)
