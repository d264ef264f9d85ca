"""Newton-Schulz orthogonalisation: coefficients, iteration and symmetric products."""
