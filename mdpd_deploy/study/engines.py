"""Where trials run: engines are executors of `concurrent.futures`.

local  child processes of this machine
ray    tasks of a Ray cluster whose machines share the study's folder (extra `ray`)
"""

import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from mdpd_deploy.errors import UserError, missing_extra
from mdpd_deploy.registry import Registry
from mdpd_deploy.study.trial import allow_children, stop_children

T = TypeVar("T")

ENGINES: Registry[Callable[[int, int, int], Executor]] = Registry("--engine")


def build_engine(name: str, *, jobs: int, threads: int, gpus: int) -> Executor:
    """Return the engine of that name.

    Args:
        name: One of `ENGINES`.
        jobs: Most trials at a time, on this machine; a cluster runs as many as fit.
        threads: Of each trial; a cluster reserves as many processors.
        gpus: That each trial needs; a cluster reserves them.

    Raises:
        UserError: For an unknown name, a missing package or an unreachable cluster.
    """
    return ENGINES.get_or_raise(name)(jobs, threads, gpus)


@ENGINES.register("local")
def local(jobs: int, threads: int, gpus: int) -> Executor:
    """Trials are child processes; a thread of ours waits for each."""
    allow_children()
    return LocalExecutor(jobs)


class LocalExecutor(ThreadPoolExecutor):
    """Ends the child processes too when what waits is cancelled."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the children, or end them."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        if cancel_futures:
            stop_children()
        super().shutdown(wait=wait)


@ENGINES.register("ray")
def on_ray(jobs: int, threads: int, gpus: int) -> Executor:
    """Trials are Ray tasks; the cluster is the one that `RAY_ADDRESS` names, or this machine."""
    try:
        import ray
    except ImportError as err:
        raise missing_extra("ray", "ray", "--engine ray") from err
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except (ConnectionError, RuntimeError) as err:
            raise UserError(f"--engine ray: no cluster could be reached ({err}).") from err
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # it has no annotations
    _refuse_small_machines([node["Resources"] for node in nodes if node["Alive"]], threads, gpus)
    return RayExecutor(num_cpus=threads, num_gpus=gpus)


def _refuse_small_machines(machines: list[dict[str, float]], threads: int, gpus: int) -> None:
    """Refuse a trial that no machine can hold, for which Ray would wait for ever."""
    if any(m.get("CPU", 0) >= threads and m.get("GPU", 0) >= gpus for m in machines):
        return
    largest = max((m.get("CPU", 0) for m in machines), default=0)
    gpu = " and a GPU" if gpus else ""
    raise UserError(
        f"--engine ray: no machine of the cluster has the {threads} processors{gpu} that a training "
        f"is to have (the largest has {largest:g}): lower --threads, or add such a machine first."
    )


def _interruptible(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a function so that Ray can cancel it, which it does by the interrupt signal.

    A comparison that a shell started in the background has that signal ignored, and so have the
    workers of a cluster that it starts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return fn(*args, **kwargs)


class RayExecutor(Executor):
    """Runs functions as Ray tasks.

    Args:
        num_cpus: Processors that each task reserves.
        num_gpus: The same of GPUs.
    """

    def __init__(self, num_cpus: float, num_gpus: float) -> None:
        self.num_cpus, self.num_gpus = num_cpus, num_gpus
        self.tasks: list[Any] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Start a function on whichever machine has room."""
        import ray

        reserve: Any = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0)
        task = reserve(_interruptible).remote(fn, *args, **kwargs)
        self.tasks.append(task)
        future: Future[T] = task.future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Wait for the tasks, or cancel them."""
        import ray

        if cancel_futures:
            for task in self.tasks:
                ray.cancel(task)  # interrupts it, so that it ends its own child
        elif wait and self.tasks:
            ray.wait(self.tasks, num_returns=len(self.tasks))
