"""Pictures and long texts in processes of their own: identical, and ended with their request."""

import asyncio
import io
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from PIL import Image

from mdpd_deploy import load_bundle
from mdpd_deploy.serve.core.options import CoreOptions, Limits
from mdpd_deploy.serve.core.refusal import Refusal
from mdpd_deploy.serve.core.request_core import SMALL_BODY, RequestCore

pytest.importorskip("onnxruntime", reason="runs exported graphs")


def jpeg(edge, **options):
    stream = io.BytesIO()
    Image.new("RGB", (edge, edge), (10, 200, 90)).save(stream, "JPEG", **options)
    return stream.getvalue()


def slow_picture():
    """A JPEG within all limits that takes seconds: 25 million pixels, a hundred scans."""
    raw = jpeg(5000, progressive=True)
    start = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[start:-2] * (100 - raw.count(b"\xff\xda")) + b"\xff\xd9"


SLOW, SOUND = slow_picture(), jpeg(64)


def children():
    found = psutil.Process().children()
    return {child.pid for child in found if "prepare_child" in " ".join(child.cmdline())}


async def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def with_core(bundle, work, **options):
    async def run():
        core = RequestCore.open({"m": bundle.path}, CoreOptions(**options))
        await core.start()
        try:
            return await work(core)
        finally:
            await core.close()
            assert not children()

    return asyncio.run(run())


def in_time(core, timeout_s):
    core.options = replace(core.options, timeout_s=timeout_s)


async def busy_child(core):
    """Give the slow picture to a child, and return the request and the child."""
    await until(lambda: core._preparers._idle.qsize() == 2)
    before = {pid: psutil.Process(pid).cpu_times().user for pid in children()}
    asked = asyncio.create_task(core.classify("m", SLOW))

    def busy():
        return [pid for pid in before if psutil.Process(pid).cpu_times().user > before[pid] + 0.05]

    await until(busy)
    return asked, busy()[0]


def test_work_ends_with_its_deadline_and_others_go_on(tiny_bundle):
    async def work(core):
        await until(lambda: core._preparers._idle.qsize() == 2)
        first = children()
        in_time(core, 0.5)
        late = await asyncio.gather(
            *(core.classify("m", SLOW) for _ in range(2)), return_exceptions=True
        )
        assert [refusal.status for refusal in late] == [504, 504]
        in_time(core, 30)
        answers = await asyncio.gather(*(core.classify("m", SOUND) for _ in range(4)))
        (expected,) = load_bundle(tiny_bundle.path).predict([Image.open(io.BytesIO(SOUND))])
        for answer in answers:
            assert answer.predictions[0].probability == pytest.approx(expected.probability, 1e-5)
        assert not first & children() and core.ready

    with_core(tiny_bundle, work, threads=1)


def test_work_for_a_client_that_has_left_is_dropped(tiny_bundle):
    async def work(core):
        asked, child = await busy_child(core)
        asked.cancel()
        await until(lambda: not psutil.pid_exists(child))
        assert core.queued() == {"m": 0}
        assert (await core.classify("m", SOUND)).batch_rows == 1

    with_core(tiny_bundle, work, threads=1)


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGSEGV, 500), (signal.SIGKILL, 503)]
)  # a fault of a decoder, and a system that is short of memory
def test_a_child_that_dies_takes_one_request_along(tiny_bundle, how, status, caplog):
    async def work(core):
        asked, child = await busy_child(core)
        os.kill(child, how)
        with pytest.raises(Refusal) as refused:
            await asked
        assert refused.value.status == status
        await until(lambda: core._preparers._idle.qsize() == 2)
        idle = list(core._preparers._idle._queue)
        for child in children():  # which nobody misses
            os.kill(child, signal.SIGKILL)
        await until(lambda: all(child.ended for child in idle))
        assert (await core.classify("m", SOUND)).batch_rows == 1

    with_core(tiny_bundle, work, threads=1)
    assert ("ended with exit code -11" in caplog.text) == (status == 500)


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="limits memory as Linux does")
def test_too_little_memory_is_no_fault_of_the_picture(tiny_bundle):
    async def work(core):
        await until(lambda: core._preparers._idle.qsize() == 2)
        for pid in children():
            child = psutil.Process(pid)
            limit, _ = child.rlimit(psutil.RLIMIT_AS)
            assert limit - child.memory_info().vms < 1_200_000_000
            child.rlimit(psutil.RLIMIT_AS, (child.memory_info().vms + 30_000_000,) * 2)
        with pytest.raises(Refusal, match="memory does not suffice") as refused:
            await core.classify("m", jpeg(4000))
        assert refused.value.status == 503 and refused.value.retry_after_s == 1
        assert (await core.classify("m", SOUND)).batch_rows == 1

    with_core(tiny_bundle, work, threads=1)


def test_no_child_can_be_started_and_the_server_is_not_ready(tiny_bundle, monkeypatch, caplog):
    async def work(core):
        await until(lambda: not core.ready)
        with pytest.raises(Refusal, match="cannot be prepared now") as refused:
            await core.classify("m", SOUND)
        assert refused.value.status == 503 and core.failed is None
        monkeypatch.undo()
        await until(lambda: core.ready)
        assert (await core.classify("m", SOUND)).batch_rows == 1

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with_core(tiny_bundle, work, threads=1)
    assert caplog.text.count("could be started") <= 2


def test_threads_that_hang_are_not_ready_and_short_texts_need_none(tiny_text_bundle):
    go_on = threading.Event()

    async def work(core):
        in_time(core, 0.2)
        hanging = [core.parse(go_on.wait, SMALL_BODY + 1) for _ in range(core._processors)]
        late = await asyncio.gather(*hanging, return_exceptions=True)
        assert {refusal.status for refusal in late} == {504}
        assert not core.ready and core.failed is None
        in_time(core, 30)
        assert (await core.predict("m", ["a film"])).batch_rows == 1
        go_on.set()
        await until(lambda: core.ready)

    with_core(tiny_text_bundle, work)


def test_long_texts_get_what_the_bundle_says(tiny_text_bundle):
    texts = ["a good film, " * 3000, " " * 20_000 + "a dull film", "was the " * 5000 + "not good"]
    expected = load_bundle(tiny_text_bundle.path).predict(texts)

    async def work(core):
        await core.predict("m", ["a film"])
        assert not children()  # short texts need none
        answer = await core.predict("m", texts)
        assert children()
        return answer.predictions

    for found, prediction in zip(with_core(tiny_text_bundle, work), expected, strict=True):
        assert found.probability == pytest.approx(prediction.probability, abs=1e-5)


def test_the_largest_picture_can_be_set(tiny_bundle):
    async def work(core):
        with pytest.raises(
            Refusal, match=r"\(64 x 64\) has more than 0.004 million pixels"
        ) as refused:
            await core.classify("m", SOUND)
        assert refused.value.status == 413
        assert (await core.classify("m", jpeg(63))).batch_rows == 1

    with_core(tiny_bundle, work, limits=Limits(pixels=4000))
