"""Scratch memory is kept between calls, grows, and is a thread's own."""

from __future__ import annotations

import threading

import torch

from nspec.kernels.common.workspace import workspace


def test_a_block_is_used_again_and_grows() -> None:
    first = workspace("test", (3, 4), torch.float32)
    assert first.shape == (3, 4)
    assert first.is_contiguous()
    assert workspace("test", (5,), torch.bfloat16).data_ptr() == first.data_ptr()
    larger = workspace("test", (100, 100), torch.float32).fill_(1)
    assert workspace("other", (100, 100), torch.float32).data_ptr() != larger.data_ptr()
    assert workspace("test", (0, 7), torch.float32).shape == (0, 7)


def test_threads_do_not_share_blocks() -> None:
    mine = workspace("test", (10,), torch.float32).fill_(1)
    thread = threading.Thread(target=lambda: workspace("test", (10,), torch.float32).fill_(2))
    thread.start()
    thread.join()
    assert (mine == 1).all()
