"""Language models of Transformers, and text of one language at a time: reading, training, perplexity."""
