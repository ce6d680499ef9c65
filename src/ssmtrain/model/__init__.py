"""The model: an input, blocks in the order of the layout, a head."""
