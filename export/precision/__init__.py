"""Precisions: how the FP32 graph becomes another one; `forms.py` is the table of what is valid where."""
