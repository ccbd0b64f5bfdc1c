"""Distances between two sets of samples or features, and tables of numbers."""

import torch


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    x = features.double()
    return x.mean(0), x.T.cov() if len(x) > 1 else x.new_full((x.shape[1],) * 2, torch.nan)


def gaussian_distance(mean_x, cov_x, mean_y, cov_y):
    """|mean difference|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), float64; None without a covariance.

    Differs: EDM takes the root of the product with scipy.linalg.sqrtm; symmetric eigenvalues are
    faster, and real.
    """
    if not (cov_x.isfinite().all() and cov_y.isfinite().all()):
        return None
    value, vector = torch.linalg.eigh(cov_x)
    root = (vector * value.clamp(min=0).sqrt()) @ vector.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def frechet(x, y):
    """Frechet distance of the Gaussians fitted to two samples (N, D), (M, D)."""
    return gaussian_distance(*moments(x), *moments(y))


def coverage(of, by, k=5):
    """Share of the rows of `of` within the k-NN ball of some row of `by`; None if too few.

    Kynkaanniemi et al. 2019: precision is coverage(samples, data), recall coverage(data, samples).
    """
    if len(by) <= k or not len(of):
        return None
    radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values    # own distance 0 comes first
    return (torch.cdist(of, by) <= radius).any(1).float().mean().item()


@torch.no_grad()
def in_batches(sample, z, cond, size):
    """sample(z (k, N, *S), cond) in parts of size."""
    starts = range(0, z.shape[1], size)
    conds = [None if cond is None else cond[i : i + size] for i in starts]
    return torch.cat([sample(z[:, i : i + size], c) for i, c in zip(starts, conds)])


def average(rows):
    """The mean of each number over rows {name: number}; None where a row could not tell."""
    columns = {name: [r[name] for r in rows] for name in rows[0]}
    return {name: None if None in v else sum(v) / len(v) for name, v in columns.items()}


def table(rows):
    """Rows {label: {column: number}} as text, columns in order of first appearance."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [["", *columns]]
    lines += [[label, *[cell(row.get(c)) for c in columns]] for label, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])]
              for line in lines]
    return "\n".join("  ".join(line) for line in padded)


def cell(value):
    """A number, a text or nothing, as a table shows it."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:d}" if isinstance(value, int) else f"{value:.3g}"
