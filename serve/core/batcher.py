"""Rows of many requests, one run of the graph: the micro-batcher.

Jobs wait in a bounded queue. As soon as the device is free the oldest job and those behind it that
fit beside it make a batch. Only when the device was idle is there a wait for company, of at most
`max_delay_ms`; while it is busy rows gather by themselves.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.serve.core.refusal import Refusal, draining, internal, overloaded
from mdpd_deploy.serve.core.tensors import Arrays

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Done:
    """The part of a batch's result that belongs to one job.

    Attributes:
        outputs: [rows, C].
        queue_ms: From the job's arrival until its batch began to run.
        compute_ms: What the whole batch took.
        batch_rows: Rows of the whole batch.
    """

    outputs: NDArray[np.float32]
    queue_ms: float
    compute_ms: float
    batch_rows: int


@dataclass(frozen=True)
class Batch:
    """A batch that was run, for metrics.

    Attributes:
        model: The model's name.
        rows: Rows of all its jobs.
        jobs: How many requests they came from.
        compute_ms: What the run took.
    """

    model: str
    rows: int
    jobs: int
    compute_ms: float


@dataclass(eq=False)
class _Job:
    arrays: Arrays
    rows: int
    key: Hashable
    arrived: float
    future: asyncio.Future[Done]


class MicroBatcher:
    """Gathers jobs of one model into batches.

    Args:
        name: The model's name, for messages.
        run: Runs a batch: the arrays of its jobs → the outputs of each. Called in `device`.
        device: One thread, shared by the models of a process, so that they take turns.
        key: What jobs of one batch have in common.
        max_batch: Most rows of a batch, and of a job.
        max_delay_ms: See `CoreOptions`.
        queue: Most rows that may be held, see `reserve`.
        on_batch: Told of every batch that was run.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Arrays]], list[NDArray[np.float32]]],
        device: Executor,
        *,
        key: Callable[[Arrays], Hashable],
        max_batch: int,
        max_delay_ms: float,
        queue: int,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.name = name
        self.max_batch = max_batch
        self.queue = queue
        self.reserved = 0
        self._run = run
        self._device = device
        self._key = key
        self._max_delay_s = max_delay_ms / 1e3
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._arrival = asyncio.Event()
        self._unreserved = asyncio.Event()
        self._unreserved.set()
        self._row_ms = 1.0  # recent cost of a row, for Retry-After
        self._closed = False
        self._loop: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return sum(job.rows for job in self._jobs)

    @property
    def running(self) -> bool:
        """Whether jobs are run: from `start` to `close`, unless a bug of ours ends it before."""
        return self._loop is not None and not self._loop.done()

    def start(self) -> None:
        """Begin to run batches in the running event loop."""
        self._loop = asyncio.create_task(self._work(), name=f"batches of {self.name}")

    async def close(self, timeout_s: float | None = None) -> None:
        """Reserve nothing any more, wait until what was reserved is free again, and stop.

        Args:
            timeout_s: Most seconds to wait; jobs that are not done then are refused. None = no
                limit. A run that nobody waits for is not waited for here either.
        """
        self._closed = True
        self._arrival.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._unreserved.wait()
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])

    @contextlib.contextmanager
    def reserve(self, rows: int) -> Iterator[None]:
        """Hold places for rows that are being prepared, wait or run.

        Raises:
            Refusal: 503 if they are not free.
        """
        if self._closed:
            raise draining()
        if self.reserved + rows > self.queue:
            seconds = math.ceil(self.reserved * self._row_ms / 1e3)
            raise overloaded(
                f"the queue of {self.name} is full ({self.queue} rows): try again later.",
                retry_after_s=min(max(seconds, 1), 60),
            )
        self.reserved += rows
        self._unreserved.clear()
        try:
            yield
        finally:
            self.reserved -= rows
            if not self.reserved:
                self._unreserved.set()

    def submit(self, arrays: Arrays, rows: int) -> asyncio.Future[Done]:
        """Put a job into the queue; use `reserve` first. Cancelling the future takes it out.

        Raises:
            Refusal: 503 if no batches are run any more.
        """
        if not self.running:
            raise draining()
        future = asyncio.get_running_loop().create_future()
        job = _Job(arrays, rows, self._key(arrays), time.perf_counter(), future)
        self._jobs.append(job)
        self._arrival.set()
        return future

    async def _work(self) -> None:
        try:
            await self._wait_for_company()  # a job may be there already
            while True:
                while not self._jobs:
                    self._arrival.clear()
                    await self._arrival.wait()
                    await self._wait_for_company()
                self._running = self._take()
                if self._running:
                    await self._run_batch(self._running)
        finally:  # nobody is to wait for an answer that will not come
            for job in (*self._running, *self._jobs):
                if not job.future.done():
                    job.future.set_exception(draining())

    async def _wait_for_company(self) -> None:
        """The device is idle and a job is there: give others `max_delay_ms` to join it."""
        if not self._jobs or self._max_delay_s <= 0:
            return
        end = asyncio.get_running_loop().time() + self._max_delay_s
        try:
            async with asyncio.timeout_at(end):
                while self.waiting < self.max_batch and not self._closed:
                    self._arrival.clear()
                    await self._arrival.wait()
        except TimeoutError:
            return

    def _take(self) -> list[_Job]:
        """Take the oldest job out of the queue, with those that fit beside it."""
        batch: list[_Job] = []
        rows = 0
        kept: deque[_Job] = deque()
        while self._jobs:
            job = self._jobs.popleft()
            if job.future.done():  # its request gave up
                continue
            fits = not batch or (job.key == batch[0].key and rows + job.rows <= self.max_batch)
            if fits:
                batch.append(job)
                rows += job.rows
            else:
                kept.append(job)
            if rows >= self.max_batch:
                break
        kept.extend(self._jobs)
        self._jobs = kept
        return batch

    async def _run_batch(self, batch: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        try:
            timed = await loop.run_in_executor(self._device, self._timed, batch)
        except Exception as err:  # noqa: BLE001 - whatever a runtime raises is one request's fate
            await self._run_apart(batch, err)
            return
        started, compute_ms, outputs = timed
        rows = sum(job.rows for job in batch)
        self._row_ms = 0.8 * self._row_ms + 0.2 * compute_ms / rows
        self._tell(Batch(self.name, rows, len(batch), compute_ms))
        for job, part in zip(batch, outputs, strict=True):
            if not job.future.done():
                queue_ms = (started - job.arrived) * 1e3
                job.future.set_result(Done(part, queue_ms, compute_ms, rows))

    def _tell(self, batch: Batch) -> None:
        try:
            self._on_batch(batch)
        except Exception:  # counting is not worth an answer
            logger.exception("a batch of %s could not be counted", self.name)

    async def _run_apart(self, batch: list[_Job], err: Exception) -> None:
        """A batch failed: run its jobs one by one, so that only the one at fault fails."""
        if len(batch) > 1:
            for job in batch:
                await self._run_batch([job])
            return
        if not isinstance(err, Refusal):
            logger.error("%s failed at a request: %s", self.name, err)
        if not batch[0].future.done():
            batch[0].future.set_exception(err if isinstance(err, Refusal) else internal())

    def _timed(self, batch: list[_Job]) -> tuple[float, float, list[NDArray[np.float32]]]:
        started = time.perf_counter()
        outputs = self._run([job.arrays for job in batch])
        if len(outputs) != len(batch):
            raise ValueError(f"{len(batch)} jobs were run and {len(outputs)} outputs came back")
        return started, (time.perf_counter() - started) * 1e3, outputs
