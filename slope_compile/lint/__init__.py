"""What an ONNX file, ours or not, does that a target's TensorRT will not take or will not run fast; needs no torch."""
