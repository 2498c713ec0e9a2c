"""Saving and restoring a run; nothing else touches Orbax.

A checkpoint is a tree of arrays and a JSON of facts, written together, atomically and in
the background, with a hash of both. The base model is never part of it.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

import aim_jax
from aim_jax import parallel

Tree = Any
Checkpointer = ocp.training.Checkpointer
HASH = "sha256"  # a fact of its own


@contextlib.contextmanager
def open(folder: pathlib.Path, keep: int) -> Iterator[Checkpointer]:
    """The checkpoints in `folder`, of which the last `keep` stay.

    When the context is left, all is on disk, or InputError raised.
    """
    policy = ocp.training.preservation_policies.LatestN(keep)
    checkpointer = Checkpointer(
        folder.resolve(), preservation_policy=policy, cleanup_tmp_directories=True
    )
    # Of several processes Orbax asks JAX too whether the machine is wanted back, by the
    # checkpoint's number: mixed with those of `preemption`, the answer would be lost.
    checkpointer._manager.reached_preemption = lambda step: False
    try:
        yield checkpointer
        wait(checkpointer)
    except BaseException:
        with contextlib.suppress(Exception):  # What went wrong first is told.
            checkpointer.close()
        raise
    checkpointer.close()


def age(checkpointer: Checkpointer) -> float:
    """Seconds since the newest checkpoint was begun; infinite where there is none.

    By a clock that was set back since then, those from now until it is so late again.
    """
    newest = checkpointer.latest
    if not newest:
        return math.inf
    return abs(time.time() - newest.commit_timestamp_nsecs / 1e9)


def save(
    checkpointer: Checkpointer, number: int, arrays: Tree, facts: dict[str, Any]
) -> None:
    """Write checkpoint `number`, larger than all before; does not wait for the disk.

    Raises InputError if this one or the one before cannot be written.
    """
    # A copy: the caller's goes on changing while this one is being written.
    facts = json.loads(json.dumps(facts))
    facts[HASH] = _hash(arrays, facts)
    try:
        checkpointer.save_checkpointables_async(
            number, {"arrays": arrays}, custom_metadata=facts, force=True
        )
    except Exception as error:
        raise _unwritable(checkpointer, error) from error


def wait(checkpointer: Checkpointer) -> None:
    """Return when all is on disk. Raises InputError if it cannot be written."""
    try:
        checkpointer.wait()
    except Exception as error:
        raise _unwritable(checkpointer, error) from error


def latest(
    checkpointer: Checkpointer, like: Tree, sharding: jax.sharding.Sharding
) -> tuple[Tree, dict[str, Any]] | None:
    """Arrays and facts of the newest sound checkpoint, None where there is none at all.

    like: a tree of the shapes and types to restore. Those that are not as they were
    written are renamed NUMBER.damaged, with a warning. Raises InputError, and renames
    nothing, if all are so, or if another process would go on from another one.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    loaded, number, damaged = None, None, {}
    for found in reversed(checkpointer.checkpoints):
        try:
            loaded, number = _load(checkpointer, found.step, shapes), found.step
            break
        except Exception as error:  # Orbax and TensorStore have no common kind
            damaged[found.step] = " ".join(str(error).split())[:200]
    if parallel.differing({"newest": [number, *damaged]}):
        raise aim_jax.InputError(
            f"{checkpointer.directory}: not all processes can read the same newest"
            f" checkpoint (here {number}); a network disk may show it late: give the same"
            " command again in a minute"
        )
    if loaded:
        for other, reason in damaged.items():
            logging.warning(
                "checkpoint %s is damaged (%s); going on from %s",
                checkpointer.directory / str(other),
                reason,
                number,
            )
            if jax.process_index() == 0:
                _set_aside(checkpointer.directory / str(other))
        if damaged:
            parallel.meet("set aside")
            checkpointer.reload()
        return loaded
    if damaged:
        reasons = "; ".join(f"{number}: {why}" for number, why in damaged.items())
        raise aim_jax.InputError(
            f"{checkpointer.directory}: no checkpoint is sound ({reasons}); restore one,"
            " or begin anew in another --workdir"
        )
    return None


def _load(
    checkpointer: Checkpointer, number: int, shapes: Tree
) -> tuple[Tree, dict[str, Any]]:
    facts = dict(checkpointer.checkpointables_metadata(number).custom_metadata)
    arrays = checkpointer.load_checkpointables(number, {"arrays": shapes})["arrays"]
    if facts.pop(HASH, None) != _hash(arrays, facts):
        raise ValueError("its content is not what was written")
    return arrays, facts


def _hash(arrays: Tree, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(arrays):
        value = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _set_aside(folder: pathlib.Path) -> None:
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _unwritable(checkpointer: Checkpointer, error: Exception) -> aim_jax.InputError:
    reason = " ".join(str(error).split())[:300]
    return aim_jax.InputError(
        f"{checkpointer.directory}: a checkpoint cannot be written: {reason}; what was"
        " saved before is whole: set this right, and the same command goes on from there"
    )
