"""Validation losses of one run as means over directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from fabricated_run import TASKS, make_run

from nspec.files import write_text
from nspec.report.losses import mean_losses, section
from nspec.report.run_data import load_run


def with_losses(run: Path, system: str, add: float, tasks: list[str] = TASKS) -> None:
    """The best checkpoint of the fabricated runs is that of update 300."""
    rows = [
        {
            "step": step,
            "valid_loss": 2.0,
            "loss_of": "text",
            "tasks": {t: {"loss": worse + number + add} for number, t in enumerate(tasks)},
        }
        for step, worse in ((100, 5.0), (300, 1.0))
    ]
    write_text(run / "systems" / system / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_has_losses_of_the_best_checkpoint_and_differences_from_the_baseline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", systems=["dense", "continued", "forward"], scored=["continued", "forward"])
    assert section(load_run(run)) is None
    with_losses(run, "continued", 0.0)
    log = run / "systems" / "continued" / "log.jsonl"
    write_text(log, log.read_text().replace('"loss_of": "text", ', ""))
    assert mean_losses(load_run(run), "continued") == {}  # of an older version, which counted the target's tag
    with_losses(run, "continued", 0.0)
    with_losses(run, "forward", -0.125)
    with_losses(run, "dense", 1.0, TASKS[:-1])  # of a direction it is not known
    data = load_run(run)
    means = mean_losses(data, "continued")
    losses = {task: 1.0 + TASKS.index(task) for task in data.tasks}
    from_pivot = [loss for task, loss in losses.items() if task.startswith("en-")]
    assert means["from_en"] == pytest.approx(sum(from_pivot) / len(from_pivot))
    assert means["all"] == pytest.approx(sum(losses.values()) / len(losses))
    assert mean_losses(data, "dense") == {}
    found = section(data)
    assert found is not None
    assert [head["name"] for head in found["heads"]] == ["all directions", "en→x", "x→en"]
    first, second = found["rows"]
    assert (first["is_baseline"], first["cells"][0]["change"]) == (True, "")
    assert second["cells"][1] == {"loss": f"{means['from_en'] - 0.125:.3f}", "change": "−0.125"}
