"""See ``op.py`` for the definition."""

from .op import write_neurons_

__all__ = ["write_neurons_"]
