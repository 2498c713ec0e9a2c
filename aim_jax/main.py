"""The main job: `python -m aim_jax.main --config configs/X.py --workdir DIR`."""

import functools
import os
import pathlib
import sys
import traceback
from typing import NoReturn

import jax
from absl import app, flags

import aim_jax
from aim_jax import config, jobs, logs, preemption, report, run, tables

_CONFIG = flags.DEFINE_string(
    "config", None, "Python file that assigns CONFIG, or CONFIGS for a sweep."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if begun.")
_SEEDS = flags.DEFINE_list("seeds", [], "One run for each, in a folder seed-N.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes, found by SLURM, GKE or the TPU runtime."
)
_PREEMPTED = flags.DEFINE_integer(
    "preempted_status", 0, "Exit status after SIGTERM, for who takes 0 for finished."
)
_SET = flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")


def main(argv: list[str]) -> None:
    """Load the config or sweep, run what it asks for, print a table of the results."""
    # transformers tells that torch is missing; only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    later = "stopped; the same command goes on from the last checkpoint"
    try:
        with aim_jax.command(argv, leave, later):
            configs = config.sweep(_CONFIG.value or "", _SET.value)
            if not _WORKDIR.value:
                raise aim_jax.InputError("--workdir: name the folder of the run")
            workdir = pathlib.Path(_WORKDIR.value).expanduser()
            cache_compilations()
            connect()
            preemption.watch()
            planned = runs(configs, workdir)
            ended = run_all(planned)
            if ended:
                tell(ended, workdir)
            if preemption.by_user():  # too late to stop this, but not what follows
                sys.exit(130)
    except preemption.Preempted:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130 if preemption.by_user() else _PREEMPTED.value)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        print(
            "error: this process failed, or has lost another one of the run, see above; the"
            " same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        leave(1)
    failed = len(planned) - len(ended)
    if failed:
        print(f"error: {failed} runs failed, see above", file=sys.stderr)
        sys.exit(2)


def tell(folders: list[pathlib.Path], workdir: pathlib.Path) -> None:
    """Print a table of the runs in `folders`, and write the report of a sweep."""
    if folders != [workdir]:
        run.write_report(workdir)
    if logs.leads:
        print(tables.text(tables.results_table(report.load(folders))))


def connect() -> None:
    """Join the other processes of the run, if there are any.

    When one of them is gone, JAX ends the others with a word on it after 30 seconds.
    Raises InputError for flags that are too few, or do not fit each other.
    """
    if _COORDINATOR.value or _DISTRIBUTED.value:
        try:
            jax.distributed.initialize(
                _COORDINATOR.value,
                _PROCESSES.value,
                _PROCESS.value,
                heartbeat_timeout_seconds=30,
            )
        except (IndexError, ValueError) as error:  # without a port; all else
            raise aim_jax.InputError(
                "--coordinator: give HOST:PORT, --processes and --process, from 0; or"
                f" --distributed in a job of SLURM, GKE or TPUs ({error})"
            ) from error
        logs.leads = jax.process_index() == 0
        if not logs.leads:
            sys.stdout = open(os.devnull, "w")


def leave(status: int) -> NoReturn:
    """Exit; of several processes at once, or JAX would wait for the others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def runs(
    configs: dict[str, config.Config], workdir: pathlib.Path
) -> list[tuple[config.Config, pathlib.Path]]:
    """Config and folder of each run: `workdir`, or below it NAME, seed-N, NAME-seed-N.

    Side by side, so that they share the single-task runs of the same data and training.
    Raises InputError for seeds that will not do, and where several would lie inside a run.
    """
    if (_SEEDS.value or list(configs) != [""]) and (workdir / "config.json").is_file():
        raise aim_jax.InputError(
            f"--workdir {workdir}: holds a run; several runs need another folder"
        )
    if not _SEEDS.value:
        return [(cfg, workdir / name) for name, cfg in configs.items()]
    planned: dict[pathlib.Path, config.Config] = {}
    for name, cfg in configs.items():
        for text in _SEEDS.value:
            own = config.resolve(config.override(cfg, f"train.seed={text}"))
            seed = own.train.seed
            folder = workdir / f"{name}-seed-{seed}".removeprefix("-")
            if folder in planned:
                raise aim_jax.InputError(f"--seeds: {seed} is there twice")
            planned[folder] = own
    return [(cfg, folder) for folder, cfg in planned.items()]


def run_all(planned: list[tuple[config.Config, pathlib.Path]]) -> list[pathlib.Path]:
    """Run each; the folders of those that did not fail.

    One that fails stops no other, but of a run of several processes: its error is printed
    and the next begins. Seeds of one config share base and compiled programs.
    """
    if len(planned) == 1:
        ((cfg, folder),) = planned
        run.run(cfg, folder)
        return [folder]

    @functools.lru_cache(maxsize=1)
    def load(cfg: config.Config) -> jobs.Loaded:
        load.cache_clear()  # there may be no room for two bases
        return jobs.load_model(cfg)

    ended = []
    for cfg, folder in planned:
        print(f"run {folder}")
        try:
            run.run(cfg, folder, load)
            ended.append(folder)
        except preemption.Preempted:
            raise
        except Exception as error:
            if jax.process_count() > 1:
                raise  # the others may not know of it, and would wait for this one
            if not isinstance(error, aim_jax.InputError):
                traceback.print_exc()
            print(f"error: {folder}: {error}", file=sys.stderr)
    return ended


def cache_compilations() -> None:
    """Keep compiled programs on disk, so that the next run starts at once."""
    home = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{home}/aim_jax/jax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


if __name__ == "__main__":
    aim_jax.keep_memory()
    app.run(main)
