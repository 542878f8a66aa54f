"""`import refengine` has few names, all listed, and a traceback shows them by the same names."""

import pickle
import subprocess
import sys

import pytest

import refengine

PUBLIC = {"End", "Engine", "InputError", "Options", "Scores", "Token", "__version__", "load"}


def test_the_package_lists_what_it_exports_and_has_it():
    assert set(dir(refengine)) == set(refengine.__all__) == PUBLIC
    assert all(getattr(refengine, name) for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        refengine.nothing  # noqa: B018


def test_an_input_error_is_called_by_its_public_name_and_survives_pickling():
    script = "import refengine; refengine.load('no such model')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("refengine.InputError: there is no model")
    error = pickle.loads(pickle.dumps(refengine.InputError("a sentence")))
    assert type(error) is refengine.InputError and str(error) == "a sentence"
