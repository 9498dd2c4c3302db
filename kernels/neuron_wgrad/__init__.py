"""See ``op.py`` for the definition."""

from .op import neuron_wgrad

__all__ = ["neuron_wgrad"]
