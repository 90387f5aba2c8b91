"""The demo's figures, as its table and its page show them; `make demo` runs all of it."""

import pytest

from mdpd_deploy.commands.demo import _figures, _print, _write_page


@pytest.fixture
def figures(tiny_run, tiny_bundle, tmp_path):
    """What the demo would have found with short runs on other pictures."""
    ratio = {"variant": "bare", "median": 1.01, "ci95": (0.8, 1.3), "words": "cannot tell"}
    latency = {"ratios": [ratio], "warnings": ["this machine was busy"], "folder": tmp_path / "l"}
    found = _figures(tiny_run, tiny_run, tiny_run, tiny_bundle, latency)
    return {**found, "page": str(tmp_path / "demo.html")}


def test_norms_trained_directly_stand_beside_what_is_deployed(
    figures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    _print(figures)
    _write_page(tmp_path / "demo.html", figures)
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    for shown in (capsys.readouterr().out, page):
        assert "accuracy, norms and head trained directly" in shown
        assert shown.index("linear probe") < shown.index("norms and head trained directly")
        assert "cannot tell" in shown and "this machine was busy" in shown
        assert "validation, 797 digits" in shown
    assert 'href="l/latency.svg"' in page and 'href="report.html"' in page
