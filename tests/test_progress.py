"""What a user sees while training: never a stale or contradicting figure, and never silence."""

import io
import re

import pytest
from rich.console import Console

from mdpd_deploy.train.progress import ProgressBar


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def lines_of(steps, seconds_a_step, *, evaluate=()):
    """What a log file holds after so many steps."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=80, force_terminal=False)
    with ProgressBar(steps, console=console, clock=clock) as bar:
        for step in range(1, steps + 1):
            clock.now += seconds_a_step
            bar.update(step, loss=10 / step, samples_per_s=16 / seconds_a_step)
            if step in evaluate:
                values = {"deployed": step / 1000, "side": step / 2000}
                bar.evaluated(step, "validation", 200, "accuracy", values)
    return out.getvalue().splitlines()


def test_a_log_file_gets_a_line_for_each_tenth_with_the_time_left():
    lines = lines_of(100, 0.1)
    assert [line.split(" ·")[0] for line in lines] == [f"step {n}/100" for n in range(10, 101, 10)]
    assert lines[4] == "step 50/100 · loss 0.2 · 160 examples/s · 5.0 s left"


def test_slow_steps_are_not_silent():
    lines = lines_of(100, 8.0)
    said = [int(re.search(r"\d+", line).group()) for line in lines]
    assert all(8 * (b - a) <= 32 for a, b in zip([0, *said], said, strict=False))


def test_a_line_holds_one_score_and_says_of_what():
    lines = lines_of(100, 0.1, evaluate=(30, 60, 100))
    scores = [line for line in lines if "accuracy" in line]
    assert scores[1] == (
        "step 60/100 · accuracy on validation, 200 examples: deployed 0.0600, side 0.0300"
    )
    assert len(scores) == 3 and all("accuracy" not in line for line in lines if "loss" in line)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_bar_shows_step_and_time_left_at_any_width(width):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with ProgressBar(123_456, console=console, clock=clock) as bar:
        for step in range(1, 4001):
            clock.now += 0.05
            bar.update(step, loss=0.98765, samples_per_s=12345.6)
            if step == 1000:
                bar.evaluated(step, "validation", 200, "accuracy", {"deployed": 0.8125})
        bar.bar.refresh()
        shown = out.getvalue().splitlines()[-1].split("\r")[-1]
    assert "4000/123456" in shown and re.search(r"1:39:3\d", shown)
    assert "loss 0.9877" in shown and ("validation 0.8125 at 1000" in shown or width < 80)


def test_silence_is_kept_where_it_was_asked_for():
    out = io.StringIO()
    with ProgressBar(10, enabled=False, console=Console(file=out, force_terminal=True)) as bar:
        bar.update(10, 1.0, None)
        bar.say("a word")
    assert out.getvalue() == ""
