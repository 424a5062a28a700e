"""Run records to what people read: one self-contained page, a sentence, a comparison, a model card.

Everything here is made from `secateur.outcome.Record` and nothing else, so a report can be made again, later and
elsewhere, from the JSON of its runs.
"""

from secateur.report.compare import compare_table
from secateur.report.page import Claim, page, write
from secateur.report.sentence import headline, summary

__all__ = ["Claim", "compare_table", "headline", "page", "summary", "write"]
