"""How fast an engine is, against the dense FP16 engine of the same model: measured in turn, in one process."""
