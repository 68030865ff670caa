"""The report of a run, one HTML file: `data` reads a run's folder, `findings` says in words what the figures mean,
`sections` (what was measured) and `making` (how the student came about) give the parts of the page, `queries` its
table of queries, and `assembling` puts the page together and writes it. They build on `parts`, `charts` and `html`.
"""

from __future__ import annotations

from rankdistill.evaluation.report.assembling import report

__all__ = ["report"]
