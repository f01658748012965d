"""The maths of compression: coded tensors, N:M masks, learned step sizes, SLOPE, and the policy that places them.

Importing this package imports nothing else: `codes` needs no torch, the other modules do.
"""
