"""The methods that neuron specialisation is compared with, for any ``nn.Module``."""
