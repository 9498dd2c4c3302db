"""Which sentences make which micro-batch: temperature, token budget, similar lengths, one direction or several.

A micro-batch is one chunk, or several that are drawn alike. The plan is a function of (seed, number of the chunk) alone:

- The directions of chunks are drawn independently, p ~ n^(1/T) with n the number of sentences.
- A direction's sentences are sorted into cells of similar source and target lengths, the cells into a fixed order, and that
  sequence cut into batches by the largest lengths of the cells in them. So the cuts hold for every epoch, and the j-th
  chunk of a direction is batch ``j mod b`` of epoch ``j div b``, with b its batches: nothing before it has to be
  computed, which is what makes resuming exact and free.
- Where the temperature changes, it goes from the first micro-batch to the last in a straight line. Where there is a
  curriculum (:mod:`nspec.mt.text.competence`), each of its steps has cuts and epochs of its own.
- Each epoch shuffles the sentences within their cells and the order of the batches, with Philox keyed by (seed, direction,
  epoch). Every pair comes once an epoch.

Random numbers are used as uniform doubles and sorted, the most stable part of NumPy's generators.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nspec.mt.text.competence import Competence, rarity
from nspec.mt.text.prepared import Examples, Ids

__all__ = ["Examples", "LengthSource", "TaskBatchSampler", "evaluation_batches", "probabilities_of"]

CELL_RATIO = 1.15
"""Lengths in one cell differ by less than this factor: about 5 % of a batch is padding, and shuffling has room."""

Index = npt.NDArray[np.int64]


class LengthSource(Protocol):
    """What is needed of :class:`nspec.mt.text.prepared.PreparedData` here."""

    tasks: list[str]

    def size(self, split: str, task: str) -> int:
        """Number of sentences."""

    def lengths(self, split: str, task: str) -> tuple[Ids, Ids]:
        """Source and target lengths, int64 [n] each."""


class TextSource(LengthSource, Protocol):
    """What a sampler needs of it."""

    def source_ids(self, split: str, task: str) -> tuple[npt.NDArray[Any], Ids]:
        """Source tokens of all pairs, [tokens], and where each pair's begin, int64 [n + 1]; for a curriculum by rarity."""


def probabilities_of(sizes: dict[str, int], temperature: float) -> dict[str, float]:
    """How often each direction is drawn: p ~ n^(1/T), with n its sentences.

    Raises:
        ValueError: a temperature that is not positive, or a direction without sentences.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0 (1: in proportion, inf: all alike)")
    if empty := [task for task, size in sizes.items() if size < 1]:
        raise ValueError(f"{empty[0]} has no sentences to sample from")
    logs = np.log(list(sizes.values())) / temperature
    weights = np.exp(logs - logs.max())
    return dict(zip(sizes, (weights / weights.sum()).tolist()))


class TaskBatchSampler:
    """A batch sampler for a DataLoader over :class:`nspec.mt.text.prepared.Examples`.

    Args:
        data: the prepared text.
        split: usually ``train``.
        batch_tokens: most tokens of a micro-batch, padding counted: sentences x (longest source + longest target). A
            pair that is longer than that comes alone. With several chunks it is shared out evenly, and what the
            shorter chunks are padded to the longest is not counted.
        temperature: of the sampling over directions.
        micro_batches: of the whole plan, over all ranks. A longer plan begins with the shorter one.
        seed: of the plan.
        rank: of this process; it gets micro-batches rank, rank + world, ... of the one plan.
        world: number of processes.
        tasks_per_batch: chunks of a micro-batch, each of one direction.
        temperature_end: the temperature of the last micro-batch, where it changes. The longer plan is another one then.
        runs: (n, k): the first n times k micro-batches come in runs of k of one direction.
        competence: ``start``, ``until`` and ``difficulty`` (``rarity`` or ``length``) of a curriculum, see
            :class:`~nspec.mt.training.config.CurriculumConfig`. The longer plan is another one then.

    Attributes:
        probabilities: how often each direction is drawn; at the start, where that changes.
        plan: int64 [micro_batches x tasks_per_batch], the task index of each chunk.
        start: number of micro-batches of the plan (over all ranks) that are done: iteration begins there.

    Raises:
        ValueError: an option out of its range, micro_batches that the ranks do not divide, or an empty direction.
    """

    def __init__(
        self,
        data: TextSource,
        split: str,
        batch_tokens: int,
        temperature: float,
        micro_batches: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        tasks_per_batch: int = 1,
        *,
        temperature_end: float | None = None,
        runs: tuple[int, int] = (0, 1),
        competence: tuple[float, float, str] | None = None,
    ) -> None:
        if batch_tokens < 1 or micro_batches < 1 or seed < 0:
            raise ValueError(
                f"batch_tokens is {batch_tokens}, micro_batches {micro_batches}, seed {seed}; "
                "expected at least 1, 1 and 0"
            )
        if not 1 <= tasks_per_batch <= batch_tokens:
            raise ValueError(
                f"tasks_per_batch is {tasks_per_batch}; expected at least 1 and at most batch_tokens ({batch_tokens})"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank} of {world} processes; expected 0 to {world - 1}")
        if micro_batches % world:
            raise ValueError(
                f"{micro_batches} micro-batches cannot be shared out evenly to {world} processes; "
                "take a multiple (updates x accumulate)"
            )
        self.tasks = list(data.tasks)
        self.seed, self.rank, self.world, self.micro_batches = seed, rank, world, micro_batches
        self.tasks_per_batch = tasks_per_batch
        sizes = {task: data.size(split, task) for task in self.tasks}
        self.probabilities = probabilities_of(sizes, temperature)
        self.plan = self._draw_tasks()
        if temperature_end is not None:
            self.plan = self._draw_changing(sizes, temperature, temperature_end)
        runs_end, length = math.prod(runs) * tasks_per_batch, runs[1] * tasks_per_batch
        self.plan[:runs_end] = np.repeat(self.plan[:runs_end:length], length)
        self.start = 0
        self._settings = {"seed": seed, "batch_tokens": batch_tokens, "temperature": temperature, "sizes": sizes}
        self._settings["tasks_per_batch"] = tasks_per_batch
        self._data, self._split, self._budget = data, split, batch_tokens // tasks_per_batch
        self._step = np.zeros(len(self.plan), dtype=np.int64)
        self._competence: Competence | None = None
        if competence is not None:
            start, until, by = competence
            self._competence = Competence(start, until, micro_batches, lambda task: self._difficulty(task, by))
            self._step = np.repeat(self._competence.steps(np.arange(micro_batches)), tasks_per_batch)
        self._occurrence = _occurrences(self._step * len(self.tasks) + self.plan)
        self._batches: list[tuple[int, _TaskBatches] | None] = [None] * len(self.tasks)

    def _draw_tasks(self) -> Index:
        draws = _uniform(self.seed, "tasks", 0, self.micro_batches * self.tasks_per_batch)
        edges = np.cumsum(list(self.probabilities.values()))
        found = np.searchsorted(edges, draws, side="right")
        return np.minimum(found, len(self.tasks) - 1).astype(np.int64)  # rounding may leave the last edge below 1

    def _draw_changing(self, sizes: dict[str, int], first: float, last: float) -> Index:
        """The same where the temperature goes from the first to the last micro-batch in a straight line."""
        draws = _uniform(self.seed, "tasks", 0, self.micro_batches * self.tasks_per_batch)
        found = np.empty(len(draws), dtype=np.int64)
        for number in range(self.micro_batches):
            temperature = first + (last - first) * number / max(self.micro_batches - 1, 1)
            edges = np.cumsum(list(probabilities_of(sizes, temperature).values()))
            chunk = slice(number * self.tasks_per_batch, (number + 1) * self.tasks_per_batch)
            found[chunk] = np.searchsorted(edges, draws[chunk], side="right")
        return np.minimum(found, len(self.tasks) - 1)

    def _difficulty(self, task: str, by: str) -> npt.NDArray[np.number]:
        if by == "length":
            return self._data.lengths(self._split, task)[0]
        return rarity(*self._data.source_ids(self._split, task))

    def __len__(self) -> int:
        """Micro-batches of this rank in the whole plan, wherever :attr:`start` is."""
        return self.micro_batches // self.world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's micro-batches from :attr:`start` on.

        Raises:
            ValueError: ``start`` is outside the plan, or not between two rounds of all ranks.
        """
        if not 0 <= self.start <= self.micro_batches or self.start % self.world:
            raise ValueError(
                f"start is {self.start}; expected a multiple of the {self.world} processes up to {self.micro_batches}"
            )
        for number in range(self.start + self.rank, self.micro_batches, self.world):
            yield self.batch(number)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """(Task index, sentence index) of all sentences in micro-batch ``number`` of the plan, those of a task together."""
        first = number * self.tasks_per_batch
        chunks = sorted(range(first, first + self.tasks_per_batch), key=self.plan.__getitem__)
        return [key for chunk in chunks for key in self._chunk(chunk)]

    def _chunk(self, number: int) -> list[tuple[int, int]]:
        task, step = int(self.plan[number]), int(self._step[number])
        held = self._batches[task]
        if held is None or held[0] != step:
            held = self._batches[task] = step, self._batches_of(self.tasks[task], step)
        return [(task, pair) for pair in held[1].get(int(self._occurrence[number])).tolist()]

    def _batches_of(self, task: str, step: int) -> _TaskBatches:
        source, target = self._data.lengths(self._split, task)
        if self._competence is None:
            return _TaskBatches(source, target, self._budget, self.seed, task)
        kept = self._competence.kept(step, task, source, target, self._budget)
        return _TaskBatches(source[kept], target[kept], self._budget, self.seed, f"{task} {step}", kept)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on at :attr:`start`; set that to the micro-batches done first."""
        return {"start": self.start, **self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another sampler was, on any number of ranks.

        Raises:
            ValueError: that one had other settings or data, so its plan was another one.
        """
        for name, value in self._settings.items():
            if state.get(name) != value:
                raise ValueError(f"the sampler to go on from had {name} {state.get(name)!r}, this one has {value!r}")
        self.start = int(state["start"])


class _TaskBatches:
    """The batches of one direction, by their number counted through all epochs.

    Args:
        source: int64 [n], lengths.
        target: int64 [n], lengths.
        budget: tokens of a batch.
        seed: of the shuffling.
        task: the direction, or what tells it from others that are shuffled.
        names: int64 [n], what the pairs are called; None: their numbers.
    """

    def __init__(self, source: Ids, target: Ids, budget: int, seed: int, task: str, names: Index | None = None) -> None:
        self.names = np.arange(len(source)) if names is None else names
        self.cell, longest_source, longest_target = _cells(source, target)
        in_order = np.sort(self.cell)
        self.edges = _cut(longest_source[in_order], longest_target[in_order], budget)
        self.seed, self.task, self.epoch = seed, task, -1
        self.order = self.turns = np.empty(0, dtype=np.int64)

    def get(self, number: int) -> Index:
        """int64 [sentences], those in batch ``number``."""
        epoch, turn = divmod(number, len(self.edges) - 1)
        if epoch != self.epoch:
            draws = _uniform(self.seed, self.task, epoch, len(self.cell) + len(self.edges) - 1)
            self.order = np.lexsort((draws[: len(self.cell)], self.cell))
            self.turns = np.argsort(draws[len(self.cell) :], kind="stable")
            self.epoch = epoch
        batch = int(self.turns[turn])
        return self.names[self.order[self.edges[batch] : self.edges[batch + 1]]]


def _occurrences(kinds: Index) -> Index:
    """How often what stands at each place stood before it: int64 [n]."""
    order = np.argsort(kinds, kind="stable")
    starts = np.flatnonzero(np.diff(kinds[order], prepend=-1))
    found = np.empty(len(kinds), dtype=np.int64)
    found[order] = np.arange(len(kinds)) - np.repeat(starts, np.diff(starts, append=len(kinds)))
    return found


def _uniform(seed: int, what: str, epoch: int, count: int) -> npt.NDArray[np.float64]:
    key = np.random.SeedSequence([seed, zlib.crc32(what.encode()), epoch])
    return np.random.Generator(np.random.Philox(key)).random(count)


def _cells(source: Ids, target: Ids) -> tuple[Index, Index, Index]:
    """Sorts sentences into cells of similar lengths.

    Returns:
        int64 [n], the number of each pair's cell; int64 [cells] each, the longest source and target in a cell. Cells
        that follow one another are similar: target lengths grow, source lengths grow and shrink in turns.
    """
    rows, columns = (np.floor(np.log(lengths) / math.log(CELL_RATIO)).astype(np.int64) for lengths in (target, source))
    columns = np.where(rows % 2, columns.max() - columns, columns)
    _, cell = np.unique(rows * (columns.max() + 1) + columns, return_inverse=True)
    cell = cell.reshape(-1).astype(np.int64)
    longest = []
    for lengths in (source, target):
        most = np.zeros(cell.max() + 1, dtype=np.int64)
        np.maximum.at(most, cell, lengths)
        longest.append(most)
    return cell, longest[0], longest[1]


def _cut(source: Ids, target: Ids, budget: int) -> Index:
    """Cuts a sequence of sentences into batches as large as the budget allows, from left to right.

    Returns:
        int64 [batches + 1], where each begins, and the end.
    """
    edges = [0]
    guess = 1
    while edges[-1] < len(source):
        begin, width = edges[-1], 2 * guess
        while True:
            part = slice(begin, begin + width)
            tallest = np.maximum.accumulate(source[part]) + np.maximum.accumulate(target[part])
            # Grows with the number of sentences, so what fits is a beginning.
            fitting = int(np.searchsorted(tallest * np.arange(1, len(tallest) + 1), budget, side="right"))
            if fitting < width or begin + width >= len(source):
                break
            width *= 2
        guess = max(fitting, 1)  # a pair that is too long by itself comes alone
        edges.append(begin + min(guess, len(source) - begin))
    return np.array(edges, dtype=np.int64)


def evaluation_batches(
    data: LengthSource, split: str, task: str, batch_tokens: int, limit: int = 0, share: float = 1.0
) -> list[list[int]]:
    """Batches of similar lengths for profiling and loss, longest first; always the same.

    Args:
        data: the prepared text.
        split: ``valid``, ``test`` or ``train``.
        task: the direction.
        batch_tokens: most tokens of a batch, padding counted: sentences x (longest source + longest target). A pair
            that is longer comes alone.
        limit: only the first so many sentences; 0: all.
        share: of these, in (0, 1]; evenly spread over them, one at least.

    Returns:
        Pair indices, each exactly once.
    """
    source, target = (lengths[: limit or None] for lengths in data.lengths(split, task))
    if share < 1 and len(source):
        chosen = np.unique((np.arange(max(1, round(share * len(source)))) / share).astype(np.int64))
        chosen = chosen[chosen < len(source)]
        batches = _batched(source[chosen], target[chosen], batch_tokens)
        return [chosen[batch].tolist() for batch in batches]
    return _batched(source, target, batch_tokens)


def _batched(source: Ids, target: Ids, batch_tokens: int) -> list[list[int]]:
    # Longest first, so that what does not fit into memory shows at once; the longer side decides.
    order = np.lexsort((np.arange(len(source)), target - source, -np.maximum(source, target)))
    edges = _cut(source[order], target[order], batch_tokens)
    return [order[begin:end].tolist() for begin, end in itertools.pairwise(edges)]
