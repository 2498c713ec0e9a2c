"""Scores of predictions, and OP, BWT and FWT of the score matrix.

Labels and predictions are compared lower-cased and stripped; nothing is ever evaluated as
code. `SCHEMES` names the ways published scripts differ.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import aim_jax

Matrix = Sequence[Sequence[float | None]]


def exact(prediction: str, label: str) -> bool:
    """Whether both are the same text, apart from case and surrounding space."""
    return _normal(prediction) == _normal(label)


def rouge_l(prediction: str, label: str) -> float:
    """ROUGE-L F1 with Porter stemming (package rouge_score), in [0, 1]."""
    score = _scorer().score(_normal(label), _normal(prediction))
    return score["rougeL"].fmeasure


METRICS = {"exact": exact, "rouge_l": rouge_l}


def score_row(
    metric: str, prediction: str, label: str, remap: Mapping[str, str] | None = None
) -> float:
    """The score of one prediction, in [0, 1].

    `remap` gives predictions (in lower case) the label that they stand for.
    """
    text = _normal(prediction)
    return float(METRICS[metric]((remap or {}).get(text, text), label))


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a task is scored where published scripts differ; the defaults are sound.

    remap: use the task's remap of predictions (task363: pos and neg are p and n).
    rouge_l: names of tasks scored by ROUGE-L whatever their own metric is.
    decimals: round the score of each task; None does not.
    """

    remap: bool = True
    rouge_l: tuple[str, ...] = ()
    decimals: int | None = None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Scoring of the tasks for each of OP, BWT and FWT, and what divides BWT (see `bwt`)."""

    op: Scoring = Scoring()
    bwt: Scoring = Scoring()
    fwt: Scoring = Scoring()
    bwt_over: str = "earlier"


# The PyTorch release has a script for OP, one for BWT and one for FWT. The latter two lack
# the remap, and the last lists task195 where it means task1687.
SCHEMES = {
    "sound": Scheme(),
    "release": Scheme(
        op=Scoring(decimals=4),
        bwt=Scoring(remap=False),
        fwt=Scoring(remap=False, rouge_l=("task1687",)),
    ),
}


# Of a scheme: what may stand behind `=`, and its meaning.
_OPTIONS = {
    "bwt_over": ("earlier|all", {"earlier": "earlier", "all": "all"}.__getitem__),
    "remap": ("true|false", {"true": True, "false": False}.__getitem__),
    "rouge_l": ("TASK+TASK", lambda text: tuple(text.split("+"))),
    "decimals": (
        "0..9|none",
        {"none": None, **{str(n): n for n in range(10)}}.__getitem__,
    ),
}


def scheme(text: str) -> Scheme:
    """The scheme that `NAME,option=value,...` stands for; without a NAME it is `sound`.

    Options: bwt_over, and fields of `Scoring` for OP, BWT and FWT alike. Raises InputError
    that lists what there is.
    """
    name, *options = text.split(",")
    if "=" in name:
        name, options = "sound", [name, *options]
    if name not in SCHEMES:
        raise aim_jax.InputError(
            f"--scoring: no '{name}'; there are {', '.join(SCHEMES)}"
        )
    found = SCHEMES[name]
    for option in options:
        field, _, value = option.partition("=")
        try:
            change = {field: _OPTIONS[field][1](value)}
        except KeyError:
            known = ", ".join(f"{k}={words}" for k, (words, _) in _OPTIONS.items())
            raise aim_jax.InputError(
                f"--scoring: no '{option}'; there are {known}"
            ) from None
        if field != "bwt_over":
            change = {
                score: dataclasses.replace(getattr(found, score), **change)
                for score in ("op", "bwt", "fwt")
            }
        found = dataclasses.replace(found, **change)
    return found


def relevant(task: Any, scoring: Scoring) -> Scoring:
    """The part of `scoring` that decides the scores of the rows of a `tasks.Task`."""
    named = (task.name,) if task.name in scoring.rouge_l else ()
    return Scoring(scoring.remap and bool(task.remap), named)


def score_rows(
    task: Any, rows: Sequence[Mapping[str, str]], scoring: Scoring = Scoring()
) -> list[float]:
    """The score of each {"prediction", "label"} of a `tasks.Task`, in [0, 1]."""
    metric = "rouge_l" if task.name in scoring.rouge_l else task.metric
    remap = task.remap if scoring.remap else None
    return [score_row(metric, r["prediction"], r["label"], remap) for r in rows]


def mean(scores: Sequence[float], scoring: Scoring = Scoring()) -> float:
    """The score of a task whose rows have `scores`."""
    value = sum(scores) / len(scores)
    return value if scoring.decimals is None else round(value, scoring.decimals)


def op(matrix: Matrix) -> float | None:
    """Overall performance: the mean score on all T tasks after the last of them.

    `matrix[i][j]` is the score on task j after task i, and T = len(matrix), so that the rows
    of an unfinished run count too. None where a score that enters is missing (null, or
    beyond the end of its row), here and below.
    """
    n = len(matrix)
    return _mean([_at(matrix, n - 1, j) for j in range(n)])


def bwt(matrix: Matrix, divisor: str = "earlier") -> float | None:
    """Backward transfer: the mean change of an earlier task's score until the end.

    The sum over j < T-1 of a[T-1][j] - a[j][j], over T-1 (`earlier`, as AimMerging and
    most others have it) or over T (`all`, as SAPT's script has it). None for one task.
    """
    n = len(matrix)
    changes = [
        _minus(_at(matrix, n - 1, j), _at(matrix, j, j)) for j in range(max(n - 1, 0))
    ]
    mean, share = _mean(changes), {"earlier": 1.0, "all": len(changes) / max(n, 1)}
    return None if mean is None else mean * share[divisor]


def fwt(matrix: Matrix, single: Sequence[float | None] | None) -> float | None:
    """Forward transfer: the mean gain of a new task over training on it alone.

    The mean over all j < T, the first included, of a[j][j] - single[j].
    """
    n = len(matrix)
    alone = [*(single or ()), *[None] * n]
    return _mean([_minus(_at(matrix, j, j), alone[j]) for j in range(n)])


@functools.cache
def _scorer() -> Any:
    # The import takes over a second, and most runs have no ROUGE task.
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise aim_jax.InputError(
            "ROUGE-L needs the package rouge-score: pip install rouge-score"
        ) from None
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _normal(text: str) -> str:
    return text.lower().strip()


def _at(matrix: Matrix, i: int, j: int) -> float | None:
    return matrix[i][j] if j < len(matrix[i]) else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(v is None for v in values):
        return None
    return sum(values) / len(values)
