"""How much each attention head of a run's dense model matters to each direction, on its validation text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nspec.analysis.heads import HeadImportance, head_importance


def measure_heads(run: Path, sentences: int) -> HeadImportance:
    """Measures the dense model of a run with teacher forcing.

    Args:
        run: a run folder with ``prepared`` and ``systems/dense/model``.
        sentences: validation sentences of each direction, at most.

    Raises:
        ValueError: the text or the model is not there.
    """
    from nspec.mt import options
    from nspec.mt.collate import collate
    from nspec.mt.data import PairDataset, PreparedData
    from nspec.mt.display import Display
    from nspec.mt.distributed import resolve_device
    from nspec.mt.model import load_system
    from nspec.mt.sampling import evaluation_batches

    config = options.parse((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
    data = PreparedData(run / "prepared")
    model, _ = load_system(run / "systems" / "dense" / "model", resolve_device(config.run.device))
    pairs, tokens = PairDataset(data, "valid"), config.train.batch_tokens
    plans = {task: evaluation_batches(data, "valid", task, tokens, limit=sentences) for task in data.tasks}

    def batches(number: int, task: str) -> Iterator[dict[str, Any]]:
        for plan in plans[task]:
            batch = collate([pairs[number, example] for example in plan])
            del batch["task"]
            yield batch

    total, done = sum(map(len, plans.values())), 0
    with Display().bar("attention heads") as progress:

        def note(task: str, _: int) -> None:
            nonlocal done
            done += 1
            progress(task, done, total)

        inputs = {task: batches(number, task) for number, task in enumerate(data.tasks)}
        return head_importance(model, inputs, progress=note)
