"""Lion (Chen et al. 2023, arXiv:2302.06675) as a row of the scaling harness."""
