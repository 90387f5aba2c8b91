"""Fine-tune an encoder with a side network that fades, and deploy only the backbone.

The Python API uses the command line's words and is loaded on first use, so that
`import mdpd_deploy` costs nothing:

    fit            train a model                        `mdpd train`
    export_run     turn a run into a verified bundle    `mdpd export`
    export_runs    several runs on one backbone         `mdpd export --multi`
    build_engine   build a bundle's TensorRT engine     `mdpd build-engine`
    compare        methods on the same data    `mdpd compare`
    verify_bundle  check a bundle again                 `mdpd verify`
    sign_bundle    sign a bundle with a key             `mdpd sign`
    bench_latency  time a run or bundle                 `mdpd bench-latency`
    load_bundle    open a bundle for prediction         `mdpd predict`
    triton_repository  bundles for Triton               `mdpd triton`

Errors meant for people derive from `MdpdError`; `UserError` is what the caller can mend.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("mdpd_deploy.train") is None:
    raise ImportError(
        "mdpd_deploy was imported from a checkout that is not installed: run `pip install -e .`"
    )

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.bundle import load_bundle
    from mdpd_deploy.commands.bench_latency import bench_latency
    from mdpd_deploy.commands.build_engine import build_engine
    from mdpd_deploy.commands.compare import compare
    from mdpd_deploy.commands.export import export_run, export_runs
    from mdpd_deploy.commands.sign import sign_bundle
    from mdpd_deploy.commands.train import fit
    from mdpd_deploy.commands.triton import triton_repository
    from mdpd_deploy.commands.verify import verify_bundle
    from mdpd_deploy.errors import MdpdError, UserError

    __version__: str

_HOME = {
    "MdpdError": "mdpd_deploy.errors",
    "UserError": "mdpd_deploy.errors",
    "bench_latency": "mdpd_deploy.commands.bench_latency",
    "build_engine": "mdpd_deploy.commands.build_engine",
    "compare": "mdpd_deploy.commands.compare",
    "export_run": "mdpd_deploy.commands.export",
    "export_runs": "mdpd_deploy.commands.export",
    "fit": "mdpd_deploy.commands.train",
    "load_bundle": "mdpd_deploy.artifacts.bundle",
    "sign_bundle": "mdpd_deploy.commands.sign",
    "verify_bundle": "mdpd_deploy.commands.verify",
    "triton_repository": "mdpd_deploy.commands.triton",
}

__all__ = [
    "MdpdError",
    "UserError",
    "__version__",
    "bench_latency",
    "build_engine",
    "compare",
    "export_run",
    "export_runs",
    "fit",
    "load_bundle",
    "sign_bundle",
    "triton_repository",
    "verify_bundle",
]


if not TYPE_CHECKING:  # so that type checkers report a name that does not exist

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value: object = version("mdpd-deploy")
        elif name in _HOME:
            value = getattr(import_module(_HOME[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next look-up finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
