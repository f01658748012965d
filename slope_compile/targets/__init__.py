"""The GPUs that engines are built for, the TensorRTs that build them, and how both differ."""
