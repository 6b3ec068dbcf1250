"""What a run achieved, for people: one self-contained HTML file, and a table for the terminal."""

from prefloop.report.page import write_report
from prefloop.report.terminal import final_table

__all__ = ["final_table", "write_report"]
