"""Text to rows: sources, tokenizers, prepared shards, and their order."""
