"""Scores of predictions, and OP, BWT and FWT of the score matrix.

Labels and predictions are compared lower-cased and stripped; nothing is ever evaluated as
code. `SCORINGS` names the ways published scripts differ.
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


def score(
    metric: str,
    predictions: Sequence[str],
    labels: Sequence[str],
    remap: Mapping[str, str] | None = None,
) -> float:
    """The mean score of a task's predictions, in [0, 1].

    Raises ValueError without predictions, or if there are more or fewer than labels.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    pairs = zip(predictions, labels, strict=True)
    return sum(score_row(metric, p, y, remap) for p, y in pairs) / len(predictions)


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


# The PyTorch release has a script for OP, one for BWT and one for FWT. The latter two lack
# the remap, and the last lists task195 where it means task1687.
SCORINGS = {
    "sound": Scoring(),
    "release_op": Scoring(decimals=4),
    "release_bwt": Scoring(remap=False),
    "release_fwt": Scoring(remap=False, rouge_l=("task1687",)),
}


def score_task(
    task: Any,
    predictions: Sequence[str],
    labels: Sequence[str],
    scoring: Scoring = SCORINGS["sound"],
) -> float:
    """The mean score of a `tasks.Task` (its name, metric and remap) under `scoring`."""
    metric = "rouge_l" if task.name in scoring.rouge_l else task.metric
    remap = task.remap if scoring.remap else None
    value = score(metric, predictions, labels, remap)
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
    alone = list(single or ())[:n]
    alone += [None] * (n - len(alone))
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
