"""Timing and serving deployed models. Names are loaded on first use: serving needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if __name__ != "mdpd_deploy.serve":
    raise ImportError(f"import mdpd_deploy.serve, not {__name__!r}: pyproject.toml maps the folder")

if TYPE_CHECKING:
    from mdpd_deploy.serve.benchmark import Grid, run_benchmark
    from mdpd_deploy.serve.core import CoreOptions, Limits, RequestCore
    from mdpd_deploy.serve.core.options import usual_device
    from mdpd_deploy.serve.graph_race import race_graphs
    from mdpd_deploy.serve.latency import FEWEST_OPENINGS, Plan
    from mdpd_deploy.serve.latency_chart import write_chart
    from mdpd_deploy.serve.latency_inputs import InputSource
    from mdpd_deploy.serve.latency_report import CONTROL, DEPLOYED, LatencyReport
    from mdpd_deploy.serve.latency_table import render
    from mdpd_deploy.serve.ray_app import Scaling, build_ray_app, serve_on_ray
    from mdpd_deploy.serve.runtimes import DEFAULT_RUNTIMES, RUNTIMES, choose_device
    from mdpd_deploy.serve.shared import SharedTasks, load_shared
    from mdpd_deploy.serve.variants import (
        DEFAULT_RIVALS,
        Variant,
        rival_names,
        variants_of_bundle,
        variants_of_methods,
        variants_of_run,
    )
    from mdpd_deploy.serve.web.run import serve_bundles

_HOME = {
    "CONTROL": "latency_report",
    "DEFAULT_RIVALS": "variants",
    "DEFAULT_RUNTIMES": "runtimes",
    "DEPLOYED": "latency_report",
    "RUNTIMES": "runtimes",
    "CoreOptions": "core",
    "FEWEST_OPENINGS": "latency",
    "Grid": "benchmark",
    "InputSource": "latency_inputs",
    "LatencyReport": "latency_report",
    "Limits": "core",
    "Plan": "latency",
    "RequestCore": "core",
    "Scaling": "ray_app",
    "SharedTasks": "shared",
    "Variant": "variants",
    "build_ray_app": "ray_app",
    "choose_device": "runtimes",
    "load_shared": "shared",
    "race_graphs": "graph_race",
    "render": "latency_table",
    "rival_names": "variants",
    "run_benchmark": "benchmark",
    "serve_bundles": "web.run",
    "serve_on_ray": "ray_app",
    "usual_device": "core.options",
    "variants_of_bundle": "variants",
    "variants_of_methods": "variants",
    "variants_of_run": "variants",
    "write_chart": "latency_chart",
}

__all__ = [
    "CONTROL",
    "DEFAULT_RIVALS",
    "DEFAULT_RUNTIMES",
    "DEPLOYED",
    "FEWEST_OPENINGS",
    "RUNTIMES",
    "CoreOptions",
    "Grid",
    "InputSource",
    "LatencyReport",
    "Limits",
    "Plan",
    "RequestCore",
    "Scaling",
    "SharedTasks",
    "Variant",
    "build_ray_app",
    "choose_device",
    "load_shared",
    "race_graphs",
    "render",
    "rival_names",
    "run_benchmark",
    "serve_bundles",
    "serve_on_ray",
    "usual_device",
    "variants_of_bundle",
    "variants_of_methods",
    "variants_of_run",
    "write_chart",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
