"""Measurements of what the shipped miniature learns and draws, and of the metrics that judge it."""
