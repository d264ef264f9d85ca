"""Optimizers that a run can train with, one row each in `registry.OPTIMIZERS`."""
