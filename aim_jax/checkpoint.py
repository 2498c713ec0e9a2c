"""Saving and restoring a run; nothing else touches Orbax.

A checkpoint holds what a finished task leaves: the adapter, the method's memo and the
progress of the run as JSON. The base is named by its fingerprint, never stored.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from aim_jax import methods

Tree = Any


def save(
    folder: pathlib.Path,
    tasks: int,
    delta: Tree,
    memo: methods.Memo,
    progress: dict[str, Any],
) -> None:
    """Write the checkpoint after `tasks` finished tasks, atomically; the last two stay."""
    host = None if memo.host is None else dataclasses.asdict(memo.host)
    keep = ocp.training.preservation_policies.LatestN(2)
    with ocp.training.Checkpointer(folder, preservation_policy=keep) as checkpointer:
        checkpointer.save_checkpointables(
            tasks,
            {"state": {"delta": delta, "memo": memo.arrays}},
            custom_metadata={"progress": progress, "host": host},
            overwrite=True,
        )


def load(
    folder: pathlib.Path,
    delta: Tree,
    memo: methods.Memo,
    sharding: jax.sharding.Sharding,
) -> tuple[Tree, methods.Memo, dict[str, Any]] | None:
    """Adapter, memo and progress of the newest checkpoint; None where there is none.

    delta, memo: a fresh adapter and memo, whose shapes and types are restored.
    """
    if not folder.is_dir():
        return None
    with ocp.training.Checkpointer(folder) as checkpointer:
        latest = checkpointer.latest
        if latest is None:
            return None
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            {"delta": delta, "memo": memo.arrays},
        )
        state = checkpointer.load_checkpointables(latest, {"state": shapes})["state"]
        data = checkpointer.checkpointables_metadata(latest).custom_metadata
    host = memo.host
    if host is not None:
        values = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["host"].items()
        }
        host = dataclasses.replace(host, **values)
    return state["delta"], methods.Memo(state["memo"], host), data["progress"]
