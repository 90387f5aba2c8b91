"""What runs a graph: one file or folder per runtime. No torch."""
