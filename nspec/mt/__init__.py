"""Multilingual machine translation: corpora, vocabulary, sampling, training, search, scores."""
