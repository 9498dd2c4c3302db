"""The page and the table that a run ends with."""
