"""Codes and scales against the digests that golden samples keep of them: exact, where no checkpoint is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from slope_compile.codes_file import codes_digest, scale_digest
from slope_compile.qdq.checks import Finding
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.chain.golden import Golden, KeptWeight


class KeptDigests:
    """What golden samples say of the weights that they were made with, and what a file holds of it.

    Args:
        golden: The samples.

    Attributes:
        name: Of their file.
        tensors: Weights of the file that are as the samples say.
        codes: How many codes these have.
    """

    def __init__(self, golden: Golden) -> None:
        self.name = golden.name
        self.tensors = self.codes = 0
        self._golden = golden
        self._seen: set[str] = set()
        self._findings: list[Finding] = []

    @classmethod
    def none(cls) -> KeptDigests:
        """Return what there is to compare with where there are no samples."""
        return cls(Golden(np.empty(0), {}))

    @property
    def declared(self) -> Mapping[str, KeptWeight]:
        """Bits and pattern of each weight, where the samples are of this file and say them."""
        return self._golden.weights if self.tensors else {}

    @property
    def why_not_told(self) -> str:
        """Why codes and scales cannot be compared; empty: they can."""
        if not self._golden.codes:
            return f"{self.name} keeps no digests of them"
        if not self.tensors:
            return f"{self.name} is of another model"
        return "" if self._golden.codes.keys() == self._golden.weights.keys() else f"{self.name} keeps none of scales"

    def watched(self, weights: Iterable[CodedWeight]) -> Iterator[CodedWeight]:
        """Yield weights as they come, each compared."""
        for weight in weights:
            if self._golden.codes:
                self._compare(weight)
            yield weight
            del weight  # the next one is read into what this one had

    def findings(self) -> list[Finding]:
        """Return what differs, when all have passed; nothing where the samples are of another model altogether."""
        if not self.tensors:
            return []
        missing = self._golden.codes.keys() - self._seen
        absent = [
            Finding(name, "missing", f"no product of the file multiplies with it; {self._says}") for name in missing
        ]
        return sorted([*self._findings, *absent], key=lambda finding: finding.tensor)

    @property
    def _says(self) -> str:
        return f"{self.name} was made with it"

    def _compare(self, weight: CodedWeight) -> None:
        name, kept = weight.name, self._golden
        if name not in kept.codes:
            if weight.codes is not None and name not in self._seen:
                self._findings.append(Finding(name, "extra", f"coded in the file; {kept.name} was made without it"))
            self._seen.add(name)
            return
        self._seen.add(name)
        if weight.codes is None:
            self._findings.append(Finding(name, "codes", f"stored as {weight.dtype}, not as codes"))
            return
        turned = weight.as_trained()
        if codes_digest(turned.stored) != kept.codes[name]:
            self._findings.append(Finding(name, "codes", f"are not those that {kept.name} was made with"))
            return
        self.tensors += 1
        self.codes += turned.stored.size
        if name in kept.weights and not _has_scale(turned, kept.weights[name]):
            self._findings.append(Finding(name, "scale", f"is not the one that {kept.name} was made with"))


def _has_scale(weight: CodedWeight, kept: KeptWeight) -> bool:
    scale = weight.channel_scale(kept.axis) if 0 <= kept.axis < weight.stored.ndim else None
    return scale is not None and scale_digest(scale) == kept.scale
