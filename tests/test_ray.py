"""Studies on a Ray cluster of two machines of one processor each."""

import time

import pytest

from mdpd_deploy.artifacts.folders import is_claimed
from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.study.engines import build_engine
from mdpd_deploy.study.plan import Ask, Plan
from mdpd_deploy.study.trial import run_trial

ray = pytest.importorskip("ray", reason="the package ray is not installed")


def where_am_i() -> str:
    time.sleep(1.0)  # so that a second one needs the other machine
    return ray.get_runtime_context().get_node_id()


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def trial_of(method, tiny_vit, digit_folder, steps):
    config = Config.model_validate(
        {
            "method": method,
            "data": {"path": str(digit_folder)},
            "backbone": {"name": str(tiny_vit)},
            "train": {"steps": steps, "batch": 8},
        }
    )
    ask = Ask(("classify",), (method,), (1.0,), (0,))
    plan = Plan(config, (ask,), {method: config}, {method: 0.01})
    return plan.sweep(plan.cells()[0])[0]


@pytest.mark.slow
def test_a_cluster_works_on_both_machines_and_is_told_to_stop(
    cluster, tmp_path, tiny_vit, digit_folder
):
    with pytest.raises(UserError, match=r"has the 2 processors .* \(the largest has 1\): lower"):
        build_engine("ray", jobs=1, threads=2, gpus=0)
    with pytest.raises(UserError, match=r"has the 1 processors and a GPU"):
        build_engine("ray", jobs=1, threads=1, gpus=1)

    with build_engine("ray", jobs=1, threads=1, gpus=0) as engine:
        places = [engine.submit(where_am_i) for _ in range(2)]  # at a time only on both
        assert len({place.result() for place in places}) == 2
        short = trial_of("probe", tiny_vit, digit_folder, 2)
        long = trial_of("norms", tiny_vit, digit_folder, 100_000)
        ended = engine.submit(run_trial, tmp_path, short, 1)
        engine.submit(run_trial, tmp_path, long, 1)
        assert ended.result().summary["status"] == "completed"
        cut = tmp_path / "trials" / long.folder / "run"
        deadline = time.monotonic() + 120
        while not (cut / "metrics.jsonl").exists():  # its training is under way
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.shutdown(wait=True, cancel_futures=True)  # as an interrupt does
        while is_claimed(cut):
            assert time.monotonic() < deadline, "the training outlived its cancelled task"
            time.sleep(0.05)
    assert (cut / "config.yaml").is_file() and not (cut / "summary.json").exists()
