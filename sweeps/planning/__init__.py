"""From a campaign to its runs: specs, settings, cost and state. Imports no torch and no Optuna."""
