"""From a campaign to its runs, their settings and their cost. Imports no torch and no Optuna."""
