"""Neuron specialisation of any ``nn.Module``: profile, select, apply, save."""
