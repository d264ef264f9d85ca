"""A run's directory: its files, its record, its state and where it ran. Imports no torch."""
