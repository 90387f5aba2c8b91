"""ONNX graphs: traced from a module, compared by structure, and changed."""
