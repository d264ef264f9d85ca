"""Hyper-parameter tuning: studies and their trials, brackets of the optima, and the rules fitted to them."""
