"""The gates of a bundle of several tasks: every task must pass each of them.

side_free  no side network in the task's model, and none in the mixed graph
identity   the task's graph is node for node the base graph, which is the bare backbone's; the mixed
           graph has the same nodes and a few that bring each row its task's numbers
parity     the numbers of PyTorch FP32, from the mixed graph
swap       the same from the base graph, fed with the task's delta
mixed      one batch of all tasks in random order gives each row what its task alone gives
metric     the task metric of PyTorch through the mixed graph
golden     raw inputs through the task's own preprocessing give the right outputs
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.checks.parity import Parity
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.export.fade import Faded
from mdpd_deploy.export.gates import Gate, check_parity, check_side_free, replayed
from mdpd_deploy.export.multitask.base_graph import BaseGraph, comparable
from mdpd_deploy.graphs.deltas import HEAD_BIAS
from mdpd_deploy.graphs.mixed import OUTPUT, added_nodes
from mdpd_deploy.graphs.signature import graph_signature, values_sha256
from mdpd_deploy.graphs.trace import export_onnx, same_structure
from mdpd_deploy.runtimes.base import Forward, only
from mdpd_deploy.runtimes.mixed import mixed_batch


def check_structure(faded: Faded, base: BaseGraph, scratch: Path) -> list[Gate]:
    """Trace the task's model anew and compare it with the base graph: `side_free` and `identity`."""
    (width,) = base.shapes[HEAD_BIAS]
    twin = replace(faded, model=comparable(faded.model, width))
    graph = export_onnx(twin.model, scratch / "task.onnx")
    differences = same_structure(graph.path, base.traced.path)
    if differences:
        raise VerificationError(f"identity: the graph is not the base graph: {differences[0]}.")
    note = f"{graph.nodes} nodes equal the bare backbone's; {len(faded.changed)} norms differ"
    bare = graph_signature(base.path)
    details = {
        "nodes": graph.nodes,
        "changed_weights": list(faded.changed),
        "structure_sha256": bare.structure_sha256,
        "bare_values_sha256": values_sha256(weight.digest for weight in bare.weights),
    }
    return [check_side_free(twin, graph), Gate("identity", "passed", note, details)]


def check_mixed_structure(base: Path, mixed: Path) -> dict[str, int]:
    """Return the operators that the mixed graph adds to the base graph, after comparing the rest."""
    graphs = [onnx.load(path, load_external_data=False) for path in (base, mixed)]
    named = [
        t.name for graph in graphs for t in graph.graph.initializer if t.name.startswith("side")
    ]
    if named:
        raise VerificationError(f"side_free: {named[0]} belongs to the side network.")
    return added_nodes(*graphs)


def check_both_ways(
    faded: Faded, mixed: Forward, swapped: Forward, task: BundleTask
) -> tuple[list[Gate], Parity]:
    """PyTorch's numbers from the mixed graph (`parity`) and from the base graph (`swap`)."""
    assert task.golden is not None
    golden = load_golden(task.golden, names=(OUTPUT,))
    gate, parity = check_parity(faded.model, mixed, golden, names=(OUTPUT,))
    other, _ = check_parity(faded.model, swapped, golden, names=(OUTPUT,))
    return [gate, Gate("swap", other.verdict, other.note, other.details)], parity


def check_golden_of(task: BundleTask, runner: Forward, parity: Parity) -> Gate:
    """Replay a task's golden file through its written preprocessing."""
    assert task.golden is not None
    golden = load_golden(task.golden, names=(OUTPUT,))
    return replayed(golden, task.preprocess, runner, parity.spread, parity.tolerance)


def check_mixed_rows(
    tasks: Sequence[BundleTask], parities: Sequence[Parity], runner: Forward
) -> list[Gate]:
    """Put every task's golden inputs into one shuffled batch; each row must get its own answer.

    Returns:
        One gate `mixed` per task.
    """
    requests, expected = [], []
    for task in tasks:
        assert task.golden is not None
        golden = load_golden(task.golden, names=(OUTPUT,))
        requests += [(task, raw) for raw in golden.raws]
        expected += list(only(golden.outputs))
    order = np.random.default_rng(0).permutation(len(requests))
    found = only(runner(mixed_batch([requests[place] for place in order])))
    worst = {task.index: 0.0 for task in tasks}
    for place, outputs in zip(order, found, strict=True):
        task = requests[place][0]
        gap = float(np.abs(outputs[: task.width] - expected[place]).max())
        worst[task.index] = max(worst[task.index], gap / parities[task.index].spread[OUTPUT])
    gates = []
    for task, parity in zip(tasks, parities, strict=True):
        if not worst[task.index] <= parity.tolerance:
            raise VerificationError(
                f"mixed: in one batch with other tasks {task.name!r} is off by "
                f"{worst[task.index]:.1e} of its outputs' spread, allowed {parity.tolerance:.0e}."
            )
        note = f"one shuffled batch of {len(tasks)} tasks: off by {worst[task.index]:.1e} at most"
        gates.append(Gate("mixed", "passed", note, {"output_diff": worst[task.index]}))
    return gates
