"""The main job: `python -m aim_jax.main --config configs/X.py --workdir DIR`."""

import os
import pathlib
import sys

import jax
from absl import app, flags, logging

import aim_jax
from aim_jax import config, run

_CONFIG = flags.DEFINE_string("config", None, "Python file that assigns CONFIG.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if begun.")
_SET = flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")


def main(argv: list[str]) -> None:
    """Load the config, run the stream, print the results."""
    if not flags.FLAGS["verbosity"].present:
        # JAX tells at level INFO which kinds of device are not there.
        logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise aim_jax.InputError(f"'{argv[1]}': give values as --flag=value")
        cfg = config.load(_CONFIG.value or "", _SET.value)
        if not _WORKDIR.value:
            raise aim_jax.InputError("--workdir: name the folder of the run")
        cache_compilations()
        results = run.run(cfg, pathlib.Path(_WORKDIR.value))
    except aim_jax.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print(table(results))


def table(results: dict) -> str:
    """One line of results: method, OP, FWT, BWT in percent, minutes."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    scores = (percent(results[k]) for k in ("op", "fwt", "bwt"))
    minutes = f"{results['seconds']['total'] / 60:.1f}"
    cells = (results["method"], *scores, minutes)
    heads = ("method", "OP", "FWT", "BWT", "minutes")
    lines = [f"{c[0]:<12}" + "".join(f"{x:>9}" for x in c[1:]) for c in (heads, cells)]
    return "\n".join(lines)


def cache_compilations() -> None:
    """Keep compiled programs on disk, so that the next run starts at once."""
    home = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{home}/aim_jax/jax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


if __name__ == "__main__":
    app.run(main)
