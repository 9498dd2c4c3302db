"""What a run needs of the machine that it is on, looked at before hours of training.

Not part of :func:`nspec.run.checks.validate`: a run is also looked at and translated with on machines that could not
train it. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nspec.run.config import Config
from nspec.run.systems import config_of, masked_systems

_GIB = 2**30
_THREADS_PER_CORE = 4
_DEVICES = ("/dev/nvidia0", "/dev/kfd")  # of CUDA and of ROCm
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of main memory, used or free, that this process can have at most."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _LIMITS):
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdecimal():
            found.append(int(text))
    return min(found)


def parameters(config: Config) -> int:
    """Parameters of a new dense model: M2M100's, with one matrix for all embeddings; language tags are not counted."""
    model = config.model
    width, inner = model.d_model, model.d_ff
    attention, norm = 4 * (width * width + width), 2 * width
    block = 2 * width * inner + width + inner
    encoder = model.encoder_layers * (attention + block + 2 * norm) + norm
    decoder = model.decoder_layers * (2 * attention + block + 3 * norm) + norm
    return config.tokenizer.vocab_size * width + encoder + decoder


def check_threads(threads: int) -> None:
    """Whether so many threads can get anywhere.

    Raises:
        ValueError: more than four for each core.
    """
    most = _THREADS_PER_CORE * cores()
    if threads > most:
        raise ValueError(
            f"run.threads (--threads): expected at most {most}, {_THREADS_PER_CORE} for each of the {cores()} cores here, "
            f"found {threads}; 0 takes what PyTorch chooses"
        )


def check_machine(config: Config) -> None:
    """Threads, folders, and whether the dense model and its optimiser fit into memory at all.

    Weights, gradients and the two moments of Adam are float32, 16 bytes a parameter; with a GPU the weights alone must
    fit, as they are drawn on the CPU. Activations come on top and are not counted.

    Raises:
        ValueError: one does not hold; the message names the option.
    """
    check_threads(config.run.threads)
    for path in _other_text(config):
        if not Path(path).exists():
            raise ValueError(f"profile.path: {path} does not exist")
    if config.model.pretrained:
        return
    gpu = config.run.device != "cpu" and any(map(os.path.exists, _DEVICES))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    tables = 2 * 4 * config.model.max_positions * config.model.d_model  # sinusoids of encoder and decoder
    count, here = parameters(config), memory()
    needed = processes * ((4 if gpu else 16) * count + tables)
    if needed > here:
        what = "weights alone" if gpu else "weights, gradients and optimiser"
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"model.d_model, model.d_ff, model.encoder_layers, model.decoder_layers, model.max_positions, "
            f"tokenizer.vocab_size: {what} of {count:.3g} parameters{each} need {needed / _GIB:.1f} GiB, this machine has "
            f"{here / _GIB:.1f} GiB; make the model smaller"
        )


def _other_text(config: Config) -> Iterator[str]:
    for system in masked_systems(config):
        if path := config_of(config, system).profile.path:
            yield path


def quieten(threads: int = 0) -> None:
    """Keeps libraries from writing between the lines of a run, and sets PyTorch's threads (0: as it chooses).

    Raises:
        ValueError: more threads than can get anywhere here.
    """
    check_threads(threads)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
