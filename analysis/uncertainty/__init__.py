"""Confidence intervals and their robustness."""
