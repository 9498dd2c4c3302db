"""Decoding with a model of one task: with all neurons, and without those that the task does not use."""
