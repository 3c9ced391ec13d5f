"""What a run did, for people: one page, the numbers behind it, and a card for every checkpoint."""

from tenp_dist.report.page import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
