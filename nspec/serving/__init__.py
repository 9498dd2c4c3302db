"""A model for serving one task: plain, and without the neurons that the task does not use."""

from .card import densities, model_card, widths

__all__ = ["densities", "model_card", "widths"]
