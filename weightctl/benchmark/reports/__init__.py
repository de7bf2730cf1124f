"""How a result is shown: one file for each kind of report."""

from weightctl.benchmark.reports import data, markdown, page, picture
from weightctl.benchmark.reports.base import Report, report_for, reports, write_report

__all__ = ["Report", "data", "markdown", "page", "picture", "report_for", "reports", "write_report"]
