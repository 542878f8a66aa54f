"""The variables of launchers give the rank of this process; a wrong one is a sentence."""

import pytest

from refengine import InputError
from refengine.cli import main
from refengine.ranks.launcher import MPIEXEC, TORCHRUN, Launch, launched

LAUNCHERS = {"torchrun": (TORCHRUN,), "mpiexec": MPIEXEC}
CASES = [(launcher, names) for launcher, rows in LAUNCHERS.items() for names in rows]


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets the four variables of a launcher, and no others; None: not set."""
    for _, names in CASES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")

    def chosen(names, values):
        for name, value in zip(names, values, strict=True):
            if value is not None:
                monkeypatch.setenv(name, value)

    return chosen


@pytest.mark.parametrize("launcher, names", CASES)
def test_the_rank_is_that_of_the_launcher(environment, launcher, names):
    assert launched() == Launch()
    environment(names, ("3", "8", "1", None))
    assert launched() == Launch(launcher, 3, 8, 1, 1)


@pytest.mark.parametrize("launcher, names", CASES)
@pytest.mark.parametrize(
    "at, value", [(0, ""), (0, "x"), (0, "-1"), (1, "0"), (1, "2.0"), (2, "²"), (3, "0"), (1, "9" * 5000)]
)
def test_a_wrong_variable_is_named_in_one_sentence(environment, capsys, launcher, names, at, value):
    environment(names, [value if i == at else good for i, good in enumerate(("0", "1", "0", "1"))])
    with pytest.raises(InputError, match=f"{names[at]} = '"):
        launched()
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"refengine: the environment variable {names[at]} = ")


def test_a_rank_beyond_the_number_of_ranks_is_refused(environment):
    environment(TORCHRUN, ("2", "2", None, None))
    with pytest.raises(InputError, match="RANK = 2 is not below WORLD_SIZE = 2"):
        launched()
