"""A training step: models, batches and masks, the check before timing, what is measured, growth with tasks, words."""
