# SPDX-License-Identifier: Apache-2.0
"""What a quantised base does to a linear map, and thin factors that undo it.

A device computes with ``Q(W) = W + E``. Errors are measured at the map's output over calibration
inputs X: ``||E X||_F = ||E S||_F`` with ``S S^T = X X^T``. Without S all inputs count alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorikit.proto.tensors import Float32
from lorikit.server.aggregate.product import Float64

Matrix = Float32 | Float64

DAMPING = 1e-3
"""What is added to the moments' diagonal, as a share of its mean: inputs nobody showed exist."""


def whitening(second_moments: Matrix, *, damping: float = DAMPING) -> Float64:
    """S with ``S S^T = M + eps I``, lower triangular [d_in, d_in].

    Args:
        second_moments: M = X X^T, [d_in, d_in], any scale.
        damping: eps as a share of the mean of M's diagonal; above 0.

    Raises:
        ValueError: M is not finite, not square or not positive semidefinite.
    """
    moments = np.array(second_moments, np.float64)
    if moments.ndim != 2 or len(moments) != moments.shape[1] or not np.isfinite(moments).all():
        raise ValueError(f"moments must be finite and square, got {moments.shape}")
    mean = float(np.trace(moments)) / len(moments)
    moments[np.diag_indices(len(moments))] += damping * (mean or 1.0)
    try:
        return np.asarray(np.linalg.cholesky(moments), np.float64)
    except np.linalg.LinAlgError as error:
        raise ValueError("second moments are not positive semidefinite") from error


def best_factors(matrix: Matrix, rank: int, root: Float64 | None = None) -> tuple[Float64, Float64]:
    """The pair of that rank nearest to a matrix at its output: min ``||(matrix - B A) S||_F``.

    Args:
        matrix: [d_out, d_in].
        rank: Of the pair; at least 1, cut to what the matrix has.
        root: S of ``whitening``; None for the identity.

    Returns:
        A [rank, d_in] and B [d_out, rank], the singular values on both sides alike.

    Source:
        Eckart & Young 1936 on ``matrix S``; ``A = sqrt(s) V^T S^-1``.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not np.isfinite(matrix).all():
        raise ValueError("the matrix holds values that are not finite")
    left, values, right = np.linalg.svd(_at_output(matrix, root), full_matrices=False)
    roots = np.sqrt(values[:rank])
    a = roots[:, None] * right[:rank]
    a = a if root is None else np.linalg.solve(root.T, a.T).T
    return np.asarray(a), np.asarray(left[:, :rank] * roots)


def compensator(error: Matrix, rank: int, root: Float64 | None = None) -> tuple[Float32, Float32]:
    """Thin factors C = B A that undo what they can of a base's error: min ``||(E + C) S||_F``.

    Args:
        error: E = Q(W) - W, [d_out, d_in].
        rank: Of C.
        root: S of the inputs; None for the plain truncated SVD of E.

    Returns:
        A [rank, d_in] and B [d_out, rank] with ``C = B A``, float32.

    Source:
        FedQLoRA, https://openreview.net/forum?id=uWMQxtmyYz, which splits the repair of the base
        from the adapter; the weighing by inputs is ours.
    """
    a, b = best_factors(error, rank, root)
    return a.astype(np.float32), (-b).astype(np.float32)


def loftq(
    weights: Float32, quantised: Callable[[Float32], Float32], rank: int, *, iterations: int = 1
) -> tuple[Float32, Float32, Float32]:
    """A base and an adapter that together are near the weights.

    Args:
        weights: W, [d_out, d_in].
        quantised: Values after quantisation, q(.).
        rank: Of the adapter.
        iterations: T; with 1 the base is q(W) itself.

    Returns:
        Q_T, A [rank, d_in] and B [d_out, rank] with ``Q_T + B A`` near W.

    Source:
        Li et al. 2023, "LoftQ", https://arxiv.org/abs/2310.08659, algorithm 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    product: Matrix = np.zeros_like(weights)
    for _ in range(iterations):
        base = quantised((weights - product).astype(np.float32))
        a, b = best_factors(weights - base.astype(np.float64), rank)
        product = b @ a
    return base, a.astype(np.float32), b.astype(np.float32)


def output_error(error: Matrix, root: Float64 | None = None) -> float:
    """``||E S||_F``, which is ``||E X||_F`` up to the damping; ``||E||_F`` without S."""
    return float(np.linalg.norm(_at_output(error, root)))


def seen_by(error: Matrix, a: Matrix, b: Matrix, root: Float64 | None = None) -> Float64:
    """K with ``K A = P E``: the part of an error that a pair can have repaired.

    P projects on the columns of B and, at the output, on the rows of A.

    Args:
        error: E, [d_out, d_in].
        a: A, [rank, d_in].
        b: B, [d_out, rank].
        root: S of the inputs; None for the identity.

    Returns:
        K, [d_out, rank].
    """
    wide = b.astype(np.float64)
    return matched_left(wide @ (np.linalg.pinv(wide) @ error), a, root)


def repaired_share(
    error: Matrix, a: Matrix, b: Matrix, *, scale: float, root: Float64 | None = None
) -> tuple[float, float]:
    """How much of an error a pair undoes, of what it could, and how much of the pair that is.

    Args:
        error: E, [d_out, d_in].
        a: A, [rank, d_in].
        b: B, [d_out, rank].
        scale: s of ``Delta = s B A``.
        root: S of the inputs; None for the identity.

    Returns:
        ``kappa = -<Delta S, P E S> / ||P E S||^2`` within [0, 1], and ``kappa^2 ||P E S||^2``.
        Both are 0 where the pair spans none of the error.
    """
    rows = _at_output(a, root)
    seen, gram = seen_by(error, a, b, root), rows @ rows.T
    length = float(np.sum((seen @ gram) * seen))
    if length <= 0:
        return 0.0, 0.0
    share = -scale * float(np.sum((b.astype(np.float64) @ gram) * seen)) / length
    share = min(1.0, max(0.0, share))
    return share, share**2 * length


def effective_mean(
    changes: list[Matrix], errors: list[Matrix], weights: list[float], *, share: float = 1.0
) -> Float64:
    """``M = sum_k p_k (Delta_k + kappa E_k)``: the mean change of the unquantised weights.

    Args:
        changes: Delta_k, each [d_out, d_in].
        errors: E_k of the base that Delta_k was trained on.
        weights: p_k before division by their sum.
        share: kappa, in [0, 1].
    """
    total = sum(weights)
    terms = zip(changes, errors, weights, strict=True)
    return np.asarray(sum(p / total * (d + share * e) for d, e, p in terms), np.float64)


def for_base(
    mean: Matrix, error: Matrix, rank: int, *, scale: float, share: float = 1.0
) -> tuple[Float64, Float64]:
    """The pair for devices with one base: ``s B A`` nearest to ``T = M - kappa E``.

    Returns:
        A [rank, d_in] and B [d_out, rank].
    """
    return best_factors((mean - share * error) / scale, rank)


def matched_change(
    change: Matrix,
    error: Matrix,
    second_moments: Matrix,
    rank: int,
    *,
    penalty: float = 0.0,
) -> tuple[Float64, Float64]:
    """The pair that gives a quantised base the outputs of W + D on calibration inputs.

    Minimises ``||(W + D) X - (W + E + B A) X||_F^2 + mu ||B A - D||_F^2`` over pairs of a rank. The
    minimum without a bound on the rank is ``(D - E) M (M + mu I)^-1 + mu D (M + mu I)^-1``; what
    follows from the bound is an SVD in the metric ``M + mu I``.

    Args:
        change: D, [d_out, d_in].
        error: E, [d_out, d_in].
        second_moments: M, [d_in, d_in].
        rank: Of the pair.
        penalty: mu, in units of the moments; at least 0.

    Returns:
        A [rank, d_in] and B [d_out, rank].
    """
    width = change.shape[1]
    moments = np.asarray(second_moments, np.float64)
    root = whitening(moments + penalty * np.eye(width), damping=1e-9)
    metric = root @ root.T
    wanted = (change - error) @ moments + penalty * change
    return best_factors(np.linalg.solve(metric, wanted.T).T, rank, root)


def matched_left(error: Matrix, a: Matrix, root: Float64 | None = None) -> Float64:
    """K with ``-K A`` the best repair of the error whose rows A spans: min ``||(E - K A) S||_F``.

    Args:
        error: E, [d_out, d_in].
        a: A, [rank, d_in].
        root: S of the inputs; None for the identity.

    Returns:
        K, [d_out, rank].
    """
    return np.asarray(_at_output(error, root) @ np.linalg.pinv(_at_output(a, root)))


def affine_match(exact: Matrix, quantised: Matrix) -> tuple[Float64, Float64]:
    """Gamma and beta with ``gamma y + beta`` of the mean and the variance of the exact outputs.

    For adapters that are no sum in weight space: an affine map a layer that stays private.

    Args:
        exact: Outputs of the unquantised layer, [samples, d_out].
        quantised: Outputs of the quantised one for the same inputs.

    Returns:
        gamma and beta, each [d_out]; gamma is 1 where the quantised output does not vary.

    Source:
        Lian et al. 2022, "SSF", https://arxiv.org/abs/2210.08823, for the form of the map.
    """
    spread, own = exact.std(axis=0, dtype=np.float64), quantised.std(axis=0, dtype=np.float64)
    gamma = np.where(own > 0, spread / np.where(own > 0, own, 1.0), 1.0)
    beta = exact.mean(axis=0, dtype=np.float64) - gamma * quantised.mean(axis=0, dtype=np.float64)
    return gamma, beta


def precision_weight(examples: float, relative_error: float, *, floor: float) -> float:
    """``n / (tau^2 + sigma^2)``: a device with a coarse base counts less.

    Args:
        examples: n, at least 0.
        relative_error: sigma, error of its base at the outputs over that of the outputs.
        floor: tau, what differs between devices for other reasons; above 0.
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor}")
    return examples / (floor**2 + relative_error**2)


def _at_output(matrix: Matrix, root: Float64 | None) -> Float64:
    wide = matrix.astype(np.float64)
    return wide if root is None else np.asarray(wide @ root)
