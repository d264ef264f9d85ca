"""The run directory: files, record, state and provenance of a run, and progress output. Imports no torch."""
