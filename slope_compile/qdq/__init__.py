"""Quantized weights inside ONNX files, ours or not: reading, checking, changing the container. Needs no torch."""
