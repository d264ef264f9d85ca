"""Training of one run, from its specification to its record."""
