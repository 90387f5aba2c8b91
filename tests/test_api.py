"""The examples in the docstrings of the public functions, run in the order a user would."""

import doctest

import pytest

import mdpd_deploy


@pytest.mark.usefixtures("unwarmed")
def test_the_docstring_examples_run(tmp_path, digit_folder, tiny_vit):
    names = {"folder": tmp_path, "pictures": digit_folder, "encoder": tiny_vit}
    for name in ("fit", "export_run", "load_bundle", "bench_latency"):
        function = getattr(mdpd_deploy, name)
        tests = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
        examples = [test for test in tests if test.examples]
        assert examples, f"{name} has no example"
        for test in examples:
            assert doctest.DocTestRunner().run(test).failed == 0, name
