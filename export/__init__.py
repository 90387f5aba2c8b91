"""Export: drop the side network, trace to ONNX, verify, and write the bundle."""

if __name__ != "mdpd_deploy.export":
    raise ImportError(
        f"import mdpd_deploy.export, not {__name__!r}: pyproject.toml maps the folder"
    )
