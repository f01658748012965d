"""`agreement`: from end to end, what is deployed decides as the trained model does.

Letters: z, t - the scores of one sample, trained and deployed; eps - how far the hops between them allow a score to
move, times the largest |z|.

    KL(softmax z || softmax t) = ln E_z[exp(t - z)] - E_z[t - z] <= (2 eps)^2 / 8 = eps^2 / 2     (Hoeffding's lemma)
    z[a] - z[b] <= 2 eps          where a is the largest score of z and b that of t

so a decision may turn only where the trained model itself hardly decides. Where rounding alone moves the outputs
anywhere, as quantized activations may from end to end, the figures are told and the check is `not checked`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slope_compile.verify.chain.places import DEFAULT, ENGINE, ONNX, TRAINED, WORDS, Chain
from slope_compile.verify.chain.runners import Array, Arrays, samples_of
from slope_compile.verify.parity.outputs import compare, require_found, told_only
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, listed, significant

NAME = "agreement"
FLOAT_SLACK = 1e-12  # of the divergence, which float64 adds up from numbers around 1


def check_agreement(chain: Chain, end_to_end: Callable[[], Tolerance]) -> Check:
    """Compare what is deployed with the trained model: the engine where it ran, else ONNX Runtime as deployed.

    Args:
        chain: The places, and what ran there.
        end_to_end: Gives how far the hops allow the outputs to be from one another, together.
    """
    reference, whose = _reference(chain)
    together = end_to_end()
    allowed = together if together.relative < 1 else None  # beyond, nothing can be told from outputs
    place = ENGINE if ENGINE in chain.ran else DEFAULT
    chain.require_steady(ONNX)
    tested = (chain.ran[ENGINE] if place == ENGINE else chain.run(DEFAULT))[: len(reference)]
    found = compare(reference, tested, allowed or told_only(reference))
    figures: dict[str, Any] = {"from": TRAINED, "to": place, "judged": allowed is not None}
    figures |= {
        "samples": sum(samples_of(feed) for feed in chain.feeds()[: len(reference)]),
        **found.figures(allowed is not None),
    }
    problems = [] if allowed is None or found.within else [found.told(allowed)]
    undecided = False
    told = [f"within {found.relative:.1e} of the largest output"]
    if found.detections is not None:
        partners = f"{found.detections.off} of {found.detections.count} detections have no partner"
        told = [partners if allowed is None else str(found.detections)]
    for name in reference[0]:
        pairs = [(a[name], b[name]) for a, b in zip(reference, tested, strict=True)]
        if found.detections is None and all(a.ndim == 2 and a.shape[1] > 1 for a, _ in pairs):
            z, t = (np.concatenate([pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
            scores, wrong = _scores(z, t, allowed)
            figures |= scores if len(reference[0]) == 1 else {name: scores}
            told = [_told(scores), *(told if len(reference[0]) > 1 else [])]
            problems += [f"'{name}' {one}" for one in wrong]
            undecided |= scores.get("decided") == 0
    if allowed is not None:
        figures |= {"tolerance": significant(allowed.relative), "derivation": allowed.derivation}
    require_found(found)
    if problems:
        return Check(NAME, "fail", f"{place} against {whose}: {listed(problems)}", figures)
    found_so = f"{place} against {whose} on {figures['samples']} samples: {', '.join(told)}"
    if allowed is None or undecided:
        why = f"rounding alone may move outputs by {together.relative:.2g} of the largest"
        why = why if together.relative < math.inf else together.derivation
        why += ", more than the trained model decides any sample by" if undecided else ""
        return Check(NAME, "not checked", f"{found_so} (told, not judged: {why})", figures)
    return Check(NAME, "pass", found_so, figures)


def divergence(z: Array, t: Array) -> Array:
    """Return KL(softmax z || softmax t) in nats of each sample, float64 (n,).

    Args:
        z: Scores (n, classes).
        t: Scores of the same shape.
    """
    p, q = _log_softmax(z), _log_softmax(t)
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))


def _log_softmax(scores: Array) -> Array:
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _scores(z: Array, t: Array, allowed: Tolerance | None) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of one output of scores, and what is wrong with it."""
    best, chosen, rows = z.argmax(axis=1), t.argmax(axis=1), np.arange(len(z))
    turned = float((z[rows, best] - z[rows, chosen]).max(initial=0.0))
    kl = divergence(z, t)
    figures: dict[str, Any] = {
        "top1_agreement": round(float(np.mean(best == chosen)), 6),
        "turned": int(np.count_nonzero(best != chosen)),
        "turned_margin": significant(turned),
        "kl_mean": significant(float(kl.mean())),
        "kl_max": significant(float(kl.max())),
    }
    if allowed is None:
        return figures, []
    eps = allowed.relative * float(np.abs(z).max(initial=0.0))
    second, first = np.partition(z, -2, axis=1)[:, -2:].T  # [n], [n]
    figures |= {
        "margin_allowed": significant(2 * eps),
        "kl_allowed": significant(eps**2 / 2),
        "decided": int(np.count_nonzero(first - second > 2 * eps)),
    }
    problems = []
    if not turned <= 2 * eps:
        problems.append(
            f"turns {figures['turned']} decisions that the trained model makes by up to {turned:.2g}, "
            f"allowed {2 * eps:.2g}"
        )
    if not kl.max() <= eps**2 / 2 + FLOAT_SLACK:
        problems.append(f"diverges by up to {kl.max():.2g} nats, allowed {eps**2 / 2:.2g}")
    return figures, problems


def _told(scores: dict[str, Any]) -> str:
    mean, largest = scores["kl_mean"], scores["kl_max"]
    return f"top-1 {scores['top1_agreement']:.2%} the same, KL {mean:.1e} nats, at most {largest:.1e}"


def _reference(chain: Chain) -> tuple[Sequence[Arrays], str]:
    """Return the trained model's outputs, or its golden ones where it cannot be had here, and whose they are."""
    if chain.model is None and chain.golden is None:
        raise NotCheckedError("neither the trained model nor golden outputs were given")
    try:
        chain.trained_model()
    except NotCheckedError:
        if chain.golden is None:
            raise
        return [chain.golden().outputs], "the golden outputs"
    return chain.run(TRAINED), WORDS[TRAINED]
