"""Outputs compared hop by hop, and how far they may be apart."""
