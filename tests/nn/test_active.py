"""An active set on several devices."""

from __future__ import annotations

import pickle

import torch

from nspec.nn.active import ActiveSet

META = torch.device("meta")  # for want of a second device
MASK = torch.arange(200) % 3 == 0


def test_a_set_that_is_read_on_another_device_stays_where_it_is() -> None:
    for one in (ActiveSet(MASK), ActiveSet.stack([ActiveSet(MASK), ActiveSet(~MASK)])):
        copy = one.on(META)
        for name in ("active", "rows", "index", "union"):
            here, there = getattr(one, name), getattr(copy, name)
            assert (here.device.type, there.device.type) == ("cpu", "meta")
            assert (here.shape, here.dtype) == (there.shape, there.dtype)
        assert one.on(META) is copy
        assert copy.on(META) is copy
        assert one.on(torch.device("cpu")) is one


def test_copies_on_other_devices_are_not_saved() -> None:
    one = ActiveSet(MASK)
    one.on(META)
    assert b"meta" not in pickle.dumps(one)
    assert pickle.loads(pickle.dumps(one)).on(META).index.shape == one.index.shape


def test_a_compiled_function_gets_the_copy_too() -> None:
    torch._dynamo.reset()
    one = ActiveSet(MASK)

    @torch.compile(backend="eager", fullgraph=True)
    def width(x: torch.Tensor) -> torch.Tensor:
        return x + one.on(META).index.shape[1]

    for _ in range(2):
        assert torch.equal(width(torch.zeros(1)), torch.tensor([float(one.index.shape[1])]))
