"""What the held-out loss refuses. Runs end to end are in test_main.py and test_layouts.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_vlm.config.schema import Config
from megatron_vlm.train import heldout


def test_a_mixture_that_changes_during_the_run_is_refused(monkeypatch):
    # Losses per data set go by the number of the set in the mixture: another mixture would give them wrong names.
    monkeypatch.setattr(heldout, "open_loader", lambda config, share: SimpleNamespace(sources=("a", "c")))
    stepper = SimpleNamespace(sources=("a", "b"))
    with pytest.raises(ValueError, match="changed while the run went on: its data sets were a, b, now a, c"):
        heldout.evaluate(Config(), stepper, None)  # type: ignore[arg-type]
