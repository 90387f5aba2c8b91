"""Latency: deployed model against its rivals, measured side by side."""
