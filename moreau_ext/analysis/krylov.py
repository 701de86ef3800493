"""Krylov methods for a batch of symmetric matrices: Lanczos, minimal residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def lanczos_process(
    operator: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """:func:`lanczos`, handed out after every step, so that a caller may stop."""
    batch, features = start.shape
    basis = torch.zeros(batch, steps, features, dtype=torch.float64, device=start.device)
    diagonal, coupling = (torch.zeros(batch, steps, dtype=torch.float64, device=start.device) for _ in range(2))
    tiny = torch.finfo(torch.float64).tiny
    q = start.double()
    norm = q.norm(dim=1, keepdim=True)
    q = torch.where(norm > 0, q / norm.clamp_min(tiny), 0.0)
    for k in range(steps):
        basis[:, k] = q
        w = operator(q).double() * (norm > 0)
        diagonal[:, k] = (w * q).sum(1)
        size = w.norm(dim=1, keepdim=True)
        known = basis[:, : k + 1]
        for _ in range(2):  # once leaves what rounding made of the large components
            w = w - torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", known, w), known)
        norm = w.norm(dim=1, keepdim=True)
        # Below the rounding of what was subtracted nothing is left to go on with.
        norm = torch.where(norm > 1e-14 * size, norm, 0.0)
        coupling[:, k] = norm[:, 0]
        q = torch.where(norm > 0, w / norm.clamp_min(tiny), 0.0)
        yield known, diagonal[:, : k + 1], coupling[:, : k + 1]


def lanczos(operator: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Lanczos process for a batch of symmetric matrices: QᵀAQ = T, tridiagonal.

    Args:
        operator: [B, D] -> [B, D], A_b v_b for every b.
        start: [B, D], the first vectors; need not be of unit length. A row of zeros gives zeros.
        steps: k >= 1; no more than D are useful.

    Returns:
        Qᵀ float64 [B, k, D], orthonormal rows (twice orthogonalised), zero where an invariant subspace ended the
        process; the diagonal float64 [B, k] and the off-diagonal float64 [B, k] of T, its last entry the coupling to
        the vector that would follow. Rows that ended add zeros to the spectrum of T.

    Example:
        >>> import torch
        >>> from moreau_ext.analysis.krylov import lanczos, tridiagonal
        >>> a = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> _, diagonal, coupling = lanczos(lambda v: v @ a, torch.ones(1, 3, dtype=torch.float64), 3)
        >>> torch.linalg.eigvalsh(tridiagonal(diagonal, coupling))[0].round(decimals=6).tolist()
        [1.0, 2.0, 5.0]
    """
    for state in lanczos_process(operator, start, steps):  # noqa: B007 (the last one is wanted)
        pass
    return state


def minimal_residual(operator: Callable[[Tensor], Tensor], right: Tensor, tol: float, max_steps: int) -> Tensor:
    """x with A x = b for a batch of symmetric matrices, definite or not, by minimal residuals on the Lanczos basis.

    Args:
        operator: [B, D] -> [B, D].
        right: b, [B, D].
        tol: stop where ‖b − Ax‖ ≤ tol·‖b‖ for every row; looked at every five steps.
        max_steps: products at most.

    Returns:
        x, float64 [B, D]: the best within the Krylov space.
    """
    norm = right.double().norm(dim=1)
    x = torch.zeros_like(right, dtype=torch.float64)
    steps = min(max_steps, right.shape[1])
    for basis, diagonal, coupling in lanczos_process(operator, right, steps):
        k = diagonal.shape[1]
        if k % 5 and k < steps:
            continue
        last = torch.zeros(1, k, dtype=torch.float64, device=x.device)
        last[0, -1] = 1
        tall = torch.cat([tridiagonal(diagonal, coupling), coupling[:, -1:, None] * last], dim=1)
        target = torch.zeros(*tall.shape[:2], 1, dtype=torch.float64, device=x.device)
        target[:, 0, 0] = norm
        y = torch.linalg.pinv(tall) @ target
        x = torch.einsum("bk,bkd->bd", y[:, :, 0], basis)
        if bool(((target - tall @ y).norm(dim=(1, 2)) <= tol * norm).all()):
            break
    return x


def tridiagonal(diagonal: Tensor, coupling: Tensor) -> Tensor:
    """T [B, k, k] of :func:`lanczos`."""
    off = coupling[:, :-1]
    return torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)


def extreme_eigenvalues(
    operator: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The least and the largest Ritz value of a batch of symmetric matrices.

    Returns:
        Values float64 [B, 2], vectors float64 [B, 2, D] of unit length, and how far from an eigenvalue each value can
        be, ‖A u − θu‖, float64 [B, 2]. Ritz values lie within the spectrum.
    """
    basis, diagonal, coupling = lanczos(operator, start, min(steps, start.shape[1]))
    values, vectors = torch.linalg.eigh(tridiagonal(diagonal, coupling))
    ends = [0, values.shape[1] - 1]
    ritz = torch.einsum("bkj,bkd->bjd", vectors[:, :, ends], basis)
    return values[:, ends], ritz, (coupling[:, -1:] * vectors[:, -1, ends]).abs()
