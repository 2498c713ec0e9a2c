"""Text to batches: tokenize, pad to a bounded set of shapes, weigh the target tokens.

Which rows make a batch depends on integers alone (seed, task, step), never on what was
drawn before: a resumed or repeated step sees the same rows.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

import aim_jax
from aim_jax import config
from aim_jax.data import memory

Batch = dict[str, np.ndarray]
Row = dict[str, str]


class Example(NamedTuple):
    """Token ids of one row: `inputs` with what the tokenizer adds, `targets` with eos."""

    id: str
    inputs: np.ndarray
    targets: np.ndarray


Weighted = tuple[Example, float]  # and the weight of its target tokens


class Text(NamedTuple):
    """What turns rows into arrays.

    tokenizer: a Hugging Face tokenizer; kind: `encdec` or `decoder`
    (`aim_jax.models`); data: lengths and buckets; count: rows are padded to a multiple
    of it (the number of devices); longest: every batch has room for inputs so long, so
    that all have one shape; vocabulary: token ids are below it.
    """

    tokenizer: Any
    kind: str
    data: config.Data
    count: int = 1
    longest: int = 0
    vocabulary: float = math.inf


def tokenizer(folder: pathlib.Path) -> Any:
    """The tokenizer of a Hugging Face directory. Raises InputError if it does not load."""
    # Only the tokenizer is wanted: no word about PyTorch that is not there.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers  # slow to import, and only this function needs it

    try:
        # Lengths are ours to decide: without a limit the tokenizer does not warn.
        # Nor does it ask at a terminal whether to run code of the directory.
        loaded = transformers.AutoTokenizer.from_pretrained(
            folder, model_max_length=1 << 30, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise aim_jax.InputError(f"{folder}: no tokenizer: {reason}") from None
    # Of some families transformers makes an empty one where there are no files.
    files = sorted(set(loaded.vocab_files_names.values()))
    if not any((folder / name).is_file() for name in files):
        raise aim_jax.InputError(f"{folder}: no tokenizer: none of {', '.join(files)}")
    if loaded.eos_token_id is None:
        raise aim_jax.InputError(f"{folder}: the tokenizer has no end token (eos)")
    return loaded


def encode(text: Text, rows: Sequence[Row], truncate: bool = True) -> list[Example]:
    """Token ids of rows; inputs cut to `data.max_input`, targets to `data.max_target`.

    As the release does (semantics.md 1.4): no prefix, one end token, test inputs whole
    (truncate=False; but cut to `data.max_test_input`). Raises InputError for a token that
    the model does not have.
    """
    if not rows:
        return []
    eos = text.tokenizer.eos_token_id
    inputs = text.tokenizer([r["input"] for r in rows])["input_ids"]
    outputs = [r["output"] for r in rows]
    # Some tokenizers put a space before the first word of a text by themselves.
    if text.kind == "decoder" and not text.tokenizer.tokenize("a")[0].startswith("▁"):
        outputs = [" " + o for o in outputs]
    targets = text.tokenizer(outputs, add_special_tokens=False)["input_ids"]
    limit = text.data.max_input if truncate else text.data.max_test_input
    examples = []
    for row, source, target in zip(rows, inputs, targets, strict=True):
        # An answer goes on from a decoder's prompt.
        if text.kind == "decoder" and len(source) > 1 and source[-1] == eos:
            source = source[:-1]
        if len(source) > limit:
            # The last token is the end token where the tokenizer adds one.
            source = [*source[: limit - 1], source[-1]]
        target = [*target[: text.data.max_target - 1], eos]
        last = max([*source, *target])
        if last >= text.vocabulary:
            raise aim_jax.InputError(
                f"row {row['id']}: token {last} ({text.tokenizer.decode([last])!r}) is"
                f" beyond the model's {text.vocabulary} embeddings; the tokenizer is of"
                " another model, or has tokens of its own"
            )
        examples.append(
            Example(row["id"], np.array(source, np.int32), np.array(target, np.int32))
        )
    return examples


def tokens(examples: Iterable[Example]) -> int:
    """Tokens of inputs and targets, padding not counted."""
    return sum(len(e.inputs) + len(e.targets) for e in examples)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`; beyond the last, a multiple of the last."""
    for size in buckets:
        if length <= size:
            return size
    return -(-length // buckets[-1]) * buckets[-1]


def cuts(buckets: Sequence[int], full: int, least: int) -> list[int]:
    """Lengths from `least` to `full` that a part of a batch may be cut to."""
    return [n for n in sorted(buckets) if least <= n < full] + [full]


def parts(rows: int, device_rows: int, count: int) -> tuple[int, int]:
    """How many parts, and of how many rows, hold `rows` rows on `count` devices."""
    b = count * min(device_rows, -(-rows // count))
    return -(-rows // b), b


def longest(text: Text, examples: Sequence[Example]) -> int:
    """Input tokens of the longest row."""
    return max(map(_length(text), examples), default=0)


def longest_target(examples: Iterable[Example]) -> int:
    """Tokens of the longest target."""
    return max((len(e.targets) for e in examples), default=0)


def collate(
    text: Text,
    examples: Sequence[Sequence[Example]],
    rows: int,
    average: str = "token",
    target: int = 0,
    share: bool = True,
) -> Batch:
    """Micro-batches of up to `rows` examples in all as one batch (parts, b, length).

    inputs int32, mask bool, targets int32, weights float32. The examples are sorted by
    length, longest first, into parts of `data.device_rows` rows a device, so that the
    steps can leave out padding; empty rows fill up. Whichever part a row is in, the
    weights carry the rule: 1 at target tokens, so that sum(weights * loss) / count is the
    mean over tokens; for `average` 'micro_batch' they make it the mean of micro-batch
    means.

    With `data.pack`, where there are several parts, examples share a row that has room for
    them (share=False: never). `segments` int32 then tells, from 1, whose each token is, and
    for an encoder-decoder `owners` whose each target is; 0 is padding.

    target: tokens of the longest target, if it is not among these examples.
    """
    everything = [e for micro in examples for e in micro]
    total = sum(len(e.targets) for e in everything)
    weighted = []
    for micro in examples:
        weight = 1.0
        if average == "micro_batch":
            weight = total / (len(examples) * sum(len(e.targets) for e in micro))
        weighted += [(example, weight) for example in micro]
    return _arrange(text, weighted, rows, target, share)


def _arrange(
    text: Text, weighted: Sequence[Weighted], rows: int, target: int, share: bool
) -> Batch:
    """`collate` of up to `rows` examples with a weight each."""
    shape = parts(rows, text.data.device_rows, text.count)
    share = share and text.data.pack and shape[0] > 1
    batch = _empty(text, [e for e, _ in weighted], shape, target, share)
    size, left = _length(text), list(weighted)
    if shape[0] > 1:
        left.sort(key=lambda pair: -size(pair[0]))
    for part in range(shape[0]):
        # Tokens and targets that a row has room for; none is longer than it must be.
        most = bucket(longest(text, [e for e, _ in left]), sorted(text.data.buckets))
        room = np.tile([most, batch["targets"].shape[-1]], (shape[1], 1))
        lying, left = _lay(left, size, room, share)
        for place, pairs in enumerate(lying):
            if pairs:
                row = {name: leaf[part, place] for name, leaf in batch.items()}
                _fill(row, pairs, text.kind)
    return batch


def _empty(
    text: Text,
    examples: Sequence[Example],
    shape: tuple[int, int],
    target: int,
    share: bool,
) -> Batch:
    """Zeros of a batch (parts, b, length) that has room for `examples`."""
    width = max(target, longest_target(examples))
    width = bucket(width, sorted(text.data.target_buckets))
    length = max(text.longest, longest(text, examples))
    if text.kind == "decoder":
        length = max(length, width)  # the last `width` positions predict the targets
    length = bucket(length, sorted(text.data.buckets))
    leaves = {
        "inputs": (length, np.int32),
        "mask": (length, bool),
        "targets": (width, np.int32),
        "weights": (width, np.float32),
    }
    if share:
        leaves["segments"] = length, np.int32
        if text.kind == "encdec":
            leaves["owners"] = width, np.int32
    return {
        name: np.zeros((*shape, size), kind) for name, (size, kind) in leaves.items()
    }


def _lay(
    pairs: Sequence[Weighted],
    size: Callable[[Example], int],
    room: np.ndarray,
    share: bool,
) -> tuple[list[list[Weighted]], list[Weighted]]:
    """Pairs for each row of a part, each in the first that has `room`, and those left over.

    room: tokens and targets of each row (b, 2); what pairs take of it is taken off.
    """
    lying, later = [[] for _ in room], []
    for pair in pairs:
        needed = np.array([size(pair[0]), len(pair[0].targets)])
        places = np.flatnonzero((room >= needed).all(1))
        if len(places):
            lying[places[0]].append(pair)
            room[places[0]] -= needed if share else room[places[0]]
        else:
            later.append(pair)
    return lying, later


def stack(
    text: Text, examples: Sequence[Sequence[Example]], rows: int, target: int = 0
) -> Batch:
    """A batch for each group of up to `rows` examples, leaves (batches, parts, b, length).

    target: as of `collate`.
    """
    everything = [e for group in examples for e in group]
    text = text._replace(longest=max(text.longest, longest(text, everything)))
    target = max(target, longest_target(everything))
    made = [collate(text, [group], rows, target=target) for group in examples]
    return {name: np.stack([batch[name] for batch in made]) for name in made[0]}


def _length(text: Text) -> Callable[[Example], int]:
    if text.kind == "encdec":
        return lambda e: len(e.inputs)
    return lambda e: len(e.inputs) + len(e.targets) - 1


def _fill(row: Batch, pairs: Sequence[Weighted], kind: str) -> None:
    """Write examples into the arrays of the row that they share."""
    examples, weights = zip(*pairs, strict=True)
    targets = [e.targets for e in examples]
    lengths = [len(t) for t in targets]
    if kind == "encdec":
        tokens = [e.inputs for e in examples]
    else:
        # The last positions of a row predict the targets of all its examples.
        whole = [np.concatenate([e.inputs, e.targets])[:-1] for e in examples]
        cut = [np.split(w, [-n]) for w, n in zip(whole, lengths, strict=True)]
        tokens = [first for first, _ in cut] + [last for _, last in cut]
    numbers = np.arange(len(pairs)) + 1
    segments = np.resize(numbers, len(tokens)).repeat([len(t) for t in tokens])
    values = {
        "inputs": np.concatenate(tokens),
        "mask": segments > 0,
        "segments": segments,
        "targets": np.concatenate(targets),
        "weights": np.repeat(weights, lengths),
        "owners": numbers.repeat(lengths),
    }
    for name, leaf in row.items():
        n = len(values[name])
        leaf[slice(n) if kind == "encdec" else slice(-n, None)] = values[name]


def prompts(text: Text, examples: Sequence[Example], rows: int) -> Batch:
    """Inputs to decode from, leaves (rows, length): `inputs` and `mask`.

    Length: of a bucket, or half-way between two; each is compiled when it is first met.
    """
    buckets = sorted(text.data.buckets)
    between = [(a + b) // 2 for a, b in itertools.pairwise((0, *buckets))]
    length = bucket(max(len(e.inputs) for e in examples), sorted(buckets + between))
    inputs = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), bool)
    for r, example in enumerate(examples):
        n = len(example.inputs)
        place = slice(n) if text.kind == "encdec" else slice(-n, None)
        inputs[r, place], mask[r, place] = example.inputs, True
    return {"inputs": inputs, "mask": mask}


def total_steps(count: int, cfg: config.Train) -> int:
    """Optimizer steps on `count` rows (semantics.md 2.2); 0 for no rows or no epochs."""
    per_epoch, together = _micro_batches(count, cfg)
    return cfg.epochs * (per_epoch // together) if count else 0


def _micro_batches(count: int, cfg: config.Train) -> tuple[int, int]:
    """Micro-batches of an epoch of `count` rows, and of an optimizer step.

    A step of a task with fewer rows than an update is an epoch.
    """
    per_epoch = -(-count // cfg.micro)
    return per_epoch, min(cfg.batch_size // cfg.micro, per_epoch)


def step_rows(
    count: int, cfg: config.Train, key: Sequence[int], step: int
) -> list[np.ndarray]:
    """Row numbers of each micro-batch of `step` (1-based).

    A new order every epoch; the last micro-batch of an epoch may be short, and the
    micro-batches of a step may straddle epochs (semantics.md 2.3).
    """
    per_epoch, together = _micro_batches(count, cfg)
    chosen = []
    for number in range((step - 1) * together, step * together):
        epoch, position = divmod(number, per_epoch)
        order = memory.order(count, (*key, epoch))
        chosen.append(order[position * cfg.micro :][: cfg.micro])
    return chosen


def validation_batches(
    text: Text, examples: Sequence[Example], rows: int, average: str
) -> list[Batch]:
    """Batches whose weighted loss sums to the validation loss.

    average 'micro_batch': the row-weighted mean over batches of 8 rows, in order, of
    their token means, as the release (semantics.md 4.1); 'token': the mean over tokens.
    The rows are sorted by length into fewer, fuller batches: the weights carry the rule.
    """
    if average == "token":
        count = sum(len(e.targets) for e in examples)
        weight = {i: 1 / count for i in range(len(examples))}
    else:
        weight = {}
        for start in range(0, len(examples), 8):
            group = examples[start : start + 8]
            share = len(group) / (len(examples) * sum(len(e.targets) for e in group))
            weight |= dict.fromkeys(range(start, start + len(group)), share)
    order = sorted(weight, key=lambda i: -_length(text)(examples[i]))
    made = []
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        weighted = [(examples[i], weight[i]) for i in chosen]
        made.append(_arrange(text, weighted, rows, 0, True))
    return made
