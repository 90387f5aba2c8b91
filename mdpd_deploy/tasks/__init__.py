"""What a task adds to a backbone: metrics (torch-free) and the head (torch)."""
