"""What a command asks of a verification beyond what the recipe says."""

from __future__ import annotations

from dataclasses import dataclass

from slope_compile.artifacts import FileDigest, RunFolder


@dataclass(frozen=True)
class Asked:
    """How one verification is to be made.

    Args:
        baseline: The run that this one is compared with: the last release.
        trust_engine: Load an engine although no manifest of ours has its sha256.
    """

    baseline: RunFolder | None = None
    trust_engine: bool = False

    def key(self) -> dict[str, str]:
        """Return what a verdict depends on besides the run: empty if nothing was asked."""
        key = {"engine": "loaded without a manifest"} if self.trust_engine else {}
        if self.baseline is not None:
            key["baseline"] = FileDigest.of(self.baseline.path / "manifest.json").sha256
        return key
