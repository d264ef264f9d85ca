"""One training run: what is trained and how. Knows neither sweeps nor analysis.

Import what you need from its modules; nothing is re-exported here, so that `analysis` can use `scaling.units`
without loading torch.
"""
