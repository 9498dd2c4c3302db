"""Translating and scoring: search, BLEU and chrF++, tests between systems."""
