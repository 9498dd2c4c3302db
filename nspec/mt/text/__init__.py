"""Text: corpora, vocabulary, prepared token ids, batches."""
