"""The memory of a training step: measured live, forecast, chosen by, and shown side by side."""
