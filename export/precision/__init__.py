"""Precisions: how the FP32 graph becomes another one, and the receipt of what came out.

One file per way of converting; `forms.py` is the table of what is valid where.
"""
