"""Campaigns as tables: plan, status, tuning, runs.csv and curves."""
