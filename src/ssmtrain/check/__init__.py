"""Proofs that a user can run on a recipe of their own."""
