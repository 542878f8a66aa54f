"""The bench of layers has a time for every kind of the model, and no more time than the whole."""

import sys

import pytest

from refengine.backends.cpu import native
from tools.bench import layers


@pytest.mark.parametrize("name", ["cpu", "numpy"])
def test_a_prompt_and_a_step_by_kind_of_layer(monkeypatch, capsys, name):
    if name == "cpu" and native.load() is None:
        pytest.skip("there is no compiler for the loops")
    given = f"layers tiny --backend {name} --dtype float32 --threads 1 --prompt 40 --rounds 1"
    monkeypatch.setattr(sys, "argv", given.split())
    layers.main()
    prompt, *step = capsys.readouterr().out.split("\nA step of 1")
    for text in [prompt, *step]:
        for kind, count in (("mamba", 4), ("attention", 2), ("experts", 3)):
            assert f"{kind}** | {count} |" in text or f"{kind} | {count} |" in text
    assert len(step) == (name == "cpu")
    assert "| ssd_scan |" in prompt
