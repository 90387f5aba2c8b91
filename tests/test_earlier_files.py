"""Runs and bundles that earlier versions wrote: they open, verify, predict, export and serve.

`fixtures/first` holds what version 0.1 wrote under schema 1 of the manifest, with the data and the
encoders of its runs; `/before` in it stands for the folder that it lies in.
"""

import http.client
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mdpd_deploy import export_run, load_bundle, verify_bundle
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.cli import main

pytest.importorskip("onnxruntime", reason="runs exported graphs")

KINDS = ("pictures", "pairs")


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before") / "first"
    shutil.copytree(Path(__file__).parent / "fixtures" / "first", folder)
    for path in (*folder.glob("run-*/*.json"), *folder.glob("run-*/config.yaml")):
        path.write_text(path.read_text().replace("/before", str(folder)))
    return folder


def predicted(bundle, asked, before, capsys):
    main(["predict", str(bundle), *asked, "--json"])
    return json.loads(capsys.readouterr().out)["predictions"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_bundle_is_sound_and_predicts_the_same(kind, before, capsys, monkeypatch):
    monkeypatch.chdir(before)
    assert not verify_bundle(before / f"bundle-{kind}").unsound
    stored = json.loads((before / f"{kind}.json").read_text())["predictions"]
    asked = ["pairs.csv"] if kind == "pairs" else [row["input"] for row in stored]
    found = predicted(f"bundle-{kind}", asked, before, capsys)
    assert [row.get("label") for row in found] == [row.get("label") for row in stored]
    for value in ("score", "probability"):
        numbers = [[row.get(value, 0) for row in rows] for rows in (found, stored)]
        assert numbers[0] == pytest.approx(numbers[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_run_is_exported_and_answers_as_its_earlier_bundle(kind, before, tmp_path):
    run, old = Run.open(before / f"run-{kind}"), load_bundle(before / f"bundle-{kind}")
    new = load_bundle(export_run(run.path, out=tmp_path / "bundle").path)
    raws = run.load_evaluation()["validation"].inputs
    for one, other in zip(old.predict(raws), new.predict(raws), strict=True):
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_earlier_bundles_are_served(before):
    folders = [str(before / f"bundle-{kind}") for kind in KINDS]
    with subprocess.Popen(
        [sys.executable, "-m", "mdpd_deploy", "serve", *folders, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            found = re.search(r"http://[\d.]+:(\d+)", process.stdout.readline())
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
            pair = {"inputs": [["the film was good", "a bad film"]]}
            body = json.dumps(pair).encode()
            connection.request(
                "POST", "/v1/models/bundle-pairs/predict", body,
                {"Content-Type": "application/json"},
            )  # fmt: skip
            answer = json.loads(connection.getresponse().read())
            connection.close()
            assert isinstance(answer["predictions"][0]["score"], float), answer
        finally:
            process.terminate()
