"""One archive that takes an export to a device, and building and verifying from it there. Needs no torch."""
