"""Checkpoints: what comes back, and what is found out about damaged or lost ones."""

import logging
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aim_jax
from aim_jax import checkpoint

SHARDING = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def tree(number):
    return {
        "delta": {"a": jnp.arange(300.0) + number, "b": jnp.ones((3, 4), jnp.int32)},
        "memo": (),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with checkpoint.open(folder, 2) as checkpointer:
        for number in (0, 1, 2):
            checkpoint.save(checkpointer, number, tree(number), {"n": number})
    return folder


def restored(folder):
    """Number of the checkpoint that is found sound, after a look that it is."""
    with checkpoint.open(folder, 2) as checkpointer:
        arrays, facts = checkpoint.latest(checkpointer, tree(0), SHARDING)
    same = jax.tree.map(np.array_equal, arrays, tree(facts["n"]))
    assert jax.tree.all(same)
    return facts["n"]


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_the_newest_comes_back_and_the_oldest_are_gone(saved):
    assert restored(saved) == 2
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]
    with checkpoint.open(saved, 2) as checkpointer:
        assert 0 < checkpoint.age(checkpointer) < 3600


def test_there_is_none_in_a_new_folder(tmp_path):
    with checkpoint.open(tmp_path / "new", 2) as checkpointer:
        assert checkpoint.latest(checkpointer, tree(0), SHARDING) is None
        assert checkpoint.age(checkpointer) == float("inf")


def test_a_clock_that_was_set_back_does_not_keep_checkpoints_from_growing_old(
    saved, monkeypatch
):
    now = time.time()
    monkeypatch.setattr(checkpoint.time, "time", lambda: now - 86400)
    with checkpoint.open(saved, 2) as checkpointer:
        assert checkpoint.age(checkpointer) > 80000


def test_facts_may_change_while_they_are_written(tmp_path):
    facts = {"n": 1, "matrix": [[1.0]]}
    with checkpoint.open(tmp_path / "c", 2) as checkpointer:
        checkpoint.save(checkpointer, 1, tree(1), facts)
        facts["matrix"].append([2.0])
        facts["n"] = 5
    with checkpoint.open(tmp_path / "c", 2) as checkpointer:
        _, found = checkpoint.latest(checkpointer, tree(0), SHARDING)
    assert found == {"n": 1, "matrix": [[1.0]]}


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle byte": lambda data: (
        data[: len(data) // 2]
        + bytes([data[len(data) // 2] ^ 16])
        + data[len(data) // 2 + 1 :]
    ),
    "zeros": lambda data: bytes(len(data)),
    "removed": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_never_changes_what_comes_back(saved, tmp_path, damage):
    """Whichever file it is: either it did not matter, or the one before is used."""
    outcomes = {}
    for number in range(len(files(saved / "2"))):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        file = files(folder / "2")[number]
        if DAMAGE[damage]:
            file.write_bytes(DAMAGE[damage](file.read_bytes()))
        else:
            file.unlink()
        found = outcomes[str(file.relative_to(folder))] = restored(folder)
        assert (folder / "2.damaged").exists() == (found == 1)
        assert (folder / "2").exists() == (found == 2)
    # The largest file, which holds the numbers.
    big = max(files(saved / "2"), key=lambda p: p.stat().st_size)
    assert outcomes["2/_CHECKPOINT_METADATA"] == 1
    assert outcomes[str(big.relative_to(saved))] == 1


def test_facts_that_were_altered_are_found_out(saved, tmp_path, caplog):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    file = folder / "2/_CHECKPOINT_METADATA"
    for _ in range(2):
        text = file.read_text()
        assert '"n": 2' in text
        file.write_text(text.replace('"n": 2', '"n": 3'))
        with (
            caplog.at_level(logging.WARNING, "absl"),
            checkpoint.open(folder, 2) as checkpointer,
        ):
            _, facts = checkpoint.latest(checkpointer, tree(0), SHARDING)
            assert facts == {"n": 1} and checkpointer.latest.step == 1
            # The run that goes on from there may write number 2 again.
            checkpoint.save(checkpointer, 2, tree(2), {"n": 2})
        assert f"{folder / '2'} is damaged (its content is not what was" in caplog.text
        assert "going on from 1" in caplog.text
        assert restored(folder) == 2


def test_without_a_sound_one_it_stops_and_touches_nothing(saved, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    for number in "12":
        shutil.rmtree(folder / number / "arrays" / "d")
        shutil.rmtree(folder / number / "arrays" / "ocdbt.process_0")
    before = files(folder)
    with checkpoint.open(folder, 2) as checkpointer:
        with pytest.raises(
            aim_jax.InputError, match="no checkpoint is sound .2: .*1: "
        ):
            checkpoint.latest(checkpointer, tree(0), SHARDING)
    assert files(folder) == before


def test_processes_that_read_different_ones_stop(saved, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "2" / "arrays" / "d")
    shutil.rmtree(folder / "2" / "arrays" / "ocdbt.process_0")
    before = files(folder)
    monkeypatch.setattr(checkpoint.parallel, "differing", list)
    with checkpoint.open(folder, 2) as checkpointer:
        with pytest.raises(aim_jax.InputError, match="newest checkpoint .here 1."):
            checkpoint.latest(checkpointer, tree(0), SHARDING)
    assert files(folder) == before


def test_another_shape_is_not_taken(saved, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    other = tree(0) | {"memo": {"extra": jnp.ones(3)}}
    with checkpoint.open(folder, 2) as checkpointer:
        with pytest.raises(aim_jax.InputError, match="no checkpoint is sound"):
            checkpoint.latest(checkpointer, other, SHARDING)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_what_was_saved_stays(small_disk):
    folder = small_disk / "checkpoints"
    big = tree(0) | {"memo": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
    with pytest.raises(aim_jax.InputError, match="cannot be written: .*[Nn]o space"):
        with checkpoint.open(folder, 2) as checkpointer:
            checkpoint.save(checkpointer, 1, tree(1), {"n": 1})
            checkpoint.wait(checkpointer)
            checkpoint.save(checkpointer, 2, big, {"n": 2})
            checkpoint.wait(checkpointer)
    assert restored(folder) == 1
