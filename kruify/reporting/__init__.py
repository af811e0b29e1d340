"""One `Report` of a dense network and what was made of it -> terminal tables, JSON, HTML, Markdown."""

from kruify.reporting.card import to_card, to_graph_card
from kruify.reporting.html import to_html
from kruify.reporting.markdown import to_markdown
from kruify.reporting.report import ModelReport, Report
from kruify.reporting.terminal import tables

__all__ = ["ModelReport", "Report", "tables", "to_card", "to_graph_card", "to_html", "to_markdown"]
