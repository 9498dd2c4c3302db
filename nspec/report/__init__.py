"""The page and the table that a run ends with."""

from pathlib import Path

from nspec.report.tables import score_table

__all__ = ["build_report", "score_table"]


def build_report(run: Path) -> Path:
    """Writes the page of a run: :func:`nspec.report.page.build_report`."""
    from nspec.report import page  # the table needs neither its sections nor SciPy

    return page.build_report(run)
