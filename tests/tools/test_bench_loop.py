"""The bench of the loop runs, and counts the time of its calls."""

import sys

from tools.bench import loop


def test_it_prints_the_cost_of_the_loop_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loop", "tiny", "--cost"])
    loop.main()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["1", "8", "32"]


def test_all_calls_are_counted_and_slots_are_full(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loop", "tiny", "--slots", "2", "--prompts", "4", "--new", "16"])
    loop.main()
    name, busy, seconds, over, *_ = (
        cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")[1:]
    )
    assert name == "2" and float(busy) > 0.9 and float(seconds) > 0 and float(over) > 0.3
