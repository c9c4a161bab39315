"""The engine: parameter sets, rules and the loops that run them. Knows no transport and no disk."""
