"""The findings of arXiv 2502.20764, measured: on a trained model, on random weights, in other patch orders.

``report`` measures a store's model and its controls, ``over_orders`` what correlates with accuracy; ``FINDINGS`` lists
the measurements, each with its question and formula.
"""

from mamba_attn.findings.accuracy import Orders, over_orders
from mamba_attn.findings.controls import Report, Row, report
from mamba_attn.findings.registry import FINDINGS, Finding

__all__ = ["FINDINGS", "Finding", "Orders", "Report", "Row", "over_orders", "report"]
