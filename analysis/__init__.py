"""What the losses mean: laws, fits, intervals, the match ratio. Reads tables of runs; imports no torch."""
