"""The rewrites of a placed model, as onnx-ir passes; each proves what it changed."""
