"""A bundle whose files change after it was opened, and the session that it keeps."""

import os
import pickle
import shutil
import threading
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from mdpd_deploy import export_run, load_bundle
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.checks.golden import replay_golden
from mdpd_deploy.errors import UserError
from mdpd_deploy.export import write as packing
from mdpd_deploy.export.triton.repository import write_repository
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.runtimes.base import only

pytest.importorskip("onnxruntime", reason="runs exported graphs")


@pytest.fixture(scope="module")
def with_weights_beside(tiny_run, tmp_path_factory):
    """A real bundle whose weights lie in `model.onnx.data`; treat it as read-only."""
    out = tmp_path_factory.mktemp("beside") / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "export_onnx", partial(export_onnx, external_above_bytes=1000))
        return export_run(tiny_run.path, out=out, metric_gate=False, golden="synthetic").path


@pytest.fixture
def beside(with_weights_beside, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(with_weights_beside, tmp_path / "beside")


@pytest.fixture
def inside(tiny_bundle, tmp_path):
    """A copy of a bundle whose weights lie in the graph's file."""
    return shutil.copytree(tiny_bundle.path, tmp_path / "inside")


def overwrite(file):
    with file.open("r+b") as stream:
        stream.write(os.urandom(file.stat().st_size))


def truncate(file):
    os.truncate(file, 100)


def answers(runner, bundle):
    return only(runner(bundle.golden().arrays))


@pytest.mark.parametrize("damage", [overwrite, truncate])
@pytest.mark.parametrize("kind", ["beside", "inside"])
def test_an_open_model_does_not_see_its_files_change(kind, damage, request):
    bundle = load_bundle(request.getfixturevalue(kind))
    runner = bundle.runner()
    before = answers(runner, bundle)
    for name in ("model.onnx", "model.onnx.data"):
        if (bundle.path / name).is_file():
            damage(bundle.path / name)
    assert np.array_equal(answers(runner, bundle), before)


FILES = ["model.onnx", "model.onnx.data", "golden.safetensors", "parity.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_since_the_bundle_was_opened_is_not_used(name, beside):
    bundle = load_bundle(beside)
    overwrite(beside / name)
    with pytest.raises(UserError, match=f"{name} is not the file that was exported"):
        replay_golden(bundle, bundle.runner())


def test_a_swapped_file_of_another_length_is_not_read_whole(beside):
    bundle = load_bundle(beside)
    os.truncate(beside / "model.onnx.data", 1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(UserError, match=r"model\.onnx\.data is not the file"):
        bundle.runner()


def test_bare_norms_that_changed_are_not_used(inside, tmp_path):
    bundle = load_bundle(inside)
    file = inside / "bare_norms.safetensors"
    file.write_bytes(save({name: array + 1 for name, array in load_file(file).items()}))
    with pytest.raises(UserError, match="is not the file"):
        bundle.write_bare_graph(tmp_path / "bare.onnx")


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "preprocessor/preprocess.json", "golden.safetensors"]
)
def test_a_repository_gets_no_file_that_changed(name, beside, tmp_path):
    bundle = load_bundle(beside)
    overwrite(beside / name)
    with pytest.raises(UserError, match=f"{name} is not the file"):
        write_repository({"digits": bundle}, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def raws(bundle):
    return list(load_golden(bundle.task().golden).raws)


def test_one_session_serves_every_call(inside):
    bundle = load_bundle(inside)
    inputs = raws(bundle)
    first = bundle.predict(inputs)
    shutil.rmtree(inside)  # nothing is opened again
    assert (
        bundle.predict(inputs)
        == first
        == bundle.run_mixed([(bundle.task().name, raw) for raw in inputs])
    )


def test_threads_share_the_session(inside):
    bundle = load_bundle(inside)
    inputs, found = raws(bundle), []
    threads = [
        threading.Thread(target=lambda: found.append(bundle.predict(inputs))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4


def test_a_pickled_bundle_opens_its_own_session(inside):
    bundle = load_bundle(inside)
    inputs = raws(bundle)
    first = bundle.predict(inputs)
    assert pickle.loads(pickle.dumps(bundle)).predict(inputs) == first


FORK = """
import os, sys
from mdpd_deploy import export_run, load_bundle
from mdpd_deploy.artifacts.golden import load_golden

bundle = load_bundle(sys.argv[1])
raws = list(load_golden(bundle.task().golden).raws)
first = bundle.predict(raws)
child = os.fork()
if child == 0:
    os._exit(7 if bundle.predict(raws) == first else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_predicts(inside, run_python):
    done = run_python("-W", "ignore", "-c", FORK, str(inside), OMP_NUM_THREADS="2")
    assert done.stdout.strip() == "7", done.stderr
