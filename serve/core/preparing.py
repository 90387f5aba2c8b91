"""Child processes that prepare what may take long: started, asked, killed and replaced.

A child has one job at a time. When a job's request is given up, at its deadline or because its client
has left, the child that works on it is killed and another one takes its place; so no work outlives
its request, and the number of children bounds what is decoded at once.
"""

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from concurrent.futures import Executor

from safetensors.numpy import load

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.serve.core import prepare_child
from mdpd_deploy.serve.core.prepare_child import HEADER, JOB, READY, Job
from mdpd_deploy.serve.core.refusal import Refusal, internal, invalid, overloaded, too_large
from mdpd_deploy.serve.core.tensors import Arrays

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # until another try, when no child can be started
# One at a time in each, on one processor; the interpreter finds packages where this one does.
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_MAIN = f"from {prepare_child.__name__} import main; main()"


class Preparers:
    """Some child processes, started with the first job, in the event loop of that.

    Args:
        count: How many; so many jobs are worked on at once.
        most_pixels: Of a picture.
        threads: For what would hold the event loop up.

    Attributes:
        failed: Why no child could be started the last time; None while all is well.
    """

    def __init__(self, count: int, most_pixels: int, threads: Executor) -> None:
        self.failed: str | None = None
        self._count = count
        self._most_pixels = most_pixels
        self._threads = threads
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._started = False
        self._beginning: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the children, unless they are; does not wait for them."""
        if not self._started:
            self._started = True
            for _ in range(self._count):
                self._begin(None)

    async def prepare(self, preprocess: Preprocess, inputs: Sequence[Raw] | bytes) -> Arrays:
        """Return the arrays of texts or pairs, or of one picture file. Cancelling ends the work.

        Raises:
            Refusal: 400 or 413 for what cannot be prepared, 503 for too little memory.
        """
        self.start()
        child = await self._take()
        try:
            kind, answer = await self._ask(child, preprocess, inputs)
        except (asyncio.IncompleteReadError, ConnectionError) as err:
            try:
                refusal = await child.why_it_ended()
            finally:  # not before: killing it would take its exit code
                self._begin(child)
            raise refusal from err
        except BaseException:  # nobody waits for it any more
            self._begin(child)
            raise
        self._idle.put_nowait(child)
        return _unpack(kind, answer)

    async def close(self) -> None:
        """Kill the children and wait for their end."""
        for task in self._beginning:
            task.cancel()
        await asyncio.gather(*self._beginning, return_exceptions=True)
        while not self._idle.empty():
            await self._idle.get_nowait().end()

    async def _take(self) -> "_Child":
        while (child := await self._idle.get()).ended:
            self._begin(child)
        return child

    async def _ask(
        self, child: "_Child", preprocess: Preprocess, inputs: Sequence[Raw] | bytes
    ) -> tuple[int, bytes]:
        known = child.preprocess is preprocess
        job = Job(None if known else preprocess, inputs, self._most_pixels)
        if known:
            message = pickle.dumps(job)
        else:  # a tokenizer takes a while
            loop = asyncio.get_running_loop()
            message = await loop.run_in_executor(self._threads, pickle.dumps, job)
        child.preprocess = preprocess
        await child.send(message)
        return await child.receive()

    def _begin(self, old: "_Child | None") -> None:
        task = asyncio.create_task(self._replace(old), name="a child that prepares")
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _replace(self, old: "_Child | None") -> None:
        """End a child and start another one in its place, trying until that works."""
        if old is not None:
            await old.end()
        while True:
            try:
                self._idle.put_nowait(await _Child.start(self._most_pixels))
            except OSError as err:
                if self.failed is None:
                    logger.error("no process that prepares inputs could be started: %s", err)
                self.failed = str(err)
                await asyncio.sleep(RETRY_S)
            else:
                self.failed = None
                return


class _Child:
    """A process of `prepare_child`, and which preprocessing it holds."""

    def __init__(self, process: Process) -> None:
        self.preprocess: Preprocess | None = None
        self._process = process

    @classmethod
    async def start(cls, most_pixels: int) -> "_Child":
        """Return a child that is ready; raises `OSError`."""
        paths = os.pathsep.join(filter(None, sys.path))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", _MAIN, str(most_pixels)),
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": paths},
            start_new_session=True,  # an interrupt of the terminal is for the parent
        )
        child = cls(process)
        try:
            kind, _ = await child.receive()
            assert kind == READY
        except BaseException as err:
            await child.end()
            if isinstance(err, asyncio.IncompleteReadError):
                raise OSError(f"it ended with exit code {process.returncode}") from err
            raise
        return child

    @property
    def ended(self) -> bool:
        """Whether the process has ended by itself."""
        assert self._process.stdout is not None
        return self._process.stdout.at_eof()

    async def send(self, job: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(HEADER.pack(JOB, len(job)) + job)
        await self._process.stdin.drain()

    async def receive(self) -> tuple[int, bytes]:
        assert self._process.stdout is not None
        kind, size = HEADER.unpack(await self._process.stdout.readexactly(HEADER.size))
        return kind, await self._process.stdout.readexactly(size)

    async def end(self) -> None:
        """Kill the process, and leave nothing of it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(ConnectionError):
            await self._process.communicate()

    async def why_it_ended(self) -> Refusal:
        """Return what the client whose job it had is told."""
        code = await self._process.wait()
        if code == -signal.SIGKILL:  # as systems do that are short of memory
            return _no_memory()
        logger.error("a process that prepares inputs ended with exit code %s", code)
        return internal()


def _unpack(kind: int, answer: bytes) -> Arrays:
    if kind == prepare_child.ARRAYS:
        return load(answer)
    if kind == prepare_child.NO_MEMORY:
        raise _no_memory()
    raise (too_large if kind == prepare_child.TOO_LARGE else invalid)(answer.decode())


def _no_memory() -> Refusal:
    return overloaded("the memory does not suffice for this input now: try again later.")
