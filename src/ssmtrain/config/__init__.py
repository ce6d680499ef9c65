"""Configuration: Hydra composes a recipe, pydantic types it, the rest of the program sees frozen models."""
