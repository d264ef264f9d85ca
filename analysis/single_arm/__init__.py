"""Analyses of one arm: its law, isoFLOP profiles, hold-out, comparison at one budget."""
