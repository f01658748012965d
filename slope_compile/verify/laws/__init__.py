"""The laws of the weights, and digests: what the bytes alone tell."""
