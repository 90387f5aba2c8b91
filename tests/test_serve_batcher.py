"""The micro-batcher: who shares a run, who waits, who is refused, and that each gets its own."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mdpd_deploy.serve.core.batcher import MicroBatcher
from mdpd_deploy.serve.core.refusal import Refusal

BAD = -1.0


class Device:
    """A device of one thread whose model doubles; it can be held busy, and fails at `BAD`."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.batches = []
        self.free = threading.Event()
        self.free.set()

    def run(self, jobs):
        self.free.wait(20)
        rows = [job["x"] for job in jobs]
        self.batches.append([len(part) for part in rows])
        if any((part == BAD).any() for part in rows):
            raise RuntimeError("no such row")
        return [2 * part[:, :1] for part in rows]


def serve(work, **options):
    """Run `work(batcher, device)` over a started batcher, and close it."""

    async def main():
        device = Device()
        chosen = dict(key=lambda arrays: None, max_batch=4, max_delay_ms=0.0, queue=16) | options
        batcher = MicroBatcher("m", device.run, device.thread, **chosen)
        batcher.start()
        try:
            return await asyncio.wait_for(work(batcher, device), 30), device
        finally:
            device.free.set()
            await batcher.close()
            device.thread.shutdown()

    return asyncio.run(main())


def rows(*values, width=1):
    return {"x": np.tile(np.array(values, np.float32)[:, None], width)}


async def ask(batcher, arrays):
    with batcher.reserve(len(arrays["x"])):
        return await batcher.submit(arrays, len(arrays["x"]))


async def hold(batcher, device):
    """Keep the device busy with a job of its own until `device.free` is set."""
    device.free.clear()
    task = asyncio.create_task(ask(batcher, rows(0)))
    while batcher.waiting or not batcher.reserved:
        await asyncio.sleep(0.001)
    return task


def test_jobs_that_arrive_while_the_device_is_busy_share_a_run():
    async def work(batcher, device):
        first = await hold(batcher, device)
        tasks = [asyncio.create_task(ask(batcher, rows(n, n))) for n in range(1, 4)]
        await asyncio.sleep(0.01)
        device.free.set()
        await first
        return await asyncio.gather(*tasks)

    found, device = serve(work)
    assert [done.outputs.ravel().tolist() for done in found] == [[2, 2], [4, 4], [6, 6]]
    assert device.batches == [[1], [2, 2], [2]]  # at most 4 rows, in the order of arrival
    assert [done.batch_rows for done in found] == [4, 4, 2]
    assert all(done.queue_ms > 5 and done.compute_ms >= 0 for done in found)


def test_an_idle_device_waits_for_company_only_as_long_as_it_is_told():
    async def together(batcher, device):
        await asyncio.gather(ask(batcher, rows(1)), late(batcher))

    async def late(batcher):
        await asyncio.sleep(0.05)
        return await ask(batcher, rows(2, 2, 2))

    assert serve(together, max_delay_ms=5000.0)[1].batches == [[1, 3]]  # full: no more waiting
    assert serve(together, max_delay_ms=0.0)[1].batches == [[1], [3]]


def test_a_job_that_came_before_the_first_turn_waits_for_company_too():
    async def ask_later(batcher):
        await asyncio.sleep(0.05)
        return await ask(batcher, rows(2, 2, 2))

    async def main():
        device = Device()
        batcher = MicroBatcher(
            "m", device.run, device.thread, key=lambda arrays: None, max_batch=4,
            max_delay_ms=5000.0, queue=16,
        )  # fmt: skip
        batcher.start()  # its loop has not run when the job comes
        with batcher.reserve(1):
            first = batcher.submit(rows(1), 1)
            later = await ask_later(batcher)
            await first
        await batcher.close()
        device.thread.shutdown()
        return device.batches, later.batch_rows

    assert asyncio.run(main()) == ([[1, 3]], 4)


def test_only_jobs_of_one_key_share_a_run_and_none_starves():
    async def work(batcher, device):
        first = await hold(batcher, device)
        widths = [1, 2, 1, 2, 1]
        tasks = [
            asyncio.create_task(ask(batcher, rows(n, width=width)))
            for n, width in enumerate(widths)
        ]
        await asyncio.sleep(0.01)
        device.free.set()
        await first
        return [done.outputs.item() for done in await asyncio.gather(*tasks)]

    found, device = serve(work, key=lambda arrays: arrays["x"].shape[1])
    assert found == [0, 2, 4, 6, 8]
    assert device.batches == [[1], [1, 1, 1], [1, 1]]


def test_a_full_queue_refuses_and_frees_its_places_again():
    async def work(batcher, device):
        first = await hold(batcher, device)
        with pytest.raises(Refusal, match=r"queue of m is full \(3 rows\)") as stop:
            await ask(batcher, rows(1, 2, 3))
        assert stop.value.status == 503 and (stop.value.retry_after_s or 0) >= 1
        second = asyncio.create_task(ask(batcher, rows(1, 2)))
        await asyncio.sleep(0.01)
        assert batcher.reserved == 3
        device.free.set()
        await asyncio.gather(first, second)
        assert batcher.reserved == 0
        return (await ask(batcher, rows(1, 2, 3))).outputs.ravel().tolist()

    assert serve(work, queue=3)[0] == [2, 4, 6]


def test_who_gives_up_is_not_run():
    async def work(batcher, device):
        first = await hold(batcher, device)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(batcher, rows(7)), 0.02)
        assert batcher.reserved == 1
        last = asyncio.create_task(ask(batcher, rows(8, 8)))
        await asyncio.sleep(0.01)
        device.free.set()
        await asyncio.gather(first, last)

    assert serve(work)[1].batches == [[1], [2]]


def test_one_job_that_fails_leaves_the_others_their_answers():
    async def work(batcher, device):
        first = await hold(batcher, device)
        tasks = [asyncio.create_task(ask(batcher, rows(n))) for n in (1, BAD, 3)]
        await asyncio.sleep(0.01)
        device.free.set()
        await first
        found = await asyncio.gather(*tasks, return_exceptions=True)
        again = await ask(batcher, rows(5))
        return found, again

    ((one, bad, three), again), _ = serve(work)
    assert [done.outputs.item() for done in (one, three, again)] == [2, 6, 10]
    assert isinstance(bad, Refusal) and bad.status == 500 and "no such row" not in str(bad)


def test_a_batch_that_cannot_be_counted_is_answered_all_the_same(caplog):
    def broken(batch):
        raise RuntimeError("no such metric")

    async def work(batcher, device):
        found = [(await ask(batcher, rows(n))).outputs.item() for n in (1, 2)]
        return found, batcher.running

    assert serve(work, on_batch=broken)[0] == ([2, 4], True)
    assert "no such metric" in caplog.text


def test_too_few_outputs_are_one_requests_fate_and_not_the_end():
    async def work(batcher, device):
        batcher._run = lambda jobs: device.run(jobs)[:-1]
        with pytest.raises(Refusal) as stop:
            await ask(batcher, rows(1))
        batcher._run = device.run
        return stop.value.status, (await ask(batcher, rows(2))).outputs.item()

    assert serve(work)[0] == (500, 4)


def test_who_prepares_when_it_closes_is_waited_for_and_answered():
    async def work(batcher, device):
        with batcher.reserve(1):
            closing = asyncio.create_task(batcher.close(20))
            await asyncio.sleep(0.02)
            assert not closing.done()
            found = await batcher.submit(rows(3), 1)
        await closing
        assert not batcher.running
        with pytest.raises(Refusal, match="shutting down") as stop:
            batcher.submit(rows(1), 1)
        return found.outputs.item(), stop.value.status

    assert serve(work)[0] == (6, 503)


def test_closing_waits_no_longer_than_it_is_told():
    async def work(batcher, device):
        held = await hold(batcher, device)
        waits = asyncio.create_task(ask(batcher, rows(1)))
        await asyncio.sleep(0.01)
        await asyncio.wait_for(batcher.close(0.05), 5)
        return await asyncio.gather(held, waits, return_exceptions=True)

    assert [refusal.status for refusal in serve(work)[0]] == [503, 503]


def test_closing_answers_what_was_taken_and_refuses_the_rest():
    async def work(batcher, device):
        tasks = [
            await hold(batcher, device),
            *(asyncio.create_task(ask(batcher, rows(n))) for n in range(3)),
        ]
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(Refusal, match="shutting down") as stop:
            await ask(batcher, rows(1))
        assert stop.value.status == 503
        device.free.set()
        await closing
        return [task.result().outputs.item() for task in tasks]

    assert serve(work)[0] == [0, 0, 2, 4]
