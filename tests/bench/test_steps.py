"""The training-step benchmark: its rows, its check of what it times, and what it concludes. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import nspec
from bench import release
from bench.report.summary import STEP_PARTS
from bench.rows import TIMES, Row, read
from bench.steps import __main__ as steps
from bench.steps import model as step_model
from bench.steps.check import TOLERANCE, check
from bench.steps.model import BASE, build, draw_masks, random_batches, tiny
from bench.steps.systems import System, held_bytes, mask_bytes, release_bytes

CPU = torch.device("cpu")
SHAPE = tiny(BASE)
COMMON = {"kind", "device", "device_type", "torch", "commit", "date", "shape", "scaled", "d_model", "d_ff", "heads"}
COMMON |= {"encoder_layers", "decoder_layers", "vocabulary", "tokens", "rounds", "dtype", "system", "tasks", "density"}
COMMON |= {"mask_bytes", *TIMES}
STEP = {"batch", "tasks_in_batch", "optimizer", "baseline", "tokens_per_second", "parts", "feed_forward_share"}
STEP |= {"peak_bytes"}
GROWTH = {"computed", "specialize_seconds", "task_switch_microseconds"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows of one smoke run."""
    path: Path = tmp_path_factory.mktemp("steps") / "rows.jsonl"
    threads = torch.get_num_threads()
    try:
        assert steps.main(["--set", "smoke", "--device", "cpu", "--threads", "1", "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    return read([path])


def test_smoke_run_has_a_row_for_every_system_batch_and_density(smoke: list[Row]) -> None:
    found = {(r["shape"], r["system"], r["optimizer"], r["batch"], r["density"]) for r in smoke if r["kind"] == "step"}
    expected = set()
    for shape in ("base", "big"):
        expected |= {(shape, "dense", "adamw", "pure", 1.0), (shape, "release", "adamw", "pure", 0.5)}
        for system in ("forward", "update"):
            for optimizer in ("adamw", "row_sparse_adamw"):
                expected |= {(shape, system, optimizer, batch, 0.5) for batch in ("pure", "mixed")}
            expected.add((shape, system, "adamw", "pure", 1.0))
    assert found == expected


def test_smoke_rows_have_every_field_with_a_value_that_makes_sense(smoke: list[Row]) -> None:
    for row in smoke:
        assert set(row) >= COMMON | (STEP if row["kind"] == "step" else GROWTH), row
    for row in (row for row in smoke if row["kind"] == "step"):
        assert set(row["parts"]) == set(STEP_PARTS)
        assert row["scaled"]
        assert row["milliseconds"] > 0
        assert row["rounds"] >= 3
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["milliseconds"], rel=0.01)
        assert (row["peak_bytes"] is None) == (row["density"] == 1.0 and row["system"] != "dense")
        assert (row["mask_bytes"] == 0) == (row["system"] == "dense")
        assert row["tasks_in_batch"] == (8 if row["batch"] == "mixed" else 1)
        assert sum(row["parts"].values()) > 0
    dense = [row for row in smoke if row["kind"] == "step" and row["system"] == "dense"]
    assert [row["speedup"] for row in dense] == [1.0, 1.0]


def test_growth_rows_say_what_was_computed_and_not_measured(smoke: list[Row]) -> None:
    rows = {(r["system"], r["tasks"]): r for r in smoke if r["kind"] == "tasks"}
    assert set(rows) == {(s, n) for s in ("release", "forward", "update") for n in (2, 5, 1000)}
    assert [key for key, row in rows.items() if row["computed"]] == [("release", 1000)]
    computed = rows["release", 1000]
    assert computed["mask_bytes"] == 1000 * 4 * 128 * 32
    assert computed["milliseconds"] is computed["task_switch_microseconds"] is computed["specialize_seconds"] is None
    for key, row in rows.items():
        if not row["computed"]:
            assert row["specialize_seconds"] >= 0 < row["task_switch_microseconds"]
            assert row["milliseconds"] > 0
            assert row["mask_bytes"] == pytest.approx(key[1] * rows[key[0], 2]["mask_bytes"] / 2, rel=0.1)
    assert json.loads(json.dumps(smoke)) == smoke  # no NaN, which JSON does not have


@pytest.fixture  # of its own for each test: checking a system takes a step with it
def parts() -> tuple[System, dict[str, System], list[step_model.Batch], dict[str, dict[str, torch.Tensor]]]:
    """A float64 model as dense, the release's and ours; its batches and masks."""
    model, masks = build(SHAPE, CPU).double(), draw_masks(SHAPE, 0.5, 4)
    make = lambda kind, optimizer: System(kind, model, masks, optimizer, torch.float64)
    kinds = [("release", "adamw")] + [(kind, o) for kind in ("forward", "update") for o in steps.OPTIMIZERS]
    return make("dense", "adamw"), {f"{k}, {o}": make(k, o) for k, o in kinds}, random_batches(SHAPE, CPU), masks


def in_turn(masks: dict[str, dict[str, torch.Tensor]]) -> list[str]:
    return [list(masks)[place % len(masks)] for place in range(SHAPE.sentences)]


def test_all_systems_compute_the_same_as_plain_pytorch(parts) -> None:
    dense, systems, batches, masks = parts
    assert TOLERANCE[torch.float64] <= 1e-9
    before = {name: p.clone() for name, p in dense.model.named_parameters()}
    assert check(dense, systems, batches[0], next(iter(masks)), in_turn(masks), masks) == {}
    assert all(bool((p == before[name]).all()) for name, p in dense.model.named_parameters()), "checked, not changed"


def other(masks: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """The same masks but for one neuron of one layer of each task."""
    layer = SHAPE.layers[-1]
    changed = {task: {name: mask.clone() for name, mask in layers.items()} for task, layers in masks.items()}
    for layers in changed.values():
        layers[layer][0] = ~layers[layer][0]
    return changed


@pytest.mark.parametrize("kind", ["release", "forward", "update"])
def test_check_finds_a_system_with_one_wrong_neuron(parts, kind: str) -> None:
    dense, _, batches, masks = parts
    wrong = System(kind, dense.model, other(masks), dtype=torch.float64)
    mixed = None if kind == "release" else in_turn(masks)
    assert set(check(dense, {"wrong": wrong}, batches[0], next(iter(masks)), mixed, masks)) == {"wrong"}


def test_check_finds_a_system_that_forgets_the_constant_of_masked_neurons(parts) -> None:
    dense, _, batches, masks = parts
    system = System("release", dense.model, masks, dtype=torch.float64)
    for name in SHAPE.layers:
        system.model.get_submodule(name).register_forward_hook(lambda fc1, _, h: h * fc1.mask[:, 0])
    assert "wrong" in check(dense, {"wrong": system}, batches[0], next(iter(masks)), None, masks)


def test_check_finds_an_optimiser_that_moves_rows_of_other_tasks(parts) -> None:
    dense, _, batches, masks = parts
    system = System("forward", dense.model, masks, dtype=torch.float64)
    system.optimizer_name = "row_sparse_adamw"  # it has AdamW, with momentum of another task
    system.step(batches[0], list(masks)[1])
    found = check(System("dense", system.model, {}), {}, batches[0], next(iter(masks)), None, masks)
    assert found == {}
    stepped = System("dense", dense.model, {}, dtype=torch.float64)
    stepped.model.load_state_dict(system.model.state_dict())
    assert "rows of model." in check(stepped, {"it": system}, batches[0], next(iter(masks)), None, masks)["it"]


def test_a_wrong_system_is_not_timed_and_the_run_fails(monkeypatch, tmp_path: Path, capsys) -> None:
    """The release's masks are inverted behind the benchmark's back."""
    right = release.mask_weights
    inverted = lambda masks: {task: {k: ~m for k, m in rows.items()} for task, rows in masks.items()}
    monkeypatch.setattr(release, "mask_weights", lambda model, masks: right(model, inverted(masks)))
    path = tmp_path / "rows.jsonl"
    run = ["--set", "smoke", "--shapes", "base", "--densities", "0.5", "--dtypes", "float32", "--tasks", "0"]
    assert steps.main([*run, "--systems", "release", "update", "--device", "cpu", "--json", str(path)]) == 1
    assert "release, adamw is WRONG and is not timed" in capsys.readouterr().out
    assert {row["system"] for row in read([path])} == {"dense", "update"}


def test_release_style_masking_refuses_a_mixed_batch(parts) -> None:
    _, systems, batches, masks = parts
    with pytest.raises(ValueError, match="of one task"):
        systems["release, adamw"].step(batches[0], in_turn(masks))


def test_mask_memory_is_counted_without_the_parameters() -> None:
    model, masks = build(SHAPE, CPU), draw_masks(SHAPE, 0.5, 3)
    assert held_bytes(model) == 0
    assert mask_bytes("dense", SHAPE, model, masks) == 0
    release = System("release", model, masks)
    assert held_bytes(release.model) == mask_bytes("release", SHAPE, model, masks) == release_bytes(SHAPE, 3)
    least = 3 * len(SHAPE.layers) * SHAPE.d_ff
    own = mask_bytes("forward", SHAPE, model, masks)
    assert least <= own < least + 3 * len(SHAPE.layers) * (3 * 8 * SHAPE.d_ff)
    assert not any(isinstance(module, nspec.MaskedLinear) for module in model.modules())
