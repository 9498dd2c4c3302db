"""Micro-batches: budget, coverage, purity, mixture, temperature; a plan that does not depend on how one gets into it."""

from __future__ import annotations

import itertools
import time
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_translation import Toy

from nspec.mt.text.batches import TaskBatchSampler, evaluation_batches, probabilities_of
from nspec.mt.text.competence import rarity


class Lengths:
    """Stands for PreparedData: only lengths."""

    def __init__(self, lengths: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.tasks = list(lengths)
        self._lengths = lengths

    def size(self, split: str, task: str) -> int:
        assert split == "train"
        return len(self._lengths[task][0])

    def lengths(self, split: str, task: str) -> tuple[np.ndarray, np.ndarray]:
        assert split == "train"
        return self._lengths[task]


def invented(sizes: dict[str, int], seed: int = 0, longest: int = 60) -> Lengths:
    """Sources of random lengths, targets around 0.6 to 1.5 times as long."""
    rng = np.random.default_rng(seed)
    lengths = {}
    for task, size in sizes.items():
        source = rng.integers(3, longest, size)
        lengths[task] = source, np.maximum(3, (source * rng.uniform(0.6, 1.5, size)).astype(np.int64))
    return Lengths(lengths)


def cost(data: Lengths, batch: list[tuple[int, int]]) -> int:
    source, target = data.lengths("train", data.tasks[batch[0][0]])
    pairs = [pair for _, pair in batch]
    return len(batch) * int(source[pairs].max() + target[pairs].max())


DATA = invented({"en-aa": 300, "aa-en": 300, "en-bb": 40, "bb-en": 40})

many = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 120), min_size=1, max_size=4),
        "longest": st.integers(4, 90),
        "budget": st.integers(8, 400),
        "seed": st.integers(0, 2**40),
        "temperature": st.sampled_from([1.0, 2.0, 5.0, float("inf")]),
    }
)


def sampler_of(case: dict, micro_batches: int = 60, **ranks: int) -> tuple[Lengths, TaskBatchSampler]:
    data = invented({f"en-{i}": size for i, size in enumerate(case["sizes"])}, case["seed"] % 2**32, case["longest"])
    return data, TaskBatchSampler(
        data, "train", case["budget"], case["temperature"], micro_batches, case["seed"], **ranks
    )


@settings(max_examples=60, deadline=None)
@given(many)
def test_no_batch_exceeds_the_budget_unless_it_is_one_long_pair(case):
    data, sampler = sampler_of(case)
    for batch in sampler:
        assert cost(data, batch) <= case["budget"] or len(batch) == 1


@settings(max_examples=60, deadline=None)
@given(many)
def test_a_batch_holds_one_task_and_is_never_empty(case):
    _, sampler = sampler_of(case)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 60
    for number, batch in enumerate(batches):
        assert {task for task, _ in batch} == {int(sampler.plan[number])}


@settings(max_examples=60, deadline=None)
@given(many)
def test_every_pair_of_a_task_comes_once_before_any_comes_again(case):
    data, sampler = sampler_of(case, micro_batches=200)
    drawn = {task: [] for task in range(len(data.tasks))}
    for batch in sampler:
        drawn[batch[0][0]] += [pair for _, pair in batch]
    for task, pairs in drawn.items():
        size = data.size("train", data.tasks[task])
        for epoch in range(len(pairs) // size):
            assert sorted(pairs[epoch * size : (epoch + 1) * size]) == list(range(size))
        rest = pairs[len(pairs) // size * size :]
        assert len(set(rest)) == len(rest)


@settings(max_examples=60, deadline=None)
@given(many, st.integers(1, 4), st.integers(0, 60), st.sampled_from([1, 2, 3, 4, 5, 6]))
def test_going_on_in_the_middle_on_several_ranks_gives_what_one_undisturbed_process_gives(
    case, tasks_per_batch, done, world
):
    whole = list(sampler_of(case, tasks_per_batch=tasks_per_batch)[1])
    done -= done % world
    ranks = []
    for rank in range(world):
        _, sampler = sampler_of(case, rank=rank, world=world, tasks_per_batch=tasks_per_batch)
        assert len(sampler) == 60 // world
        sampler.start = done
        ranks.append(list(sampler))
    assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == whole[done:]


@pytest.mark.parametrize("tasks_per_batch", [1, 3])
def test_a_longer_plan_begins_with_the_shorter_one_in_any_order_of_asking(tasks_per_batch):
    args = {"tasks_per_batch": tasks_per_batch}
    short, long = (TaskBatchSampler(DATA, "train", 200, 2.0, count, 3, **args) for count in (50, 400))
    expected = list(long)
    assert expected[:50] == list(short)
    for number in np.random.default_rng(0).permutation(400).tolist():
        assert long.batch(number) == expected[number]


def test_another_seed_gives_another_plan_and_other_batches():
    plans = [TaskBatchSampler(DATA, "train", 200, 2.0, 50, seed) for seed in (1, 2)]
    assert plans[0].plan.tolist() != plans[1].plan.tolist()
    assert list(plans[0]) != list(plans[1])


def test_epochs_differ_in_their_batches_and_in_the_order_of_lengths():
    data = invented({"en-aa": 4000}, longest=20)
    sampler = TaskBatchSampler(data, "train", 300, 1.0, 1000, 0)
    source, _ = data.lengths("train", "en-aa")
    epochs, pairs = [], []
    for batch in sampler:
        pairs.append([pair for _, pair in batch])
        if sum(map(len, pairs)) == 4000:
            epochs.append(pairs)
            pairs = []
    first, second = epochs[:2]
    again = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    assert len(again) < 0.05 * len(first)
    means = [source[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # batches are not sorted by length
    assert [len(batch) for batch in first] != [len(batch) for batch in second]


def test_little_of_a_batch_is_padding_and_little_of_the_budget_unused():
    data = invented({"en-aa": 20000}, longest=80)
    source, target = data.lengths("train", "en-aa")
    sampler = TaskBatchSampler(data, "train", 4096, 1.0, 200, 0)
    batches = [[pair for _, pair in batch] for batch in sampler]
    real = sum(int(source[batch].sum() + target[batch].sum()) for batch in batches)
    padded = sum(cost(data, [(0, pair) for pair in batch]) for batch in batches)
    assert real / padded > 0.93
    assert padded / (4096 * len(batches)) > 0.93


def test_the_plan_of_task_pure_micro_batches_is_what_it_always_was():
    """Trainings that began with an older version go on with the same batches."""
    plan = list(TaskBatchSampler(DATA, "train", 200, 2.0, 400, 3))
    assert zlib.crc32(repr(plan).encode()) == 731485603


# Several directions in a micro-batch


@settings(max_examples=40, deadline=None)
@given(many, st.integers(1, 4))
def test_a_mixed_micro_batch_is_its_chunks_with_those_of_a_task_together(case, tasks_per_batch):
    _, sampler = sampler_of(case, tasks_per_batch=tasks_per_batch)
    case = case | {"budget": case["budget"] // tasks_per_batch}
    _, chunks = sampler_of(case, micro_batches=60 * tasks_per_batch)
    assert chunks.plan.tolist() == sampler.plan.tolist()
    singles = list(chunks)
    for number, batch in enumerate(sampler):
        mine = singles[number * tasks_per_batch : (number + 1) * tasks_per_batch]
        assert sorted(batch) == sorted(itertools.chain(*mine))
        groups = [task for task, _ in itertools.groupby(task for task, _ in batch)]
        assert groups == sorted({chunk[0][0] for chunk in mine})


def test_mixed_micro_batches_hold_several_tasks_and_every_pair_once_an_epoch():
    sampler = TaskBatchSampler(DATA, "train", 200, 2.0, 400, 3, tasks_per_batch=4)
    drawn = Counter(len({task for task, _ in batch}) for batch in sampler)
    assert drawn[3] > drawn[1]
    pairs = [pair for batch in sampler for task, pair in batch if task == 2]
    for epoch in range(len(pairs) // 40):  # the chunks of a task in one micro-batch follow the order of its epochs
        assert sorted(pairs[40 * epoch : 40 * epoch + 40]) == list(range(40))


# Temperature


def test_probabilities_are_in_proportion_at_one_even_at_infinity_and_between_at_five():
    sizes = {"en-aa": 90000, "en-bb": 9000, "en-cc": 1000}
    assert list(probabilities_of(sizes, 1.0).values()) == pytest.approx([0.9, 0.09, 0.01])
    assert list(probabilities_of(sizes, float("inf")).values()) == pytest.approx([1 / 3] * 3)
    powers = np.array([90000, 9000, 1000]) ** 0.2
    assert list(probabilities_of(sizes, 5.0).values()) == pytest.approx((powers / powers.sum()).tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, float("inf")])
def test_tasks_are_drawn_as_often_as_the_table_says(temperature):
    data = invented({"en-aa": 1000, "en-bb": 300, "en-cc": 50, "en-dd": 10})
    sampler = TaskBatchSampler(data, "train", 300, temperature, 20000, 7)
    expected = np.array(list(sampler.probabilities.values())) * 20000
    seen = np.bincount(sampler.plan, minlength=4)
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # the 0.999 quantile with 3 degrees of freedom


def test_what_is_yielded_follows_the_plan_and_not_only_the_table():
    sampler = TaskBatchSampler(DATA, "train", 200, 1.0, 2000, 1)
    seen = Counter(batch[0][0] for batch in sampler)
    assert [seen[task] for task in range(4)] == np.bincount(sampler.plan).tolist()
    assert seen[0] > 4 * seen[2]


# State


def test_a_state_goes_on_exactly_on_another_number_of_ranks():
    args = (DATA, "train", 200, 2.0, 60, 3)
    whole = TaskBatchSampler(*args)
    expected = list(whole)
    whole.start = 20
    ranks = [TaskBatchSampler(*args, rank=rank, world=2) for rank in range(2)]
    for sampler in ranks:
        sampler.load_state_dict(whole.state_dict())
    together = [batch for turn in zip(*ranks) for batch in turn]
    assert together == expected[20:]


def test_a_state_of_another_plan_is_an_error_that_names_the_difference():
    state = TaskBatchSampler(DATA, "train", 200, 2.0, 60, 3).state_dict()
    with pytest.raises(ValueError, match="had temperature 2.0, this one has 5.0"):
        TaskBatchSampler(DATA, "train", 200, 5.0, 60, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="had tasks_per_batch 1, this one has 2"):
        TaskBatchSampler(DATA, "train", 200, 2.0, 60, 3, tasks_per_batch=2).load_state_dict(state)
    with pytest.raises(ValueError, match="had sizes"):
        TaskBatchSampler(invented({"en-aa": 5}), "train", 200, 2.0, 60, 3).load_state_dict(state)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batches": 61, "world": 2}, "61 micro-batches cannot be shared out evenly to 2 processes"),
        ({"rank": 2, "world": 2}, "rank is 2 of 2"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, "seed -1"),
        ({"tasks_per_batch": 0}, "tasks_per_batch is 0; expected at least 1"),
        ({"tasks_per_batch": 101}, r"tasks_per_batch is 101; .* at most batch_tokens \(100\)"),
    ],
)
def test_wrong_options_are_errors(change, message):
    options = {"batch_tokens": 100, "temperature": 1.0, "micro_batches": 60, "seed": 1, "rank": 0, "world": 1} | change
    with pytest.raises(ValueError, match=message):
        TaskBatchSampler(DATA, "train", **options)


def test_a_task_without_pairs_is_an_error():
    with pytest.raises(ValueError, match="en-bb has no sentences"):
        TaskBatchSampler(invented({"en-aa": 5, "en-bb": 0}), "train", 100, 1.0, 10, 1)


@pytest.mark.parametrize("start", [61, -2, 3])
def test_a_start_that_is_none_is_an_error(start):
    sampler = TaskBatchSampler(DATA, "train", 100, 1.0, 60, 1, rank=1, world=2)
    sampler.start = start
    with pytest.raises(ValueError, match=f"start is {start}"):
        next(iter(sampler))


# Speed


def test_an_epoch_of_a_hundred_thousand_pairs_is_built_in_well_under_a_second():
    data = invented({"en-aa": 100_000})
    sampler = TaskBatchSampler(data, "train", 4096, 1.0, 100_000, 1)
    begun = time.process_time()
    sampler.batch(0)
    assert time.process_time() - begun < 1.0
    begun = time.process_time()
    sampler.batch(99_999)  # many epochs later: those between are not built
    assert time.process_time() - begun < 1.0


# Evaluation


@settings(max_examples=60, deadline=None)
@given(many, st.integers(0, 150))
def test_evaluation_batches_hold_the_first_pairs_once_within_the_budget(case, limit):
    data, _ = sampler_of(case)
    for number, task in enumerate(data.tasks):
        batches = evaluation_batches(data, "train", task, case["budget"], limit)
        size = data.size("train", task)
        assert sorted(itertools.chain(*batches)) == list(range(min(size, limit) if limit else size))
        for batch in batches:
            assert cost(data, [(number, pair) for pair in batch]) <= case["budget"] or len(batch) == 1
        assert batches == evaluation_batches(data, "train", task, case["budget"], limit)


def test_evaluation_batches_begin_with_the_longest():
    batches = evaluation_batches(DATA, "train", "en-aa", 300)
    longer = np.maximum(*DATA.lengths("train", "en-aa"))
    longest = [int(longer[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize(
    ("share", "limit", "count"), [(0.1, 0, 4), (0.5, 0, 20), (0.001, 0, 1), (0.5, 10, 5), (0.99, 0, 40)]
)
def test_a_share_of_the_text_is_spread_over_all_of_it(toy: Toy, share: float, limit: int, count: int) -> None:
    task = toy.data.tasks[0]
    chosen = sorted(i for batch in evaluation_batches(toy.data, "valid", task, 64, limit, share) for i in batch)
    assert len(chosen) == len(set(chosen)) == count
    size = limit or toy.data.size("valid", task)
    assert chosen[-1] < size
    gaps = [after - before for before, after in zip(chosen, chosen[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_temperature_that_changes_goes_from_one_to_the_other() -> None:
    sizes = {"en-aa": 900, "en-bb": 100, "en-cc": 10}
    data, tasks = invented(sizes), 40_000
    sampler = TaskBatchSampler(data, "train", 100, 1.0, tasks, 3, temperature_end=5.0)
    for start in (0, 18_000, 36_000):
        temperature = 1 + 4 * (start + 2000) / tasks
        drawn = np.bincount(sampler.plan[start : start + 4000], minlength=3) / 4000
        assert drawn == pytest.approx(list(probabilities_of(sizes, temperature).values()), abs=0.03)
    steady = TaskBatchSampler(data, "train", 100, 2.0, 500, 3)
    same = TaskBatchSampler(data, "train", 100, 2.0, 500, 3, temperature_end=2.0)
    assert list(same) == list(steady)


def test_a_curriculum_has_no_pair_above_its_competence_and_all_pairs_in_the_end() -> None:
    data, batches, start, until = invented({"en-aa": 900, "aa-en": 700}), 2000, 0.25, 0.5
    options: dict[str, Any] = {"competence": (start, until, "length")}
    sampler = TaskBatchSampler(data, "train", 300, 5.0, batches, 7, **options)
    rank = {}
    for number, task in enumerate(data.tasks):
        source = data.lengths("train", task)[0]
        order = np.argsort(source, kind="stable")
        rank[number] = np.empty(len(order))
        rank[number][order] = np.arange(1, len(order) + 1) / len(order)
    drawn, seen = list(sampler), Counter[tuple[int, int]]()
    for number, batch in enumerate(drawn):
        way = min(number / (until * batches), 1)
        competence = (way * (1 - start**2) + start**2) ** 0.5
        assert all(rank[task][pair] <= competence + 1 / len(rank[task]) for task, pair in batch)
        if number >= until * batches:
            seen.update(batch)
    for task, size in enumerate((900, 700)):
        times = [seen[task, pair] for pair in range(size)]
        assert min(times) > 0
        assert max(times) - min(times) <= 1  # an epoch has each pair once
    middle = [pair for batch in drawn[400:420] for pair in batch]
    assert max(rank[task][pair] for task, pair in middle) > 0.8 * (0.4 * (1 - start**2)) ** 0.5
    again = TaskBatchSampler(data, "train", 300, 5.0, batches, 7, **options)
    assert [again.batch(number) for number in (1999, 3, 640)] == [drawn[number] for number in (1999, 3, 640)]


def test_the_easiest_pairs_fill_micro_batches_however_few_they_may_be() -> None:
    data = invented({"en-aa": 500})
    first = TaskBatchSampler(data, "train", 600, 5.0, 1000, 7, competence=(0.001, 1.0, "length"))
    assert np.mean([cost(data, first.batch(number)) for number in range(20)]) > 0.7 * 600


def test_rarity_is_the_sum_of_what_the_tokens_of_a_sentence_tell() -> None:
    ids, offsets = np.array([4, 4, 4, 7, 4, 9, 9, 4]), np.array([0, 2, 4, 8])
    p = {4: 5 / 8, 7: 1 / 8, 9: 2 / 8}
    expected = [sum(-np.log(p[int(i)]) for i in ids[a:b]) for a, b in itertools.pairwise(offsets)]
    assert rarity(ids, offsets) == pytest.approx(expected)


def test_runs_of_one_direction_come_first_and_leave_the_rest_of_the_plan() -> None:
    plain = TaskBatchSampler(DATA, "train", 100, 5.0, 40, 7)
    runs = TaskBatchSampler(DATA, "train", 100, 5.0, 40, 7, runs=(5, 4))
    assert (runs.plan[20:] == plain.plan[20:]).all()
    assert all(len(set(runs.plan[i : i + 4].tolist())) == 1 for i in range(0, 20, 4))
    assert (runs.plan[:20:4] == plain.plan[:20:4]).all()
