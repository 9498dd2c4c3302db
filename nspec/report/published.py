"""Numbers that the paper's authors published, to draw beside those of a run.

Source: Tan, Wu, Monz, *Neuron Specialization*, EMNLP 2024 (arXiv 2404.11201), with the outputs and figures of the
authors' release: models of 6 + 6 layers, d_model 1024, d_ff 4096, on EC30 (30 languages and English, 60 directions).
Lists are of layers from bottom to top; ``from`` is en→x and ``to`` is x→en.
"""

from __future__ import annotations

SOURCE = "Tan, Wu and Monz, Neuron Specialization, EMNLP 2024 (arXiv 2404.11201), models of EC30"

MASKED_K = 0.95
"""The k of :data:`MASKED`."""

MASKED: dict[tuple[str, str], list[float]] = {
    ("from", "encoder"): [0.250, 0.209, 0.217, 0.225, 0.206, 0.179],
    ("from", "decoder"): [0.172, 0.205, 0.223, 0.254, 0.291, 0.279],
    ("to", "encoder"): [0.295, 0.213, 0.206, 0.214, 0.205, 0.176],
    ("to", "decoder"): [0.211, 0.209, 0.201, 0.187, 0.237, 0.289],
}
"""Share of the rows of fc1 that are masked, mean over directions, by direction type and side."""

IOU_K = 0.70
"""The k of :data:`IOU`."""

IOU: dict[tuple[str, str], list[float]] = {
    ("to", "encoder"): [0.377, 0.479, 0.526, 0.591, 0.630, 0.655],
    ("from", "decoder"): [0.522, 0.497, 0.414, 0.299, 0.241, 0.259],
}
"""Mean IoU of the masks of two directions, by direction type and side: the two that were published."""
