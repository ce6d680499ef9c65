"""Training: one Lightning module, one step, and what happens around it."""
