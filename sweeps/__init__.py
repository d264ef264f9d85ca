"""Many runs: which, in what order, where. Knows single runs (`scaling`) and nothing of what they mean (`analysis`)."""
