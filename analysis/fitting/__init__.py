"""Laws and the solver that fits them."""
