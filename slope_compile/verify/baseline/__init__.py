"""A run against the last release."""
