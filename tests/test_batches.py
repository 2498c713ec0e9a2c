"""Batches: shapes from buckets, weights that carry the averaging rule, row choice."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import transformers

import aim_jax
from aim_jax import config
from aim_jax.data import batches
from aim_jax.models import hf

DATA = config.Data(
    max_input=12, max_target=4, buckets=(8, 16), target_buckets=(4, 8), device_rows=8
)


@pytest.fixture(scope="module")
def tokenizer():
    return batches.tokenizer(hf.ASSETS)


def example(inputs, targets, name="r"):
    return batches.Example(
        name, np.arange(1, inputs + 1, dtype=np.int32), np.full(targets, 9, np.int32)
    )


def text(kind="encdec", count=1, tokenizer=None):
    return batches.Text(tokenizer, kind, DATA, count)


def test_encode_ends_every_text_and_cuts_to_the_limits(tokenizer):
    rows = [
        {"id": "a", "input": "short", "output": "yes"},
        {"id": "b", "input": "word " * 40, "output": "word " * 40},
    ]
    short, long = batches.encode(text(tokenizer=tokenizer), rows)
    eos = tokenizer.eos_token_id
    assert short.id == "a" and tokenizer.decode(short.inputs[:-1]) == "short"
    assert len(long.inputs) == 12 and len(long.targets) == 4
    assert all(x[-1] == eos for e in (short, long) for x in (e.inputs, e.targets))
    (whole,) = batches.encode(text(tokenizer=tokenizer), rows[1:], truncate=False)
    assert len(whole.inputs) > 40 and len(whole.targets) == 4
    cut = text(tokenizer=tokenizer)._replace(data=config.Data(max_test_input=20))
    (most,) = batches.encode(cut, rows[1:], truncate=False)
    assert most.inputs.tolist() == [*whole.inputs[:19], eos]
    assert batches.encode(text(tokenizer=tokenizer), []) == []


def test_decoder_prompt_is_cut_and_answer_stays(tokenizer):
    rows = [{"id": "b", "input": "word " * 40, "output": "yes"}]
    (made,) = batches.encode(text("decoder", tokenizer=tokenizer), rows)
    assert len(made.inputs) == 12 and tokenizer.eos_token_id not in made.inputs
    assert tokenizer.decode(made.targets[:-1]).strip() == "yes"


@pytest.mark.parametrize("prepends", [False, True])
def test_one_space_between_prompt_and_answer(prepends):
    """The answer begins with the word as it is within a text, whoever adds the space."""
    vocab = {"<unk>": 0, "</s>": 1, "▁a": 2, "a": 3, "▁yes": 4, "yes": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    parts = [tokenizers.normalizers.Replace(" ", "▁")]
    if prepends:
        parts.insert(0, tokenizers.normalizers.Prepend("▁"))
    model.normalizer = tokenizers.normalizers.Sequence(parts)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", unk_token="<unk>"
    )
    rows = [{"id": "b", "input": "a", "output": "yes"}]
    (made,) = batches.encode(text("decoder", tokenizer=tokenizer), rows)
    assert made.targets.tolist() == [4, 1]


def test_tokens_are_those_of_inputs_and_targets():
    rows = [example(3, 2), example(1, 4)]
    assert batches.tokens(rows) == 10
    # A decoder reads all targets but the last.
    assert [batches.longest(text(k), rows) for k in ("encdec", "decoder")] == [3, 4]


@pytest.mark.parametrize("length, size", [(1, 8), (8, 8), (9, 16), (17, 32), (40, 48)])
def test_bucket(length, size):
    assert batches.bucket(length, (8, 16)) == size


@pytest.mark.parametrize(
    "longest, length", [(3, 4), (5, 8), (9, 12), (13, 16), (17, 32)]
)
def test_prompts_end_at_a_bucket_or_half_way_to_it(longest, length):
    made = batches.prompts(text(), [example(2, 1), example(longest, 1)], 3)
    assert made["inputs"].shape == made["mask"].shape == (3, length)
    assert made["mask"].sum(-1).tolist() == [2, longest, 0]


def test_collate_encoder_decoder():
    batch = batches.collate(text(), [[example(3, 2), example(9, 4)]], rows=3)
    assert {k: v.shape for k, v in batch.items()} == {
        "inputs": (1, 3, 16),
        "mask": (1, 3, 16),
        "targets": (1, 3, 4),
        "weights": (1, 3, 4),
    }
    assert batch["mask"].sum(-1).tolist() == [[3, 9, 0]]
    assert batch["weights"].sum(-1).tolist() == [[2, 4, 0]]
    assert batch["inputs"][0, 0, :4].tolist() == [1, 2, 3, 0]


def test_collate_decoder_aligns_right_so_that_the_last_positions_predict():
    batch = batches.collate(text("decoder"), [[example(3, 2)]], rows=1)
    assert batch["inputs"][0, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 9]
    assert batch["mask"][0, 0].tolist() == [False] * 4 + [True] * 4
    assert batch["targets"][0, 0].tolist() == [0, 0, 9, 9]
    assert batch["weights"][0, 0].tolist() == [0, 0, 1, 1]


def test_decoder_inputs_are_never_shorter_than_targets():
    short = text("decoder")._replace(data=dataclasses.replace(DATA, buckets=(2, 16)))
    batch = batches.collate(short, [[example(1, 1)]], rows=1, target=8)
    assert batch["inputs"].shape[2] == 16 > batch["targets"].shape[2] == 8


def test_rows_fill_up_to_the_number_of_devices():
    batch = batches.collate(text(count=4), [[example(3, 2)]], rows=5)
    assert batch["inputs"].shape == (1, 8, 8)


def test_rows_are_sorted_into_parts_longest_first():
    parts = text()._replace(data=dataclasses.replace(DATA, device_rows=2, pack=False))
    micros = [[example(3, 1), example(9, 2)], [example(12, 4)]]
    batch = batches.collate(parts, micros, 4)
    assert batch["inputs"].shape == (2, 2, 16)
    assert batch["mask"].sum(-1).tolist() == [[12, 9], [3, 0]]
    assert batch["weights"].sum(-1).tolist() == [[4, 2], [1, 0]]
    # Two devices take two rows each.
    assert batches.collate(parts._replace(count=2), micros, 4)["inputs"].shape[1] == 4


def packed(kind="encdec", **changes):
    return text(kind)._replace(data=dataclasses.replace(DATA, device_rows=1, **changes))


def test_examples_share_a_row_of_an_encoder_decoder():
    micros = [[example(4, 1), example(9, 2)], [example(3, 1), example(10, 1)]]
    batch = batches.collate(packed(), micros, 4)
    assert batch["segments"][0, 0].tolist() == [1] * 10 + [2] * 4 + [0] * 2
    assert batch["inputs"][0, 0].tolist() == [*range(1, 11), *range(1, 5), 0, 0]
    assert batch["owners"][0, 0].tolist() == [1, 2, 0, 0]
    assert batch["segments"][1, 0].tolist() == [1] * 9 + [2] * 3 + [0] * 4
    assert batch["owners"][1, 0].tolist() == [1, 1, 2, 0]
    assert not batch["mask"][2:].any() and batch["mask"].sum() == 26
    assert batch["weights"].sum(-1).ravel().tolist() == [2, 3, 0, 0]
    # No row is fuller than the longest example of its part asks for.
    batch = batches.collate(packed(), [[example(n, 1) for n in (12, 6, 5)]], 3)
    assert batch["mask"].sum(-1).ravel().tolist() == [12, 6, 5]
    assert "segments" not in batches.collate(packed(), micros, 4, share=False)


def test_targets_of_a_decoder_that_share_a_row_stand_at_its_end():
    batch = batches.collate(packed("decoder"), [[example(9, 2), example(3, 2)]], 2)
    # The tokens that predict a target are the last ones of its example.
    tokens = [*range(1, 9), 1, 2, 9, 9, 3, 9]
    assert batch["inputs"][0, 0].tolist() == [0, 0, *tokens]
    segments = [1] * 8 + [2] * 2 + [1, 1, 2, 2]
    assert batch["segments"][0, 0].tolist() == [0, 0, *segments]
    assert batch["targets"][0, 0].tolist() == [9] * 4
    assert "owners" not in batch


@pytest.mark.parametrize("kind", ["encdec", "decoder"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_every_example_lies_in_one_row(kind, rows):
    rng = np.random.default_rng(rows)
    for count in range(1, 20):
        sizes = rng.integers(1, (20, 7), (count, 2)).tolist()
        # Tokens that tell whose they are.
        examples = [
            batches.Example(str(i), np.full(n, 100 + i), np.full(k, 500 + i))
            for i, (n, k) in enumerate(sizes)
        ]
        data = dataclasses.replace(packed().data, device_rows=rows)
        own = batches.Text(None, kind, data)
        batch = batches.collate(own, [examples], count, "micro_batch")
        if "segments" not in batch:
            assert count <= rows
            continue
        found = []
        for part, place in np.ndindex(batch["mask"].shape[:2]):
            row = {name: leaf[part, place] for name, leaf in batch.items()}
            assert (row["mask"] == (row["segments"] > 0)).all()
            real = row["weights"] > 0
            for number in range(1, row["segments"].max() + 1):
                tokens = row["inputs"][row["segments"] == number].tolist()
                i = tokens[0] - 100
                n, k = sizes[i]
                if kind == "encdec":
                    targets = row["targets"][row["owners"] == number].tolist()
                    assert tokens == [100 + i] * n
                else:
                    last = row["segments"][-len(real) :] == number
                    targets = row["targets"][last & real].tolist()
                    assert tokens == [100 + i] * n + [500 + i] * (k - 1)
                assert targets == [500 + i] * k
                found.append(i)
        assert sorted(found) == list(range(count))


def test_a_stack_is_of_one_shape():
    groups = [[example(3, 1)], [example(3, 5), example(9, 2)]]
    chunk = batches.stack(text(), groups, 2)
    assert chunk["inputs"].shape == (2, 1, 2, 16)
    assert chunk["targets"].shape == (2, 1, 2, 8)
    assert chunk["mask"].sum(-1).tolist() == [[[3, 0]], [[3, 9]]]
    long = text()._replace(longest=17)
    assert batches.stack(long, groups, 2)["inputs"].shape[-1] == 32


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_weights_make_the_average(average):
    micros = [[example(3, 1), example(9, 2)], [example(6, 4)]]
    parts = text()._replace(data=dataclasses.replace(DATA, device_rows=2, pack=False))
    batch = batches.collate(parts, micros, 4, average)
    assert batch["mask"].sum(-1).tolist() == [[9, 6], [3, 0]]
    losses = np.random.default_rng(0).random(batch["weights"].shape)
    real = batch["weights"] > 0
    value = (losses * batch["weights"]).sum() / real.sum()
    first = np.concatenate([losses[0, 0][real[0, 0]], losses[1, 0][real[1, 0]]])
    means = [first.mean(), losses[0, 1][real[0, 1]].mean()]
    expected = np.mean(means) if average == "micro_batch" else losses[real].mean()
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_validation_batches_sum_to_the_rule(average):
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, (16, 5), (21, 2)).tolist()
    rows = [example(n, k, str(i)) for i, (n, k) in enumerate(sizes)]
    loss = {r.id: rng.random(len(r.targets)) for r in rows}
    made = batches.validation_batches(text(), rows, 4, average)
    assert sum(int((b["weights"].sum(-1) > 0).sum()) for b in made) == 21
    assert {b["mask"].shape[:2] for b in made} == {(1, 4)}
    # The order in which the batches hold the rows.
    order = sorted(rows, key=lambda r: -len(r.inputs))
    total = 0.0
    for start, batch in zip(range(0, 21, 4), made, strict=True):
        for r, row in enumerate(order[start : start + 4]):
            total += (batch["weights"][0, r, : len(row.targets)] * loss[row.id]).sum()
    if average == "token":
        expected = np.concatenate(list(loss.values())).mean()
    else:
        groups = [rows[i : i + 8] for i in range(0, 21, 8)]
        means = [np.concatenate([loss[r.id] for r in g]).mean() for g in groups]
        expected = np.average(means, weights=[len(g) for g in groups])
    assert total == pytest.approx(expected, rel=1e-5)


def test_steps_visit_every_row_once_an_epoch_and_may_straddle_epochs():
    train = config.Train(epochs=4, batch_size=4, micro_batch_size=2)
    # 4 epochs of 3 micro-batches, two a step, would be 6: an epoch has one whole step.
    assert batches.total_steps(5, train) == 4
    micros = [m for s in range(1, 7) for m in batches.step_rows(5, train, (1, 2), s)]
    assert [len(m) for m in micros] == [2, 2, 1] * 4
    for epoch in range(4):
        seen = np.concatenate(micros[3 * epoch : 3 * epoch + 3])
        assert sorted(seen.tolist()) == [0, 1, 2, 3, 4]
    again = batches.step_rows(5, train, (1, 2), 3)
    assert all(np.array_equal(a, b) for a, b in zip(again, micros[4:6], strict=True))
    assert len({tuple(np.concatenate(micros[3 * e : 3 * e + 3])) for e in range(4)}) > 1


def test_steps_as_the_release_counts_them():
    train = config.Train(epochs=10, batch_size=32, micro_batch_size=8)
    assert batches.total_steps(1000, train) == 310  # semantics.md 5.7
    assert batches.total_steps(400, train) == 120
    assert batches.total_steps(0, train) == 0


def test_a_task_smaller_than_an_update_has_one_an_epoch():
    train = config.Train(epochs=3, batch_size=32, micro_batch_size=8)
    assert batches.total_steps(17, train) == 3
    for step in (1, 2, 3):
        micros = batches.step_rows(17, train, (1, 2), step)
        assert sorted(np.concatenate(micros)) == list(range(17))


@pytest.mark.parametrize("model_type", [None, "t5", "qwen3", "llama"])
def test_a_folder_without_tokenizer_is_named(tmp_path, model_type):
    if model_type:  # transformers makes an empty one of some families
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(aim_jax.InputError, match=str(tmp_path)):
        batches.tokenizer(tmp_path)


def test_a_token_that_the_model_does_not_have_is_named(tokenizer):
    own = text(tokenizer=tokenizer)
    rows = [{"id": "r7", "input": "a", "output": "b"}]
    (whole,) = batches.encode(own, rows)
    most = max(*whole.inputs, *whole.targets)
    assert batches.encode(own._replace(vocabulary=most + 1), rows)
    with pytest.raises(aim_jax.InputError, match=f"row r7: token {most} .* {most} emb"):
        batches.encode(own._replace(vocabulary=most), rows)


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_nothing_to_validate_on(average):
    assert batches.validation_batches(text(), [], 8, average) == []
