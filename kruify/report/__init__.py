"""One `Report` of a dense network and what was made of it -> terminal tables, JSON, HTML, Markdown."""

from kruify.report.build import build_report
from kruify.report.html import to_html
from kruify.report.markdown import to_markdown
from kruify.report.report import ModelReport, Report
from kruify.report.terminal import tables

__all__ = ["ModelReport", "Report", "build_report", "tables", "to_html", "to_markdown"]
