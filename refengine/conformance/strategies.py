"""Hypothesis strategies that draw cases; with `refengine.conformance.cases`, all that needs Hypothesis."""

from __future__ import annotations

from refengine.conformance.cases import MENUS, Case
from refengine.spec.config import InputError

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise InputError("drawing cases needs Hypothesis: pip install 'refengine[verify]'") from None

ANY_LAYERS = st.text("M*E-", min_size=1, max_size=5)
CUTS = st.lists(st.integers(0, 63), max_size=4)  # for refengine.conformance.cases.cut


@st.composite
def cases(draw, layers: str | st.SearchStrategy = ANY_LAYERS, max_length: int = 20, **fixed) -> Case:
    """Return a strategy of cases with these layers, or with one to five of any kind; `fixed` sizes stay."""
    letters = layers if isinstance(layers, str) else draw(layers)
    sizes = {key: fixed[key] if key in fixed else draw(st.sampled_from(menu)) for key, menu in MENUS.items()}
    sizes |= {"batch": draw(st.integers(1, 3)), "length": draw(st.integers(1, max_length))} | fixed
    return Case(layers=letters, seed=draw(st.integers(0, 9999)), **sizes)
