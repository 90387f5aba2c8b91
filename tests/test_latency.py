"""The estimator and the measuring core, on a clock whose truth is known: nothing here can flake."""

import numpy as np
import pytest

from mdpd_deploy.serve.latency.cells import Plan, join, measure
from mdpd_deploy.serve.latency.estimate import (
    MARGIN,
    Ratio,
    control_words,
    factor,
    paired_ratio,
    percentiles_ms,
    verdict,
)

QUICK = Plan(seconds=3.0, warmup_seconds=0.1)


class BusyMachine:
    """A clock that calls move on: jitter, slow phases, and now and then a long pause."""

    def __init__(self, seed=0, base_ms=5.0):
        self.now = 0
        self.base = base_ms * 1e6
        self.rng = np.random.default_rng(seed)
        self.order = []

    def clock(self):
        return self.now

    def call(self, cost, name=""):
        def run(index):
            phase = 1 + 0.4 * np.sin(self.now / 4e8)  # the whole machine slows down and recovers
            pause = 20.0 if self.rng.random() < 0.01 else 1.0
            jitter = self.rng.lognormal(0, 0.05)
            self.now += int(self.base * cost * phase * pause * jitter)
            self.order.append((name, index))

        return run


def bench(costs, *, seed=0, plan=QUICK, inputs=4):
    machine = BusyMachine(seed)
    calls = {name: machine.call(cost, name) for name, cost in costs.items()}
    cell = measure(calls, inputs=inputs, plan=plan, seed=seed, clock=machine.clock)
    return cell, machine


def judge(cell, name, margin=MARGIN["cpu"]):
    ratios = {
        key: paired_ratio(times, cell.times["deployed"], seed=1)
        for key, times in cell.times.items()
    }
    return ratios[name], verdict(ratios[name], ratios["again"], margin)


@pytest.mark.parametrize("truth", [0.5, 0.9, 1.2, 3.0])
def test_a_known_ratio_is_recovered_through_drift_and_pauses(truth):
    cell, _ = bench({"deployed": 1.0, "again": 1.0, "rival": truth})
    ratio, said = judge(cell, "rival")
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median == pytest.approx(truth, rel=0.02)
    assert said.code == ("slower" if truth > 1 else "faster")
    assert factor(ratio.median) in said.words


@pytest.mark.parametrize("seed", range(5))
def test_identical_models_show_no_difference(seed):
    cell, _ = bench({"deployed": 1.0, "again": 1.0, "rival": 1.0}, seed=seed)
    for name in ("again", "rival"):
        assert judge(cell, name)[1].code == "same"
    assert judge(cell, "again")[1].words == "same speed within ±5%"


def test_five_percent_more_work_is_detected():
    cell, _ = bench({"deployed": 1.0, "again": 1.0, "slept": 1.05})
    ratio, said = judge(cell, "slept", MARGIN["cuda"])
    assert ratio.low > 1 and said.code == "slower"
    assert "slower" in judge(cell, "slept", MARGIN["cpu"])[1].words  # whichever side of 5 % it fell


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        over = rng.integers(900_000, 1_100_000, size=60)
        times = (over * 1.1 * rng.lognormal(0, 0.05, size=60)).astype(np.int64)
        ratio = paired_ratio(times, over, seed=seed, resamples=400)
        hits += ratio.low <= 1.1 <= ratio.high
    assert 180 <= hits <= 199


def openings_of(truth, effect, seed, count=5, rounds=40):
    """Return times of a model and its rival, of which each opening runs at a speed of its own."""
    rng = np.random.default_rng(seed)
    over = rng.integers(900_000, 1_100_000, size=count * rounds)
    own = np.repeat(rng.normal(0, effect, size=count), rounds)
    times = over * truth * np.exp(own) * rng.lognormal(0, 0.02, size=len(over))
    return times.astype(np.int64), over, (rounds,) * count


def test_openings_that_differ_widen_the_interval_until_it_covers_the_truth():
    covered, misled = 0, 0
    for seed in range(200):
        times, over, openings = openings_of(1.1, 0.03, seed)
        ratio = paired_ratio(times, over, openings=openings, seed=seed)
        covered += ratio.low <= 1.1 <= ratio.high
        one = paired_ratio(times[:40], over[:40], seed=seed, resamples=200)
        misled += not one.low <= 1.1 <= one.high
    assert 180 <= covered <= 199  # 95 %
    assert misled > 100  # what a single opening would have claimed


def test_openings_count_alike_however_many_rounds_each_had():
    over = np.full(30, 1000)
    times = np.array([1000] * 20 + [2000] * 10)
    ratio = paired_ratio(times, over, openings=(20, 10), seed=0)
    assert ratio.openings == pytest.approx((1.0, 2.0))
    assert ratio.median == pytest.approx(2**0.5) and ratio.rounds == 30


@pytest.mark.parametrize("plan", [Plan(), Plan(seconds=7.0), Plan(openings=3, fewest_rounds=10)])
def test_openings_share_the_time_of_a_cell(plan):
    shares = [plan.share(opening) for opening in range(plan.openings)]
    for name in ("min_rounds", "min_seconds", "max_seconds", "fewest_rounds"):
        total = sum(getattr(share, name) for share in shares)
        assert getattr(plan, name) <= total < getattr(plan, name) + plan.openings
    if plan.seconds:
        assert sum(share.seconds for share in shares) == pytest.approx(plan.seconds)


def test_later_openings_are_warmed_up_briefly_and_all_are_joined():
    machine = BusyMachine()
    plan = Plan(openings=3, seconds=3.0)
    shares = []
    for opening in range(3):
        calls = {name: machine.call(1.0, name) for name in ("deployed", "again")}
        share = plan.share(opening)
        shares.append(measure(calls, inputs=8, plan=share, seed=opening, clock=machine.clock))
    warm = [share.warmup["deployed"].seconds for share in shares]
    assert warm[0] >= 1 and all(0.2 <= later < 0.5 for later in warm[1:])
    cell = join(shares)
    assert cell.openings == tuple(share.rounds for share in shares)
    assert cell.rounds == sum(cell.openings) and cell.elapsed >= 3
    assert cell.times["again"][cell.openings[0]] == shares[1].times["again"][0]
    assert cell.warmup["deployed"].calls == sum(s.warmup["deployed"].calls for s in shares)


def test_the_same_times_and_seed_give_the_same_interval():
    times, over = np.arange(100, 200), np.full(100, 120)
    assert paired_ratio(times, over, seed=3) == paired_ratio(times, over, seed=3)
    assert paired_ratio(times, over, seed=3).median == pytest.approx(149.5 / 120, rel=1e-3)


def test_ratios_pair_calls_of_one_round():
    """Times that only differ between rounds cancel; unpaired medians would not show 2."""
    over = np.array([1, 10, 100, 1000, 10_000] * 10)
    ratio = paired_ratio(over * 2, over, seed=0)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(
    ("low", "high", "control", "code"),
    [
        (0.99, 1.02, (0.99, 1.01), "same"),
        (0.96, 1.04, (0.999, 1.001), "same"),
        (0.98, 1.06, (0.93, 1.02), "cannot-tell"),  # inside the A/A spread of ±7.5 %
        (1.03, 1.06, (0.90, 1.01), "cannot-tell"),  # excludes 1, but so could identical models
        (1.06, 1.15, (0.92, 1.08), "cannot-tell"),  # excludes 1, reaches into the A/A spread
        (0.90, 1.20, (0.99, 1.01), "cannot-tell"),
        (0.85, 2.59, (0.35, 2.90), "cannot-tell"),  # however widely the machine scatters
        (1.10, 1.20, (0.98, 1.05), "slower"),
        (0.70, 0.80, (0.98, 1.05), "faster"),
        (0.93, 0.94, (0.98, 1.10), "cannot-tell"),  # the spread counts in both directions
    ],
)
def test_verdicts_say_no_more_than_the_intervals(low, high, control, code):
    ratio = Ratio((low * high) ** 0.5, low, high, 100)
    aa = Ratio(1.0, *control, 100)
    assert verdict(ratio, aa, 0.05).code == code


def test_a_machine_that_cannot_tell_says_what_it_saw():
    said = verdict(Ratio(1.49, 0.85, 2.59, 60), Ratio(1.0, 0.5, 2.0, 60), 0.05)
    assert said.code == "cannot-tell" and "0.85× to 2.59×" in said.words
    assert "±100.0%" in said.words


def test_a_small_but_certain_difference_is_named_inside_the_margin():
    said = verdict(Ratio(1.03, 1.028, 1.032, 500), Ratio(1.0, 0.999, 1.001, 500), 0.05)
    assert said.code == "same" and "3.0% slower" in said.words
    assert verdict(Ratio(1.03, 1.028, 1.032, 500), Ratio(1, 1, 1, 500), 0.02).code == "slower"


def test_the_control_warns_of_a_noisy_machine():
    assert "same speed" in control_words(Ratio(1.0, 0.98, 1.01, 100), 0.05)
    assert "±20.0%" in control_words(Ratio(1.0, 0.97, 1.2, 100), 0.05)


def test_p99_needs_a_thousand_calls():
    times = np.arange(1, 1001, dtype=np.int64) * 1_000_000
    assert percentiles_ms(times[:999])["p99_ms"] is None
    found = percentiles_ms(times)
    assert found["p50_ms"] == pytest.approx(500.5)
    assert found["p95_ms"] == pytest.approx(950.05)
    assert found["p99_ms"] == pytest.approx(990.01)


def test_every_round_runs_every_variant_once_on_one_input_in_changing_order():
    costs = {"deployed": 1.0, "again": 1.0, "rival": 1.0}
    cell, machine = bench(costs, inputs=3)
    calls = machine.order[-3 * cell.rounds :]
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    for number, one in enumerate(rounds):
        assert {name for name, _ in one} == set(costs)
        assert {index for _, index in one} == {number % 3}
    orders = {tuple(name for name, _ in one) for one in rounds}
    assert len(orders) == 6
    assert [one[0][0] for one in rounds] != [
        one[0][0] for one in _rounds_of(bench(costs, inputs=3, seed=1))
    ]


def _rounds_of(result):
    cell, machine = result
    calls = machine.order[-3 * cell.rounds :]
    return [calls[start : start + 3] for start in range(0, len(calls), 3)]


def test_a_cell_stops_at_a_hundred_rounds_and_ten_seconds():
    slow, _ = bench({"deployed": 1.0, "again": 1.0}, plan=Plan())  # about 10 ms a round
    assert slow.reached and slow.rounds >= 100 and 10 <= slow.elapsed < 11
    slower, _ = bench({"deployed": 100.0, "again": 1.0}, plan=Plan())  # about 0.5 s a round
    assert not slower.reached and slower.rounds < 100 and slower.elapsed >= 20


def test_seconds_are_measured_in_full_and_few_rounds_are_still_enough_for_an_interval():
    cell, _ = bench({"deployed": 1.0, "again": 1.0}, plan=Plan(seconds=15.0))
    assert cell.elapsed >= 15 and cell.reached
    short, _ = bench({"deployed": 1.0, "again": 1.0}, plan=Plan(seconds=1e-9))
    assert short.rounds == Plan().fewest_rounds and not short.reached


def test_warm_up_lasts_until_calls_settle():
    now = 0
    calls = 0

    def cold(_index):
        nonlocal now, calls
        calls += 1
        now += 100_000_000 if calls < 60 else 10_000_000  # slow for its first 60 calls

    cell = measure({"deployed": cold}, inputs=8, plan=Plan(seconds=0.1), seed=0, clock=lambda: now)
    warmup = cell.warmup["deployed"]
    assert warmup.settled and warmup.calls >= 16 and warmup.seconds >= 1
    assert calls == warmup.calls + cell.rounds


@pytest.mark.parametrize(
    ("plan", "cap"), [(Plan(warmup_cap=5.0), 5), (Plan(seconds=0.1), 2), (Plan(seconds=4.0), 4)]
)
def test_warm_up_gives_up_at_the_cap_and_says_so(plan, cap):
    now = 0
    step = 1_000_000.0

    def drifting(_index):
        nonlocal now, step
        step *= 1.02
        now += int(step)

    cell = measure({"deployed": drifting}, inputs=8, plan=plan, seed=0, clock=lambda: now)
    assert not cell.warmup["deployed"].settled
    assert cap <= cell.warmup["deployed"].seconds < 2 * cap


def test_a_slow_model_is_still_warmed_up_ten_times():
    now = 0

    def slow(_index):
        nonlocal now
        now += 8_000_000_000

    cell = measure({"deployed": slow}, inputs=8, plan=Plan(), seed=0, clock=lambda: now)
    assert cell.warmup["deployed"].calls == 16  # whole rotations of the inputs


def test_a_call_faster_than_the_clock_keeps_ratios_finite():
    plan = Plan(seconds=0.0, warmup_seconds=0.0, warmup_cap=0.0)
    cell = measure(
        {"deployed": lambda _: None, "again": lambda _: None},
        inputs=1,
        plan=plan,
        seed=0,
        clock=lambda: 0,
    )
    assert paired_ratio(cell.times["again"], cell.times["deployed"], seed=0).median == 1.0
