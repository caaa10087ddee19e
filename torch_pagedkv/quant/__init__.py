"""4-bit weights in a model: checkpoint formats, the linear layer, quantising, loading and saving."""
