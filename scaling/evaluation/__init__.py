"""Evaluation of a finished run: loss on any text, and downstream tasks."""
