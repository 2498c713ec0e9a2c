"""Rehearsal rows that a model writes itself: prompts, what of the answers is a row, which.

Self-synthesized rehearsal: rows of a task (`demonstrations`) are shown in pairs to the base
model, which writes others; the adapter that has learnt the task answers them anew; of what
is well formed the rows nearest to the centres of clusters are kept. Source: SSR, Huang et
al. 2024 (arXiv 2403.01244), as released; but inputs are embedded as the mean of the base's
token embeddings, where the release has another model (SimCSE), and answers are those of
the adapter as the task left it. A model that fills gaps (T5) is shown a gap to fill; the
source has decoders alone.
"""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from aim_jax import config
from aim_jax.data import memory

Row = dict[str, str]
GAPS = ("<extra_id_0>", "<extra_id_1>")
ROUNDS = 100  # of k-means, at most


class Frame(NamedTuple):
    """What all inputs of a task begin and end with: its instruction."""

    head: str
    tail: str


def write(
    name: str,
    shown: Sequence[Row],
    cfg: config.Memory,
    key: tuple[int, ...],
    gaps: bool,
    sample: Callable[[list[str]], list[str]],
    fits: Callable[[list[str]], list[bool]],
    embed: Callable[[list[str]], np.ndarray],
    answer: Callable[[list[str]], list[str]],
) -> list[Row]:
    """At most `memory.rows` rows of the task `name`; there may be fewer, and none.

    shown: the demonstrations; gaps: whether the model fills gaps. sample(prompts) -> what
    the base writes; of each list of inputs, fits(inputs) says which are short enough,
    embed(inputs) gives vectors (n, i), answer(inputs) what the adapter answers.
    """
    around = frame([row["input"] for row in shown])
    asked = prompts(shown, around, gaps, cfg.prompts, key) * cfg.samples
    found = {parse(text, around, gaps) for text in sample(asked)} - {None}
    inputs = sorted(found)
    inputs = list(itertools.compress(inputs, fits(inputs)))
    chosen = pick(embed(inputs), cfg.rows, cfg.clusters, key)
    inputs = [inputs[i] for i in chosen]
    return [
        {"id": f"{name}_synthetic_{i}", "input": text, "output": output}
        for i, (text, output) in enumerate(zip(inputs, answer(inputs), strict=True))
        if output
    ]


def frame(inputs: Sequence[str]) -> Frame:
    """The longest common head and tail of `inputs`, in whole words.

    Both are empty where that is all of an input, or the inputs are all the same.
    """
    head = re.match(r"(.*\s)?", os.path.commonprefix(inputs), re.DOTALL)[0]
    backwards = [text[len(head) :][::-1] for text in inputs]
    tail = re.match(r"(.*\s)?", os.path.commonprefix(backwards), re.DOTALL)[0][::-1]
    shortest = min(map(len, inputs), default=0)
    if len(set(inputs)) < 2 or len(head) + len(tail) >= shortest:
        return Frame("", "")
    return Frame(head, tail)


def prompts(
    rows: Sequence[Row],
    around: Frame,
    gaps: bool,
    count: int | None,
    key: tuple[int, ...],
) -> list[str]:
    """A prompt for each ordered pair of rows, or for `count` pairs drawn by lot.

    The pair, and the beginning of a third row; gaps: the third row with gaps to fill.
    """
    pairs = list(itertools.permutations(rows, 2)) or [tuple(rows)]
    if count is not None:
        pairs = [pairs[i] for i in memory.draw(len(pairs), count, key)]
    begun = f"Input: {around.head}".rstrip()
    if gaps:
        begun = f"Input: {around.head}{GAPS[0]}{around.tail}\nOutput: {GAPS[1]}"
    return [
        "".join(f"Input: {r['input']}\nOutput: {r['output']}\n\n" for r in pair) + begun
        for pair in pairs
    ]


def parse(text: str, around: Frame, gaps: bool) -> str | None:
    """The input of the row that a model wrote after a prompt; None: it is malformed."""
    if gaps:
        found = re.match(f"{GAPS[0]}(.*?){GAPS[1]}", text, re.DOTALL)
        middle = found[1] if found else ""
    else:
        middle, found, _ = text.partition("Output:")
        middle = middle.strip().removesuffix(around.tail.strip())
    middle = middle.strip()
    if not found or not middle or "Input:" in middle or "<extra_id_" in middle:
        return None
    return f"{around.head}{middle}{around.tail}"


def pick(
    vectors: np.ndarray, count: int, clusters: int, key: tuple[int, ...]
) -> list[int]:
    """`count` row numbers of `vectors` (n, i), or all there are.

    Of each of so many clusters the rows nearest to its centre, in proportion to its size
    (rounded to the largest remainders).
    """
    n = len(vectors)
    if n <= count:
        return list(range(n))
    rng = np.random.default_rng((len(key), *key))
    labels, distances = kmeans(np.float64(vectors), min(clusters, n), rng)
    exact = np.bincount(labels, minlength=clusters) * count / n
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    chosen = []
    for cluster, share in enumerate(shares):
        members = np.flatnonzero(labels == cluster)
        nearest = members[np.argsort(distances[members], kind="stable")]
        chosen += nearest[:share].tolist()
    return sorted(chosen)


def kmeans(
    x: np.ndarray, clusters: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The cluster (n,) of each row of x (n, i), and its squared distance to the centre.

    Lloyd's algorithm from centres drawn as k-means++ does (Arthur and Vassilvitskii 2007).
    """

    def squared(centres: np.ndarray) -> np.ndarray:
        cross = (x**2).sum(1)[:, None] - 2 * x @ centres.T + (centres**2).sum(1)
        return np.maximum(cross, 0)

    centres = x[[rng.integers(len(x))]]
    while len(centres) < clusters:
        chances = squared(centres).min(1)
        if not chances.any():  # fewer different rows than clusters
            break
        new = rng.choice(len(x), p=chances / chances.sum())
        centres = np.concatenate([centres, x[[new]]])
    labels = None
    for _ in range(ROUNDS):
        before, labels = labels, squared(centres).argmin(1)
        if np.array_equal(before, labels):
            break
        for cluster in np.unique(labels):
            centres[cluster] = x[labels == cluster].mean(0)
    return labels, squared(centres)[np.arange(len(x)), labels]
