"""From a bundle to a TensorRT engine, and the checks of what was built."""
