"""The page and the table that a run ends with."""

from nspec.report.page import build_report
from nspec.report.tables import score_table

__all__ = ["build_report", "score_table"]
