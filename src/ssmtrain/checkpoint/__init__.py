"""Checkpoints and runs: safetensors and JSON, published whole or not at all, verified before use."""
