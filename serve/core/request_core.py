"""The request core: models, batching and protocol without HTTP. See the package's docstring."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.data.examples import Raw, fits, parts_of, refuse_empty, words_of
from mdpd_deploy.errors import UserError
from mdpd_deploy.machine import cpu_count
from mdpd_deploy.serve.core.batcher import Batch, Done, MicroBatcher
from mdpd_deploy.serve.core.model import (
    VERSION,
    RunnerFactory,
    ServedModel,
    open_runner,
)
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.preparing import Preparers
from mdpd_deploy.serve.core.protocol import InferRequest, Reply, decode_request, encode_reply
from mdpd_deploy.serve.core.refusal import (
    draining,
    expired,
    invalid,
    not_found,
    overloaded,
    shown,
    too_large,
)
from mdpd_deploy.serve.core.tensors import Arrays
from mdpd_deploy.tasks import Prediction

T = TypeVar("T")
PARSES = 2  # large JSON bodies that are taken apart at once; Python has one of them run anyway
SMALL_BODY = 16_000  # bytes; at most a millisecond, where a thread's wake-up costs a tenth of one
SHORT_TEXTS = 1_000  # characters of a request; at most two milliseconds
LARGE_JSON = 100_000  # bytes; what is smaller takes a millisecond or so
LONG_TEXTS = 32_000  # characters of a request; what is shorter takes a tenth of a second at most
CHILDREN = range(2, 9)  # that prepare: as many as processors, within this


@dataclass(frozen=True)
class Answer:
    """What a plain request gets.

    Attributes:
        model: The model's name.
        task: The task that answered.
        predictions: One per input, in order.
        queue_ms: Time its rows waited for the device.
        compute_ms: Time of the batch that they were run in.
        batch_rows: Rows of that batch, those of other requests included.
    """

    model: str
    task: str
    predictions: tuple[Prediction, ...]
    queue_ms: float
    compute_ms: float
    batch_rows: int


@dataclass(frozen=True)
class InferAnswer:
    """What a protocol request gets: the body, and the times as in `Answer`."""

    reply: Reply
    queue_ms: float
    compute_ms: float
    batch_rows: int


class RequestCore:
    """Serves several bundles in one process; see the package's docstring.

    Args:
        models: Opened models; all share one inference thread and take turns.
        options: Batching, deadlines and limits.
        on_batch: Told of every batch that was run, for metrics.

    Raises:
        UserError: If the queue has no place for one full request.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        options: CoreOptions,
        *,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        largest = max(model.max_batch for model in models)
        if options.queue < largest:
            raise UserError(
                f"--queue {options.queue} has no place for a request of {largest} rows: raise it, or "
                "lower --max-batch."
            )
        self.options = options
        self.models: dict[str, ServedModel] = {model.name: model for model in models}
        self._threads: list[threading.Thread] = []
        self._device = self._pool(1, "inference")
        self._processors = cpu_count()
        self._preparing = self._pool(self._processors, "preparing")
        self._overdue: set[Future[Any]] = set()  # work in there that nobody waits for any more
        children = min(max(options.threads or self._processors, CHILDREN[0]), CHILDREN[-1])
        self._preparers = Preparers(children, options.limits.pixels, self._preparing)
        self._parsing = asyncio.Semaphore(PARSES)
        self._batchers = {
            model.name: MicroBatcher(
                model.name,
                model.run,
                self._device,
                key=model.batch_key,
                max_batch=model.max_batch,
                max_delay_ms=options.max_delay_ms,
                queue=options.queue,
                on_batch=on_batch,
            )
            for model in models
        }
        self._started = self._closing = False

    @classmethod
    def open(
        cls,
        bundles: Mapping[str, Path],
        options: CoreOptions,
        *,
        make_runner: RunnerFactory = open_runner,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> "RequestCore":
        """Load and prove bundles, named as requests name them; see `ServedModel` for errors."""
        if not bundles:
            raise UserError("name at least one bundle to serve.")
        models = [ServedModel(name, path, options, make_runner) for name, path in bundles.items()]
        return cls(models, options, on_batch=on_batch)

    async def start(self) -> None:
        """Begin to answer, in the running event loop."""
        for batcher in self._batchers.values():
            batcher.start()
        if any(model.takes_pictures for model in self.models.values()):
            self._preparers.start()
        self._started = True

    async def close(self) -> None:
        """Refuse new requests, answer within `drain_s` those that were taken, and stop."""
        self._closing = True
        limit = self.options.drain_s
        await asyncio.gather(*(batcher.close(limit) for batcher in self._batchers.values()))
        await self._preparers.close()
        for pool in (self._preparing, self._device):
            pool.shutdown(wait=False)

    def join(self, timeout_s: float) -> bool:
        """After the event loop, wait for the threads; return whether they have ended.

        Args:
            timeout_s: Most seconds to wait for what they still do. Nobody waits for its outcome,
                but Python does not end before its threads.
        """
        end = time.monotonic() + timeout_s
        for pool in (self._preparing, self._device):
            pool.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _pool(self, threads: int, name: str) -> ThreadPoolExecutor:
        def note() -> None:
            self._threads.append(threading.current_thread())

        return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=note)

    @property
    def failed(self) -> str | None:
        """Why this process cannot answer any more and is to be started again; None if it can.

        One failed model is reason enough: an error of a GPU stays for the life of the process.
        """
        for name, model in self.models.items():
            if model.failed is not None:
                return f"{name} answers no more: {model.failed}"
            if self._open and not self._batchers[name].running:
                return f"{name} answers no more: its batches have ended."
        return None

    @property
    def ready(self) -> bool:
        """Whether requests are answered now, and what they hold can be prepared."""
        stuck = self._preparers.failed is not None or len(self._overdue) >= self._processors
        return self._answering and not stuck

    @property
    def _open(self) -> bool:
        return self._started and not self._closing

    @property
    def _answering(self) -> bool:
        return self._open and self.failed is None

    def queued(self) -> dict[str, int]:
        """Return how many rows of each model are taken and not answered yet."""
        return {name: batcher.reserved for name, batcher in self._batchers.items()}

    def model(self, name: str, version: str | None = None) -> ServedModel:
        """Return a model; raises `Refusal` 404 for an unknown name or version."""
        found = self.models.get(name)
        if found is None:
            raise not_found(f"unknown model {shown(name)}: served are {', '.join(self.models)}.")
        if version not in (None, VERSION):
            raise not_found(f"model {name!r} has no version {shown(version)}, only {VERSION!r}.")
        return found

    def describe(self) -> dict[str, Any]:
        """Return the protocol's server metadata."""
        from importlib.metadata import version

        return {
            "name": "mdpd-deploy",
            "version": version("mdpd-deploy"),
            "extensions": ["binary_tensor_data"],
        }

    def describe_model(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return the protocol's model metadata."""
        model = self.model(name, version)
        inputs, outputs = (
            [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
            for specs in (model.inputs, model.outputs)
        )
        return {
            "name": model.name,
            "versions": [VERSION],
            "platform": model.platform,
            "inputs": inputs,
            "outputs": outputs,
        }

    def describe_tasks(self, name: str) -> dict[str, Any]:
        """Return what a plain request may ask of a model."""
        model = self.model(name)
        manifest = model.bundle.manifest
        return {
            "name": model.name,
            "modality": "image" if model.takes_pictures else "text",
            "precision": model.precision,
            "method": manifest["method"],
            "faded": manifest["faded"],
            "provider": model.runner.provider.removesuffix("ExecutionProvider"),
            "max_batch": model.max_batch,
            "tasks": [
                {
                    "name": task.name,
                    "kind": task.task.kind,
                    "fields": list(task.fields),
                    "pair": len(task.fields) > 1,
                    "labels": list(task.task.labels),
                }
                for task in model.tasks.values()
            ],
        }

    async def infer(
        self, name: str, body: bytes, *, json_length: int | None = None, version: str | None = None
    ) -> InferAnswer:
        """Answer a request of the protocol.

        Args:
            name: The model.
            body: The whole body.
            json_length: `Inference-Header-Content-Length`.
            version: The model's version, where the request names one.

        Raises:
            Refusal: For every request that cannot be answered, with the reason.
        """
        model = self.model(name, version)

        def decode() -> tuple[InferRequest, int]:
            most = self.options.limits.tensors
            request = decode_request(
                body, json_length, model.inputs, model.outputs, most_tensors=most
            )
            return request, model.check(request.arrays)

        started = asyncio.get_running_loop().time()
        async with _deadline(self.options.timeout_s) as limit:
            json_bytes = len(body) if json_length is None else json_length
            here = len(body) <= SMALL_BODY
            request, rows = await self._prepare(decode, json_bytes, here=here)
            if request.timeout_s is not None:
                _shorten(limit, started, request.timeout_s)
            with self._batchers[name].reserve(rows):
                done = await self._batchers[name].submit(request.arrays, rows)
        outputs = {model.outputs[0].name: done.outputs}
        reply = encode_reply(request, model.name, VERSION, outputs)
        return InferAnswer(reply, done.queue_ms, done.compute_ms, done.batch_rows)

    async def predict(self, name: str, raws: Sequence[Raw], *, task: str | None = None) -> Answer:
        """Answer raw inputs, all for one task.

        Args:
            name: The model.
            raws: Texts, pairs of texts, or pictures in memory.
            task: Which task; None where there is only one.

        Raises:
            Refusal: For every request that cannot be answered, with the reason.
        """
        characters = self._check_raws(name, raws, task)
        model = self.model(name)

        async def prepare(chosen: BundleTask) -> Arrays:
            if characters > LONG_TEXTS:
                return await self._prepare_apart(model, chosen, raws)
            here = 0 < characters <= SHORT_TEXTS  # pictures have none
            return await self._prepare(lambda: model.to_arrays(raws, chosen), here=here)

        return await self._predict(name, len(raws), prepare, task)

    async def classify(self, name: str, picture: bytes, *, task: str | None = None) -> Answer:
        """Answer a JPEG, PNG or WebP file in memory; see `predict`."""
        model = self.model(name)
        if not model.takes_pictures:
            raise invalid(f"{name} takes text, not pictures.")
        if not picture:
            raise invalid("the body is empty: send the bytes of a JPEG, PNG or WebP picture.")
        return await self._predict(
            name, 1, lambda task: self._prepare_apart(model, task, picture), task
        )

    async def _predict(
        self,
        name: str,
        rows: int,
        prepare: Callable[[BundleTask], Awaitable[Arrays]],
        task: str | None,
    ) -> Answer:
        model = self.model(name)
        chosen = model.task(task)
        async with _deadline(self.options.timeout_s):
            with self._batchers[name].reserve(rows):
                arrays = await prepare(chosen)
                done: Done = await self._batchers[name].submit(arrays, rows)
        predictions = tuple(chosen.decode({model.outputs[0].name: done.outputs}))
        times = done.queue_ms, done.compute_ms, done.batch_rows
        return Answer(model.name, chosen.name, predictions, *times)

    def _check_raws(self, name: str, raws: Sequence[Raw], task: str | None) -> int:
        """Refuse what no request may hold, and return how many characters there are."""
        model = self.model(name)
        chosen = model.task(task)
        if not raws:
            raise invalid("the request holds no input.")
        if len(raws) > model.max_batch:
            raise invalid(
                f"a request may have at most {model.max_batch} inputs: given {len(raws)}."
            )
        if model.takes_pictures:
            return 0
        limits, characters, size = self.options.limits, 0, 0
        for raw in raws:
            if not fits(raw, chosen.fields) or not isinstance(raw, str | tuple):
                wanted = words_of(chosen.fields)
                raise invalid(f"task {chosen.name!r} takes {wanted}: given {shown(raw)}.")
            for text in parts_of(raw):
                characters += len(text)
                size += (own := len(text.encode(errors="replace")))
                if own > limits.text_bytes:
                    raise too_large(f"a text has more than {limits.text_bytes} bytes: shorten it.")
        if size > limits.texts_bytes:
            raise too_large(
                f"the texts have more than {limits.texts_bytes} bytes together: send fewer at once."
            )
        try:
            refuse_empty(raws)
        except UserError as err:
            raise invalid(str(err)) from None
        return characters

    async def parse(self, work: Callable[[], T], json_bytes: int) -> T:
        """Take a body's JSON apart, beside the event loop where that is worth it.

        Args:
            work: Returns what is needed of it.
            json_bytes: How much there is.

        Raises:
            Refusal: What `work` raises; 503 at the end of the server, 504 when it takes too long.
        """
        async with _deadline(self.options.timeout_s):
            return await self._prepare(work, json_bytes, here=json_bytes <= SMALL_BODY)

    async def _prepare(self, work: Callable[[], T], json_bytes: int = 0, *, here: bool) -> T:
        """Run short processor work here, in the event loop, or beside it.

        Large JSON, which takes memory, is done in turn.
        """
        large = json_bytes > LARGE_JSON
        async with self._parsing if large else contextlib.nullcontext():
            if not self._answering:
                raise draining()
            if here:
                return work()
            future = self._preparing.submit(work)
            try:
                return await asyncio.wrap_future(future)
            finally:
                if not future.cancel() and not future.done():  # a thread cannot be ended
                    self._overdue.add(future)
                    future.add_done_callback(self._overdue.discard)

    async def _prepare_apart(
        self, model: ServedModel, task: BundleTask, inputs: Sequence[Raw] | bytes
    ) -> Arrays:
        """Run processor work that may be long in a process that ends with its request."""
        if not self._answering:
            raise draining()
        if self._preparers.failed is not None:
            raise overloaded("pictures and long texts cannot be prepared now: try again later.")
        arrays = await self._preparers.prepare(task.preprocess, inputs)
        return model.with_task(arrays, task)


@contextlib.asynccontextmanager
async def _deadline(timeout_s: float) -> AsyncIterator[asyncio.Timeout]:
    """Give up the block after a time, with a 504."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield limit
    except TimeoutError:
        raise expired() from None


def _shorten(limit: asyncio.Timeout, started: float, timeout_s: float) -> None:
    """Take a client's own limit where it is shorter."""
    end = limit.when()
    assert end is not None
    limit.reschedule(min(end, started + timeout_s))
