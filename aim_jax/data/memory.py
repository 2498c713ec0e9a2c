"""The rehearsal memory: which rows of earlier tasks it keeps, and how they are drawn."""

import itertools
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def fill(
    kept: Sequence[Sequence[dict[str, str]]], seed: int = 42
) -> list[dict[str, str]]:
    """The memory made of the rows `kept` of each earlier task, in its lasting order.

    With seed 42 and what `sample` keeps by rule `release` it is the buffer of the PyTorch
    release, row by row: mixed by the second seed that `datasets` takes from numpy (the
    first one shuffles the train rows).
    """
    return shuffle([row for rows in kept for row in rows], second_seed(seed))


def sample(
    tasks_train: Sequence[Sequence[dict[str, str]]],
    percent: float,
    rule: str,
    seed: int = 42,
) -> list[list[dict[str, str]]]:
    """The rows that the memory keeps of each task's train rows.

    One random stream serves all tasks, so that a further task changes no earlier choice. A
    class is a distinct output. A task of N rows has a budget of n = int(N percent / 100).

    release: each class gives max(1, n // classes) rows if it has them; what is then missing
      of n comes from all other rows. On tasks of free text, where nearly every output is
      its own class, this keeps nearly every row, whatever `percent` is.
    exact: max(1, n) rows, never more; as many of each class as of any other while classes
      last, and if there are more classes than rows, one row each of classes drawn by lot.

    No row is kept at 0 percent (the release would keep one of each class).
    """
    if percent == 0:
        return [[] for _ in tasks_train]
    choose, rng = {"release": _release, "exact": _exact}[rule], random.Random(seed)
    return [
        [rows[i] for i in choose(_classes(rows), int(len(rows) * percent / 100), rng)]
        for rows in tasks_train
    ]


def shuffle(rows: Sequence[T], seed: int) -> list[T]:
    """`rows` in the order of `datasets.Dataset.shuffle(seed=seed)`."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def second_seed(seed: int) -> int:
    """What `datasets` takes for its second shuffle without a seed after `np.random.seed`.

    Each such shuffle reads the next word of numpy's global state and then steps it; the
    first one reads `seed` itself.
    """
    state = np.random.RandomState(seed)
    state.random_sample()
    _, words, position, *_ = state.get_state()
    return int(words[position])


def order(n: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of n rows, decided by `key` alone.

    Keys hold integers from 0 up to 2**32, such as (seed, purpose, task, epoch). Their length
    is hashed too, because numpy takes (1,) and (1, 0) for the same key.
    """
    return np.random.default_rng((len(key), *key)).permutation(n)


def draw(n: int, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Numbers of min(size, n) distinct rows out of n, decided by `key` alone.

    As there is no state, a step that is repeated draws the same batch.
    """
    return order(n, key)[:size]


def _classes(rows: Sequence[dict[str, str]]) -> list[list[int]]:
    """Row numbers of each distinct output, in order of first appearance."""
    classes: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        classes.setdefault(row["output"], []).append(i)
    return list(classes.values())


def _release(classes: list[list[int]], n: int, rng: random.Random) -> list[int]:
    chosen = []
    for members in classes:
        share = max(1, n // len(classes))
        chosen += rng.sample(members, min(share, len(members)))
    if len(chosen) < n:
        # The order of a set of integers is CPython's, and the release's choice hangs on it.
        rest = set(range(sum(map(len, classes)))) - set(chosen)
        chosen += rng.sample(list(rest), n - len(chosen))
    return chosen


def _exact(classes: list[list[int]], n: int, rng: random.Random) -> list[int]:
    queues = [rng.sample(members, len(members)) for members in classes]
    rng.shuffle(queues)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return [i for i in rounds if i is not None][: max(1, n)]
