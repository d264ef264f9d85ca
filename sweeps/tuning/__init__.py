"""Tuning: which settings to try, what became of them, whether the optimum is inside, and what follows for other sizes."""
