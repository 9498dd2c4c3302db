from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_translation import TASKS, Toy, launch

import nspec
from nspec.mt.config import ProfileConfig
from nspec.mt.profiling import profile_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = ["model.encoder.layers.0", "model.decoder.layers.0"]


def by_hand(toy: Toy, model: Any, task: str, sentences: int, split: str = "valid") -> dict[str, torch.Tensor]:
    """Counts of each sentence by itself, which has no padding: a hook on fc2's input."""
    counts = {f"{layer}.fc1": torch.zeros(64, dtype=torch.int64) for layer in LAYERS}
    hooks = []
    for layer in LAYERS:

        def count(_: Any, inputs: Any, layer: str = layer) -> None:
            counts[f"{layer}.fc1"] += inputs[0].reshape(-1, 64).gt(0).sum(0)

        hooks.append(model.get_submodule(f"{layer}.fc2").register_forward_pre_hook(count))
    for i in range(sentences):
        source, target = (torch.from_numpy(ids)[None] for ids in toy.data.ids(split, task, i))
        shifted = torch.cat([target.new_tensor([[2]]), target[:, :-1]], 1)
        with torch.no_grad():
            model(input_ids=source, decoder_input_ids=shifted)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(("sentences", "split"), [(0, "valid"), (11, "valid"), (25, "train")])
def test_counts_are_those_of_the_sentences_one_by_one(toy: Toy, sentences: int, split: str) -> None:
    model = toy.model().eval()
    counts = profile_tasks(model, toy.data, ProfileConfig(sentences=sentences, split=split), batch_tokens=150)
    assert counts.tasks == TASKS
    for task in TASKS:
        expected = by_hand(toy, model, task, sentences or 40, split)
        assert counts[task].keys() == expected.keys()
        for layer, count in expected.items():
            assert torch.equal(counts[task][layer], count)


def test_padding_counts_where_that_is_asked_for(toy: Toy) -> None:
    model = toy.model()
    real = profile_tasks(model, toy.data, ProfileConfig(), 400)
    padded = profile_tasks(model, toy.data, ProfileConfig(padding="include"), 400)
    more = [padded[task][layer].sum() - real[task][layer].sum() for task in TASKS for layer in real.layers]
    assert min(more) >= 0
    assert max(more) > 0


def test_progress_counts_the_batches_of_all_directions(toy: Toy) -> None:
    calls: list[tuple[str, int, int]] = []
    profile_tasks(toy.model(), toy.data, ProfileConfig(), 150, progress=lambda *call: calls.append(call))
    done = [number for _, number, _ in calls]
    assert done == list(range(1, calls[0][2] + 1))
    assert list(dict.fromkeys(task for task, _, _ in calls)) == TASKS


def test_a_specialised_model_is_profiled_dense_and_left_in_its_mode(toy: Toy) -> None:
    model = toy.model().train()
    expected = profile_tasks(model, toy.data, ProfileConfig(sentences=8), 400)
    nspec.specialize(model, toy.masks(), mode="forward")
    found = profile_tasks(model, toy.data, ProfileConfig(sentences=8), 400)
    assert model.training
    assert all(torch.equal(found[task][layer], expected[task][layer]) for task in TASKS for layer in expected.layers)


SHARED = """
import sys
import torch
from toy_translation import Toy
from pathlib import Path
from nspec.mt.config import ProfileConfig
from nspec.mt.profiling import profile_tasks

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
toy = Toy(Path(sys.argv[1]))
for name, sentences, batch_tokens in [("many", 0, 150), ("few", 3, 4096)]:
    counts = profile_tasks(toy.model(), toy.data, ProfileConfig(sentences=sentences), batch_tokens)
    if torch.distributed.get_rank() == 0:
        counts.save(toy.folder / f"counts-{name}")
torch.distributed.destroy_process_group()
"""


def test_several_processes_count_what_one_counts(toy: Toy) -> None:
    """Also with fewer batches than processes, where some have nothing to count."""
    alone = {
        "many": profile_tasks(toy.model(), toy.data, ProfileConfig(), 150),
        "few": profile_tasks(toy.model(), toy.data, ProfileConfig(sentences=3), 4096),
    }
    launch(SHARED, [str(toy.folder)], ranks=2)
    for name, expected in alone.items():
        found = nspec.ActivationCounts.load(Path(toy.folder) / f"counts-{name}")
        assert found.tasks == expected.tasks
        assert found.tokens == expected.tokens
        assert all(
            torch.equal(found[t][layer], expected[t][layer]) for t in expected.tasks for layer in expected.layers
        )
