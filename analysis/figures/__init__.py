"""Figures as functions of values: each returns a matplotlib Figure and touches no file.

Points are runs, lines are fits, dashes are beyond the data, a band is the 95 % interval. One colour, marker and dash
for each arm in every figure, told apart in grey and by colour-blind readers.
"""
