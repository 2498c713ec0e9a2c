"""Saving and restoring a run; nothing else touches Orbax.

A checkpoint is a tree of arrays and a JSON of facts, written together, atomically and in
the background. The base model is never part of it.
"""

import copy
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

Tree = Any
Checkpointer = ocp.training.Checkpointer


def open(folder: pathlib.Path) -> Checkpointer:
    """A context manager over the checkpoints in `folder`; the last two are kept."""
    keep = ocp.training.preservation_policies.LatestN(2)
    return Checkpointer(folder.resolve(), preservation_policy=keep)


def save(
    checkpointer: Checkpointer, number: int, arrays: Tree, facts: dict[str, Any]
) -> None:
    """Write checkpoint `number`, larger than all before; does not wait for the disk."""
    # The caller goes on and changes the facts while they are being written.
    checkpointer.save_checkpointables_async(
        number, {"arrays": arrays}, custom_metadata=copy.deepcopy(facts)
    )


def latest(
    checkpointer: Checkpointer, like: Tree, sharding: jax.sharding.Sharding
) -> tuple[Tree, dict[str, Any]] | None:
    """Arrays and facts of the newest checkpoint, None where there is none.

    like: a tree of the shapes and types to restore.
    """
    newest = checkpointer.latest
    if newest is None:
        return None
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    loaded = checkpointer.load_checkpointables(newest, {"arrays": shapes})
    facts = checkpointer.checkpointables_metadata(newest).custom_metadata
    return loaded["arrays"], facts
