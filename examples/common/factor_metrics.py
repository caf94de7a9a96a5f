"""How well a code [N, K] keeps known factors [N, F] apart: MIG, DCI, SAP and the FactorVAE score.

They follow disentanglement_lib (Locatello et al., ICML 2019), on scikit-learn. The code is the posterior's mean.

    MIG        per factor: the information that the best latent has of it less that of the second, over its entropy,
               each latent cut into 20 bins of equal width
    DCI        R[k, f], the importance of latent k for factor f in gradient-boosted trees. Disentanglement: is each
               latent for one factor; completeness: is each factor in one latent; informativeness: the trees' accuracy
    SAP        per factor: the accuracy of a linear SVM on the best latent less that on the second; "sap_correlation",
               for factors that are numbers: the squared correlation with the best latent less that with the second
    FactorVAE  64 samples that share one factor: the latent that varies least among them, by majority vote, names it

A code that holds each factor in a latent of its own scores 1, and one of noise about 0, with two exceptions. The
FactorVAE score of noise is that of guessing, 1/F. SAP by accuracy does not reach 1: the second latent is right by
chance, and a line, one class against the rest, cannot cut the middle values out of the eight on a latent. By
correlation it does; disentanglement_lib's own tests of a perfect code take that one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC

BINS = 20
TREES = 20  # for each value of a factor, where disentanglement_lib has 100
VARIANCE_BATCH, INACTIVE_STD = 64, 0.05  # of the FactorVAE score
EPSILON = 1e-11


def scores(
    codes: np.ndarray, factors: np.ndarray, sizes: Sequence[int], *, train: int, test: int, votes: int, seed: int = 0
) -> dict[str, float]:
    """All of them, of a code of every combination of the factors. `train` and `test` points are for the classifiers,
    and of `votes` rounds the FactorVAE score has half as many again for its test."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(codes))
    learn, check = order[:train], order[train : train + test]
    parts = (codes[learn], factors[learn], codes[check], factors[check])
    return {
        "mig": mig(codes, factors),
        **dci(*parts, seed=seed),
        "sap": sap(*parts, seed=seed),
        "sap_correlation": sap_correlation(codes, factors),
        "factor_vae": factor_vae(codes, sizes, votes=votes, rng=rng),
    }


def mig(codes: np.ndarray, factors: np.ndarray) -> float:
    binned = [np.digitize(code, np.histogram_bin_edges(code, BINS)[:-1]) for code in codes.T]
    gaps = []
    for factor in factors.T:
        second, best = sorted(mutual_info_score(factor, code) for code in binned)[-2:]
        gaps.append((best - second) / mutual_info_score(factor, factor))
    return float(np.mean(gaps))


def dci(
    codes: np.ndarray, factors: np.ndarray, test_codes: np.ndarray, test_factors: np.ndarray, *, seed: int = 0
) -> dict[str, float]:
    importances, accuracies = [], []
    for factor, test_factor in zip(factors.T, test_factors.T, strict=True):
        trees = GradientBoostingClassifier(n_estimators=TREES, random_state=seed).fit(codes, factor)
        importances.append(trees.feature_importances_)
        accuracies.append(trees.score(test_codes, test_factor))
    matrix = np.stack(importances, axis=1)
    return {
        "disentanglement": _one_each(matrix),
        "completeness": _one_each(matrix.T),
        "informativeness": float(np.mean(accuracies)),
    }


def _one_each(importances: np.ndarray) -> float:
    """1 less the entropy of each row, in units of its largest one, weighted by the row's share of the whole."""
    rows = importances.sum(1)
    p = importances / (rows[:, None] + EPSILON)
    entropy = -(p * np.log(p + EPSILON)).sum(1) / np.log(importances.shape[1])
    return float((rows / rows.sum()) @ (1 - entropy))


def sap(
    codes: np.ndarray, factors: np.ndarray, test_codes: np.ndarray, test_factors: np.ndarray, *, seed: int = 0
) -> float:
    gaps = []
    for factor, test_factor in zip(factors.T, test_factors.T, strict=True):
        accuracies = []
        for k in range(codes.shape[1]):
            line = LinearSVC(C=0.01, class_weight="balanced", random_state=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                line.fit(codes[:, [k]], factor)
            accuracies.append(line.score(test_codes[:, [k]], test_factor))
        second, best = sorted(accuracies)[-2:]
        gaps.append(best - second)
    return float(np.mean(gaps))


def sap_correlation(codes: np.ndarray, factors: np.ndarray) -> float:
    latents = codes.shape[1]
    covariance = np.cov(codes, factors, rowvar=False)
    variance = np.diag(covariance)  # a constant latent has none, and no correlation
    known = np.maximum(np.outer(variance[:latents], variance[latents:]), EPSILON)
    second, best = np.sort(covariance[:latents, latents:] ** 2 / known, axis=0)[-2:]
    return float((best - second).mean())


def factor_vae(codes: np.ndarray, sizes: Sequence[int], *, votes: int, rng: np.random.Generator) -> float:
    """`codes` in the order of the grid: the last factor changes fastest."""
    variances = codes.var(0)
    active = variances >= INACTIVE_STD**2
    if not active.any():
        return 0.0
    shared = rng.integers(len(sizes), size=votes + votes // 2)  # which factor a round's samples share
    points = rng.integers(np.array(sizes), size=(len(shared), VARIANCE_BATCH, len(sizes)))
    rounds = np.arange(len(shared))
    points[rounds, :, shared] = points[rounds, :1, shared]
    grid = np.ravel_multi_index(tuple(np.moveaxis(points, -1, 0)), tuple(sizes))
    steadiest = (codes[:, active][grid].var(1) / variances[active]).argmin(1)
    counts = np.zeros((active.sum(), len(sizes)), int)
    np.add.at(counts, (steadiest[:votes], shared[:votes]), 1)
    return float((counts.argmax(1)[steadiest[votes:]] == shared[votes:]).mean())
