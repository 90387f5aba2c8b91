"""Timing and serving deployed models; serving needs no torch."""

if __name__ != "mdpd_deploy.serve":
    raise ImportError(f"import mdpd_deploy.serve, not {__name__!r}: pyproject.toml maps the folder")
