"""The order of the trials, and what is known when they are done."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from math import inf, log
from pathlib import Path

from mdpd_deploy.errors import MdpdError
from mdpd_deploy.study.plan import Cell, Plan, Trial
from mdpd_deploy.study.trial import TRIALS, Outcome, find_outcome, run_trial
from mdpd_deploy.tasks.metrics import metric_text


@dataclass(frozen=True)
class CellOutcome:
    """What a task's trials with one method gave.

    Attributes:
        cell: Task and method.
        sweep: Factor → outcome on the first seed.
        factor: The chosen one; None when every trial of the sweep failed.
        lr: The learning rate at that factor.
        seeds: Seed → outcome at the chosen factor.
    """

    cell: Cell
    sweep: dict[float, Outcome]
    factor: float | None
    lr: float | None
    seeds: dict[int, Outcome]


def run_trials(
    plan: Plan, study: Path, engine: Executor, *, threads: int, say: Callable[[str], None]
) -> list[CellOutcome]:
    """Run what has not run yet, and return every cell.

    A trial that fails is reported, and the rest goes on.

    Args:
        plan: The study.
        study: Its folder.
        engine: Runs trials, as many at a time as it likes.
        threads: Of each trial.
        say: Takes one line for each trial that ends.
    """
    cells = plan.cells()
    total = sum(len(cell.factors) + len(cell.seeds) - 1 for cell in cells)
    outcomes: dict[Path, Outcome] = {}
    waiting: dict[Future[Outcome], tuple[Trial, Cell]] = {}
    already: set[Future[Outcome]] = set()

    def submit(trial: Trial, cell: Cell) -> None:
        found = find_outcome(study, trial)
        future: Future[Outcome]
        if found is None:
            future = engine.submit(run_trial, study, trial, threads)
        else:
            future = Future()
            future.set_result(found)
            already.add(future)
        waiting[future] = trial, cell

    try:
        for cell in cells:
            for trial in plan.sweep(cell):
                submit(trial, cell)
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                trial, cell = waiting.pop(future)
                outcome = outcomes[trial.folder] = _ended(future, study / TRIALS / trial.folder)
                words = f"{_words(outcome)}{' (found)' if future in already else ''}"
                say(f"[{len(outcomes)}/{total}] {trial}: {words}")
                if trial.seed != cell.seeds[0]:
                    continue
                if all(other.folder in outcomes for other in plan.sweep(cell)):
                    chosen = choose({t.factor: outcomes[t.folder] for t in plan.sweep(cell)})
                    repeats = [] if chosen is None else plan.repeats(cell, chosen)
                    total -= len(cell.seeds) - 1 - len(repeats)
                    for repeat in repeats:
                        submit(repeat, cell)
    except BaseException:
        engine.shutdown(wait=False, cancel_futures=True)
        raise
    return [_cell_outcome(plan, cell, outcomes) for cell in cells]


def _ended(future: Future[Outcome], folder: Path) -> Outcome:
    """Return an outcome, also of a trial that its engine lost: a node that died, a full disk."""
    try:
        return future.result()
    except MdpdError:  # bad input, which the other trials would meet too
        raise
    except Exception as err:  # noqa: BLE001 - an engine may lose a trial in any way
        reason = str(err).strip().partition("\n")[0]
        return Outcome(folder, None, f"the engine lost it ({type(err).__name__}: {reason})")


def choose(sweep: dict[float, Outcome]) -> float | None:
    """Return the factor with the best validation metric, of equal ones that nearest to 1."""
    ended = [factor for factor, outcome in sweep.items() if outcome.summary is not None]

    def worth(factor: float) -> tuple[float, float]:
        score = sweep[factor].score()
        return -inf if score is None else score, -abs(log(factor))

    return max(ended, key=worth, default=None)


def _cell_outcome(plan: Plan, cell: Cell, outcomes: dict[Path, Outcome]) -> CellOutcome:
    sweep = {trial.factor: outcomes[trial.folder] for trial in plan.sweep(cell)}
    factor = choose(sweep)
    if factor is None:
        return CellOutcome(cell, sweep, None, None, {})
    seeds = {cell.seeds[0]: sweep[factor]}
    seeds |= {trial.seed: outcomes[trial.folder] for trial in plan.repeats(cell, factor)}
    rate = plan.trial(cell, factor, cell.seeds[0]).config.optim.lr
    return CellOutcome(cell, sweep, factor, rate, seeds)


def _words(outcome: Outcome) -> str:
    if outcome.summary is None:
        return f"FAILED, {outcome.reason}"
    metric = outcome.summary["primary_metric"]
    seconds = outcome.summary["time"]["train_s"]
    return f"{metric} {metric_text(outcome.score())} on validation, {seconds:.0f} s"
