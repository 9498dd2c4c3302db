"""What the command lines have in common: set, device, threads, result file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.cases import SETS
from bench.machine import device_name, pick_device
from bench.rows import Writer


def parser(name: str, text: str | None, default: str = "quick", *without: str) -> argparse.ArgumentParser:
    """The command line of ``python -m NAME`` with these options but ``without``; ``default`` of ``--set``."""
    made = argparse.ArgumentParser(
        prog=f"python -m {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if "set" not in without:
        made.add_argument("--set", choices=SETS, default=default, help=f"how much is measured (default: {default})")
    if "device" not in without:
        made.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    if "threads" not in without:
        made.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    if "json" not in without:
        made.add_argument("--json", type=Path, metavar="FILE", help="file that rows are appended to")
    return made


def share(text: str) -> float:
    """A number in (0, 1], as an option's type."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def count(text: str) -> int:
    """A whole number of 1 or more, as an option's type."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def device_of(made: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """The device that is asked for, which has to be there."""
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return pick_device(args.device)
    except (ValueError, RuntimeError) as error:
        made.error(str(error).splitlines()[0])


def started(made: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[torch.device, Writer]:
    """The device and the writer of rows that are asked for; says what is measured on."""
    device = device_of(made, args)
    print(f"{device_name(device)}, torch {torch.__version__}", flush=True)
    return device, Writer(args.json, device)
