"""The places of the chain: who computes, on what, and whether the same twice."""
