"""A training step: the model with its batches and masks, the systems that train, their check, growth with tasks."""
