"""Data: readers from files to examples, and the preprocessing that travels with a model.

No torch here: inputs are text, paths or PIL pictures, arrays are numpy. `load.py` is the way in.
"""
