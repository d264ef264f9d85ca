"""Muon over several processes, with the parameters of one process."""
