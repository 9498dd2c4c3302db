from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy_translation import launch

from nspec import processes

SCRIPT = """
import json
import sys
from pathlib import Path
import torch
from nspec import processes

torch.distributed.init_process_group("gloo")
rank = processes.rank()
found = {
    "world": processes.world(),
    "sum": processes.all_sum([0.1 * (rank + 1), float(rank), 2.0**60 * (1 - 2 * rank)]),
    "gathered": processes.gather({"rank": rank}),
}
processes.barrier()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_every_process_gets_the_same_sums_and_values(tmp_path: Path) -> None:
    launch(SCRIPT, [str(tmp_path)], ranks=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["world"] == 2
    assert first["sum"] == [pytest.approx(0.3), 1.0, 0.0]
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_a_single_process_has_nothing_to_exchange() -> None:
    assert (processes.rank(), processes.world()) == (0, 1)
    assert processes.all_sum([1.5, 2.0]) == [1.5, 2.0]
    assert processes.gather("x") == ["x"]
    processes.barrier()


@pytest.mark.parametrize(
    ("wanted", "local", "gpus", "found"),
    [
        ("auto", 0, 0, "cpu"),
        ("cpu", 0, 2, "cpu"),
        ("auto", 1, 2, "cuda:1"),
        ("cuda", 0, 1, "cuda:0"),
    ],
)
def test_each_process_takes_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, wanted: str, local: int, gpus: int, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert str(processes.resolve_device(wanted)) == found


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda .* PyTorch sees 0 GPUs"):
        processes.resolve_device("cuda")
    with pytest.raises(ValueError, match="expected auto, cpu or cuda"):
        processes.resolve_device("tpu")
