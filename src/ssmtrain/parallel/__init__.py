"""Everything that spreads a model over devices or trades compute for memory, applied from outside."""
