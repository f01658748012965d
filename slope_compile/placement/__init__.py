"""What each weight becomes on a target: which placement, why, and the ONNX file that says so."""
