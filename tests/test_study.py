"""Studies without training: plans, order, choice of rates, suites, results, tables, pictures."""

import json
import threading
import time
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np
import pytest

from mdpd_deploy.artifacts.outputs import write_outputs
from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import sha256_file
from mdpd_deploy.report.charts import Dot, pareto_front, trade_off_chart
from mdpd_deploy.report.intervals import crossed_interval
from mdpd_deploy.study.engines import build_engine
from mdpd_deploy.study.plan import Ask, Plan, read_plan, write_plan
from mdpd_deploy.study.results import Latency, collect
from mdpd_deploy.study.schedule import choose, run_trials
from mdpd_deploy.study.study_page import kind_of, write_page
from mdpd_deploy.study.suites import expand_tasks, group_means, group_of
from mdpd_deploy.study.table import markdown
from mdpd_deploy.study.trial import Outcome, find_outcome, run_trial

ASK = Ask(("rte", "sst2"), ("probe", "norms"), (0.3, 1.0, 3.0), (0, 1, 2))


def plan_of(*asks: Ask) -> Plan:
    labels = {label for ask in asks for label in ask.methods}
    return Plan(
        Config(),
        asks,
        {label: Config(method=label) for label in labels},
        dict.fromkeys(labels, 0.01),
    )


def summary(score: float | None, *, test: float | None = None, **more) -> dict:
    found = {
        "primary_metric": "accuracy",
        "metrics": {"deployed": {"accuracy": score}},
        "params": {"trained": 10, "deployed_delta": 4},
        "memory": {"peak_live_bytes": 2_000_000},
        "time": {"train_s": 3.0},
        "data": {"train": 800, "validation": 200, "test": 2000},
        "majority_test": {"accuracy": 0.1},
        **more,
    }
    if test is not None:
        found["metrics_test"] = {"deployed": {"accuracy": test}}
    return found


class Instant(Executor):
    """Answers each trial from a table instead of training it."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def submit(self, fn, /, *words, **_):
        study, trial, _threads = words
        self.asked.append(trial)
        future = Future()
        score = self.answer(trial)
        found = (
            Outcome(study / trial.folder, None, "it broke")
            if score is None
            else Outcome(study / trial.folder, summary(score, test=score / 2))
        )
        future.set_result(found)
        return future


def run(plan, folder, answer):
    engine = Instant(answer)
    return run_trials(plan, folder, engine, threads=1, say=lambda line: None), engine.asked


# --- the plan -------------------------------------------------------------------------------------


def test_a_cell_collects_what_several_asks_want():
    more = Ask(("sst2",), ("norms", "full"), (1.0,), (0, 1, 2, 3))
    cells = {(c.task, c.method): c for c in plan_of(ASK, more).cells()}
    assert len(cells) == 5
    assert cells["rte", "probe"].seeds == (0, 1, 2)
    assert cells["sst2", "norms"].factors == (0.3, 1.0, 3.0)
    assert cells["sst2", "norms"].seeds == (0, 1, 2, 3)
    assert cells["sst2", "full"].factors == (1.0,)


def test_a_trial_has_its_own_rate_seed_and_task():
    plan = plan_of(ASK)
    trial = plan.trial(plan.cells()[0], 3.0, 2)
    assert (trial.config.task, trial.config.method) == ("rte", "probe")
    assert (trial.config.optim.lr, trial.config.train.seed, trial.config.out) == (0.03, 2, None)
    assert trial.folder.parts == ("rte", "probe", "lr×3-seed2")


def test_a_plan_is_read_back(tmp_path):
    base = Config.model_validate({"train": {"steps": 7}})
    fewer = replace(ASK, left_out=("glue/wnli is left out: it is not there.",))
    write_plan(tmp_path, base, [ASK, fewer])
    assert read_plan(tmp_path) == (base, (ASK, fewer), {})


@pytest.mark.parametrize(
    "text",
    [
        None,
        "schema: 99\nasks: []\nbase: {}\n",
        "schema: 1\nasks: [1]\nbase: {}\n",
        "- 1\n",
        "asks: [",
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(UserError, match=r"compare\.yaml"):
        read_plan(tmp_path)


# --- the order ------------------------------------------------------------------------------------


def test_the_best_rate_of_the_first_seed_is_repeated_with_the_others(tmp_path):
    scores = {0.3: 0.5, 1.0: 0.6, 3.0: 0.8}
    outcomes, asked = run(plan_of(ASK), tmp_path, lambda trial: scores[trial.factor])
    assert len(asked) == 4 * (3 + 2)
    assert all(t.factor == 3.0 for t in asked if t.seed != 0)
    assert [o.factor for o in outcomes] == [3.0] * 4
    assert set(outcomes[0].seeds) == {0, 1, 2}


def test_of_equal_rates_the_one_nearest_to_the_default_is_taken(tmp_path):
    equal = {f: Outcome(tmp_path, summary(0.5)) for f in (0.1, 0.3, 1.0, 3.0)}
    assert choose(equal) == 1.0
    assert choose({f: Outcome(tmp_path, None, "broke") for f in (1.0, 3.0)}) is None
    undefined = {f: Outcome(tmp_path, summary(None)) for f in (0.3, 1.0)}
    assert choose(undefined) == 1.0
    assert choose(undefined | {3.0: Outcome(tmp_path, summary(0.1))}) == 3.0


def test_a_failed_trial_is_told_and_the_rest_goes_on(tmp_path):
    def answer(trial):
        broken = trial.method == "probe" and (trial.task == "rte" or trial.factor == 3.0)
        return None if broken else 0.1 * trial.factor + 0.2

    outcomes, asked = run(plan_of(ASK), tmp_path, answer)
    rows = {(r.task, r.method): r for r in results_of(outcomes).rows}
    assert rows["rte", "probe"].score is None and len(rows["rte", "probe"].failures) == 3
    assert rows["sst2", "probe"].factor == 1.0 and len(rows["sst2", "probe"].failures) == 1
    assert not rows["rte", "norms"].failures
    assert len([t for t in asked if t.method == "probe" and t.task == "rte"]) == 3
    assert "failed: rte probe lr×0.3 seed 0: it broke" in markdown(results_of(outcomes))


def test_what_is_finished_is_not_run_again(tmp_path):
    plan = plan_of(ASK)
    cell = plan.cells()[0]
    for trial in plan.sweep(cell):
        folder = tmp_path / "trials" / trial.folder / "run"
        (folder / "model").mkdir(parents=True)
        (folder / "config.yaml").write_text(trial.config.to_yaml())
        (folder / "model" / "labels.json").write_text('{"names": []}')
        files = {"labels.json": sha256_file(folder / "model" / "labels.json")}
        more = dict(schema=1, task="rte", method="probe", backbone={}, files=files)
        (folder / "summary.json").write_text(json.dumps(summary(0.7, **more)))
    _, asked = run(plan, tmp_path, lambda trial: 0.5)
    assert not [t for t in asked if (t.task, t.method, t.seed) == (cell.task, cell.method, 0)]


# --- engines --------------------------------------------------------------------------------------


def test_local_trials_run_side_by_side_and_no_more_than_asked():
    now, most, lock = [0], [0], threading.Lock()

    def work():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1

    with build_engine("local", jobs=2, threads=1, gpus=0) as engine:
        for future in [engine.submit(work) for _ in range(6)]:
            future.result()
    assert most[0] == 2


def test_an_unknown_engine_is_refused():
    with pytest.raises(UserError, match="Choose one of: local, ray"):
        build_engine("slurm", jobs=1, threads=1, gpus=0)


def test_what_an_interrupt_leaves_waiting_is_never_started(tmp_path):
    with build_engine("local", jobs=1, threads=1, gpus=0) as engine:
        started: list[int] = []
        for number in range(5):
            engine.submit(lambda n=number: (started.append(n), time.sleep(0.2)))
        time.sleep(0.05)
        engine.shutdown(wait=True, cancel_futures=True)
    assert started == [0]
    build_engine("local", jobs=1, threads=1, gpus=0).shutdown()  # the next one starts anew


def test_a_run_that_other_options_made_is_no_finished_trial(tmp_path):
    """As when a method's default has changed since: refused, not shown under the new one."""
    plan = plan_of(ASK)
    trial = plan.sweep(plan.cells()[0])[0]
    folder = tmp_path / "trials" / trial.folder / "run"
    folder.mkdir(parents=True)
    optim = trial.config.optim.model_copy(update={"lr": 0.5})
    before = trial.config.model_copy(update={"optim": optim})
    (folder / "config.yaml").write_text(before.to_yaml())
    outcome = find_outcome(tmp_path, trial)
    assert outcome.summary is None and "optim.lr=0.5" in outcome.reason
    (folder / "config.yaml").write_text(trial.config.to_yaml())
    assert find_outcome(tmp_path, trial) is None
    (folder / "summary.json").write_text("{")
    assert "summary.json" in find_outcome(tmp_path, trial).reason


def test_long_names_of_methods_are_cut_and_stay_apart():
    labels = ["mdpd:unipt+" + "+".join(f"loss.logits={n}" for n in range(40)) + end for end in "ab"]
    plan = plan_of(Ask(("rte",), tuple(labels), (1.0,), (0,)))
    names = [plan.sweep(cell)[0].folder.parts[1] for cell in plan.cells()]
    assert len(set(names)) == 2 and all(len(name) < 200 for name in names)


def test_what_is_set_for_norms_and_head_is_swept_too():
    config = Config.model_validate({"method": "mdpd", "optim": {"head_lr": 0.02}})
    plan = Plan(config, (Ask(("rte",), ("mdpd",), (3.0,), (0,)),), {"mdpd": config}, {"mdpd": 0.01})
    optim = plan.sweep(plan.cells()[0])[0].config.optim
    assert (optim.lr, optim.head_lr, optim.norm_lr) == (0.03, 0.06, None)


def test_a_child_that_fails_leaves_its_own_words(tmp_path):
    config = Config.model_validate({"task": "classify", "data": {"path": str(tmp_path / "none")}})
    plan = Plan(
        config, (Ask(("classify",), ("probe",), (1.0,), (0,)),), {"probe": config}, {"probe": 1}
    )
    outcome = run_trial(tmp_path, plan.sweep(plan.cells()[0])[0], 1)
    assert outcome.summary is None
    assert "does not exist" in outcome.reason and "Traceback" not in outcome.reason
    assert str(tmp_path) not in outcome.reason  # reports name no places
    assert (outcome.folder / "log.txt").is_file()


# --- suites ---------------------------------------------------------------------------------------


def test_the_mean_of_vtab_is_over_groups_and_that_of_glue_leaves_wnli_out():
    assert group_of("vtab/dtd") == group_of("vtab-full/svhn") == "natural"
    assert group_of("vtab/my-own") == group_of("classify") == "other"
    means = group_means(
        {"vtab/dtd": 0.6, "vtab/svhn": 0.8, "vtab/eurosat": 0.9, "vtab/dmlab": 0.3, "vtab/mine": 0}
    )
    assert means == pytest.approx(
        {"natural": 0.7, "specialized": 0.9, "structured": 0.3, "mean": 1.9 / 3}
    )
    assert group_means({"glue/rte": 0.5, "glue/cola": 0.7, "glue/wnli": 0.1}) == {"glue": 0.6}


def glue_root(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        rows = ["index\tsentence1\tsentence2\tlabel"]
        rows += [f"{i}\tone {i}\ttwo\t{('not_', '')[i % 2]}entailment" for i in range(8)]
        for split in ("train", "dev"):
            (root / name / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return root


def test_tasks_of_a_suite_that_cannot_be_read_are_named(tmp_path):
    glue_root(tmp_path, "RTE", "QNLI")  # the columns of RTE, which QNLI does not have
    said: list[str] = []
    base = Config.model_validate({"data": {"path": str(tmp_path)}})
    assert expand_tasks(["glue"], base, said.append) == ["glue/rte"]
    assert len(said) == 8
    assert any(line.startswith("glue/cola is left out") and "CoLA" in line for line in said)
    assert any(line.startswith("glue/qnli is left out") and "'question'" in line for line in said)


def test_a_suite_of_which_nothing_can_be_read_is_refused(tmp_path):
    base = Config.model_validate({"data": {"path": str(tmp_path)}})
    with pytest.raises(UserError, match="none of its tasks"):
        expand_tasks(["glue"], base, lambda line: None)
    with pytest.raises(UserError, match="needs --data"):
        expand_tasks(["vtab"], Config(), lambda line: None)
    with pytest.raises(UserError, match="CoLA"):  # named itself, so it is no warning
        expand_tasks(["glue/cola"], base, lambda line: None)


def test_any_folder_in_the_layout_of_vtab_is_a_task(tmp_path):
    from PIL import Image

    for name in ("mine", "svhn"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
        for file in ("train800.txt", "val200.txt"):
            (tmp_path / name / file).write_text("a.png 0\na.png 1\n")
    base = Config.model_validate({"data": {"path": str(tmp_path)}})
    said: list[str] = []
    assert expand_tasks(["vtab"], base, said.append) == ["vtab/svhn", "vtab/mine"]
    assert len(said) == 18


# --- results --------------------------------------------------------------------------------------


def results_of(outcomes, latency=None):
    facts = dict(
        backbone="b", length="5 steps", batch=8, rate="its own default", machine="m", left_out=[]
    )
    return collect(
        outcomes, latency=latency or {}, latency_setting="onnx" if latency else "", facts=facts
    )


def test_rows_hold_mean_and_deviation_on_test_and_the_choice_on_validation(tmp_path):
    scores = {0: 0.6, 1: 0.7, 2: 0.8}
    outcomes, _ = run(plan_of(ASK), tmp_path, lambda trial: scores[trial.seed])
    row = results_of(outcomes).rows[0]
    assert row.split == "test"
    assert row.score.mean == pytest.approx(0.35) and row.score.sd == pytest.approx(0.05)
    assert row.validation.mean == pytest.approx(0.7)
    assert (row.factor, row.lr) == (1.0, 0.01)
    assert row.scores == pytest.approx({0: 0.3, 1: 0.35, 2: 0.4})
    assert row.sweep == {"0.3": 0.6, "1": 0.6, "3": 0.6}
    assert row.majority == 0.1  # of test as well


def test_every_table_names_the_split_of_its_scores_and_its_size(tmp_path):
    outcomes, _ = run(plan_of(ASK), tmp_path, lambda trial: 0.5)
    text = markdown(results_of(outcomes))
    title = "accuracy on test, 2,000 examples; always the most frequent class 10.0"
    assert f"**rte · {title}**" in text and "each on the split that its own table names" in text
    one, _ = run(plan_of(replace(ASK, tasks=("rte",))), tmp_path, lambda trial: 0.5)
    assert results_of(one).overall_words == "accuracy on test, 2,000 examples"


def test_the_gap_to_the_best_is_taken_seed_by_seed(tmp_path):
    """Seeds differ by 0.2, methods by 0.01 to 0.03 on each: only the paired interval sees it."""
    below = {0: 0.02, 1: 0.04, 2: 0.06}
    level = {0: 0.4, 1: 0.6, 2: 0.8}

    def score(trial):
        return level[trial.seed] - below[trial.seed] * (trial.method == "probe")

    outcomes, _ = run(plan_of(replace(ASK, tasks=("rte",))), tmp_path, score)
    best, other = results_of(outcomes).rows
    assert (best.method, best.gap) == ("norms", None)
    assert other.gap.mean == pytest.approx(-0.02)  # on test, half of validation
    reach = 4.303 * 0.01 / 3**0.5  # Student's factor of three
    assert other.gap.ci95 == pytest.approx((-0.02 - reach, -0.02 + reach), abs=1e-5)
    assert "| probe | 28.0 ± 9.0 | -2.0 [-4.5, +0.5] |" in markdown(results_of(outcomes))


def test_the_gap_counts_test_examples_as_a_sample_where_runs_kept_their_outputs(tmp_path):
    """Two methods that err on other examples: three seeds that agree do not make them certain."""
    rng = np.random.default_rng(0)
    labels = np.zeros(400, dtype=np.int64)
    right = {method: rng.random(400) < 0.7 for method in ("probe", "norms")}

    def answers(method, seed):
        flips = np.random.default_rng(seed).random(400) < 0.02
        return np.eye(2, dtype=np.float32)[(~(right[method] ^ flips)).astype(int)]

    def score(trial):
        return 2 * float((answers(trial.method, trial.seed).argmax(1) == 0).mean())

    class Keeping(Instant):
        def submit(self, fn, /, *words, **more):
            study, trial, _ = words
            run = study / trial.folder / "run"
            run.mkdir(parents=True, exist_ok=True)
            found = {"labels": labels, "deployed": answers(trial.method, trial.seed)}
            write_outputs(run, {"test": found})
            return super().submit(fn, *words, **more)

    plan = plan_of(replace(ASK, tasks=("rte",)))
    outcomes = run_trials(plan, tmp_path, Keeping(score), threads=1, say=lambda line: None)
    _, other = results_of(outcomes).rows
    assert other.gap.examples and other.gap.seeds == 3
    low, high = other.gap.ci95
    differ = right["probe"] != right["norms"]
    expected = 2 * 1.96 * differ.mean() ** 0.5 / 20  # of a paired difference of 400 examples
    assert high - low == pytest.approx(expected, rel=0.25)
    assert "95 % interval over seeds and test examples" in markdown(results_of(outcomes))


def test_the_interval_of_crossed_seeds_and_examples_holds_what_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        seeds, examples = rng.normal(0, 0.3, (5, 1)), rng.normal(0, 7, (1, 50))
        _, low, high = crossed_interval(seeds + examples + rng.normal(0, 7, (5, 50)))
        hits += low <= 0 <= high
    assert 0.92 <= hits / 400 <= 0.98  # Student's over the seeds holds it in 70 %


def test_a_trial_that_its_engine_loses_is_a_row_and_the_rest_goes_on(tmp_path):
    class Losing(Instant):
        def submit(self, fn, /, *words, **_):
            if words[1].method != "probe":
                return super().submit(fn, *words)
            lost = Future()
            lost.set_exception(OSError(28, "No space left on device"))
            return lost

    plan = plan_of(replace(ASK, tasks=("rte",)))
    engine = Losing(lambda trial: 0.9)
    outcomes = run_trials(plan, tmp_path, engine, threads=1, say=lambda line: None)
    best, lost = results_of(outcomes).rows
    assert best.score.mean == pytest.approx(0.45) and lost.score is None
    assert "the engine lost it (OSError: [Errno 28] No space left on device)" in lost.failures[0]


def test_tables_and_page_show_every_method_with_its_time(tmp_path):
    best = {"probe": 0.5, "norms": 0.9}
    outcomes, _ = run(plan_of(ASK), tmp_path, lambda trial: best[trial.method])
    latency = {
        "probe": Latency(1.0, None, "same"),
        "norms": Latency(1.2, (1.1, 1.3), "cannot tell"),
    }
    results = results_of(outcomes, latency)
    text = markdown(results)
    assert text.index("| norms | 45.0") < text.index("| probe | 25.0")
    assert "1.20 [1.10, 1.30]" in text and "1 (same graph)" in text
    assert "- time of norms: cannot tell" in text and "time of probe" not in text
    write_page(tmp_path / "report.html", results)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "Learning rates" in page
    plain = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert len(plain["rows"]) == 4 and plain["latency"]["norms"]["ci95"] == [1.1, 1.3]


def test_a_method_without_a_score_on_every_task_has_no_overall_one(tmp_path):
    outcomes, _ = run(
        plan_of(ASK), tmp_path, lambda trial: None if str(trial).startswith("rte probe") else 0.5
    )
    results = results_of(outcomes)
    assert results.overall("probe") is None
    assert results.overall("norms") == pytest.approx(0.25)


def test_the_one_number_of_a_suite_leaves_wnli_and_foreign_tasks_out(tmp_path):
    scores = {"glue/rte": 0.6, "glue/cola": 0.8, "glue/wnli": 0.2}
    plan = plan_of(Ask(tuple(scores), ("probe",), (1.0,), (0,)))
    outcomes, _ = run(plan, tmp_path, lambda trial: 2 * scores[trial.task])
    results = results_of(outcomes)
    assert results.overall("probe") == pytest.approx(0.7)
    assert results.overall_words == "mean score over 2 tasks"
    assert "mean glue (2 of 8)" in markdown(results)


def test_a_method_that_was_asked_for_on_fewer_tasks_is_not_ranked(tmp_path):
    plan = plan_of(ASK, Ask(("rte",), ("full",), (1.0,), (0,)))
    outcomes, _ = run(plan, tmp_path, lambda trial: 0.9 if trial.method == "full" else 0.5)
    results = results_of(outcomes)
    assert not results.complete("full") and results.overall("full") is None
    assert results.methods[-1] == "full"
    assert "unequal sweeps" in markdown(results) and "×1 for full" in markdown(results)


def test_scores_on_the_data_that_chose_the_rate_are_called_optimistic(tmp_path):
    plan = plan_of(ASK)
    outcomes, _ = run(plan, tmp_path, lambda trial: 0.5)
    assert "optimistic" not in markdown(results_of(outcomes))  # scored on test
    for outcome in outcomes:
        for found in (*outcome.sweep.values(), *outcome.seeds.values()):
            found.summary.pop("metrics_test", None)
    assert "rte, sst2: the score is on the data that chose the rate" in markdown(
        results_of(outcomes)
    )
    once, _ = run(plan_of(replace(ASK, factors=(1.0,))), tmp_path, lambda trial: 0.5)
    for found in (found for outcome in once for found in outcome.seeds.values()):
        found.summary.pop("metrics_test")
    assert "optimistic" not in markdown(results_of(once))  # one rate, the last weights
    for found in (found for outcome in once for found in outcome.seeds.values()):
        found.summary["weights_chosen_on"] = "validation"
    assert "or the weights kept, so it is optimistic" in markdown(results_of(once))


# --- pictures -------------------------------------------------------------------------------------


def test_the_front_joins_what_nothing_beats():
    dots = [Dot("a", 1, 1), Dot("b", 2, 3), Dot("c", 3, 2), Dot("d", 4, 4), Dot("e", 2, 2)]
    assert [dot.name for dot in pareto_front(dots)] == ["a", "b", "d"]


def test_kinds_of_methods():
    kinds = {"mdpd:lst+loss.logits=1": 1, "side:unipt": 2, "prompt": 2, "lora": 3, "probe+a=1": 4}
    assert {label: kind_of(label) for label in kinds} == kinds


def test_a_trade_off_names_every_dot_once():
    dots = [Dot(f"method-{n}", 1 + n % 3 / 10, n / 7, 0.1, 1 + n % 4) for n in range(12)]
    svg = trade_off_chart(dots, x_label="cost", y_label="worth", log=True)
    for dot in dots:
        assert svg.count(f">{dot.name}<") == 1
    assert svg == trade_off_chart(dots, x_label="cost", y_label="worth", log=True)
