from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mutation_runs import make_runs

from slope_compile.verify.laws.digests import Digests, check_digests
from slope_compile.verify.verdict import Verdict, attempt


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The runs to be copied and corrupted, by name."""
    return make_runs(tmp_path_factory.mktemp("mutations"))


@pytest.fixture
def only_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as it is, but that of the checks only `digest` is made: the others have their own trials."""

    def digest(*_: Any, digests: Digests, **__: Any) -> Verdict:
        return Verdict((attempt("digest", lambda: check_digests(digests)),))

    monkeypatch.setattr("slope_compile.verify.run.verify_model", digest)
    monkeypatch.setattr("slope_compile.bundle.verify.verify_model", digest)
