"""TODO."""

import torch



def frechet(x, y):
    """Frechet distance of Gaussians fitted to two samples (N, D), (M, D)."""
    return frechet_of_moments(*moments(x), *moments(y))


def coverage(of, by, k=5):
    """Share of the rows of `of` that lie in the k-nearest-neighbour ball of some row of `by` (Kynkaanniemi 2019).

    None where `by` has not so many neighbours, or `of` is empty.
    """
    if len(by) <= k or not len(of):
        return None
    radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values                        # own distance 0 comes first
    return (torch.cdist(of, by) <= radius).any(1).float().mean().item()


def average(rows):
    """The mean of each number over rows {name: number}; None where a row could not tell."""
    columns = {name: [r[name] for r in rows] for name in rows[0]}
    return {name: None if None in v else sum(v) / len(v) for name, v in columns.items()}


@torch.no_grad()
def in_batches(sample, z, cond, size):
    """sample(z (k, N, *S), cond) in parts of size."""
    return torch.cat([sample(z[:, i : i + size], None if cond is None else cond[i : i + size])
                      for i in range(0, z.shape[1], size)])


def table(rows):
    """Rows {label: {column: number}} as text, columns in order of first appearance."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [[""] + columns] + [[label] + [show(row.get(c)) for c in columns] for label, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


def show(value):
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:d}" if isinstance(value, int) else f"{value:.3g}"


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    x = features.double()
    return x.mean(0), x.T.cov() if len(x) > 1 else x.new_full((x.shape[1],) * 2, torch.nan)


def frechet_of_moments(mean_x, cov_x, mean_y, cov_y):
    """|mean difference|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), float64.

    None where a set is too small to have a covariance.
    Differs: EDM takes the root of the product with scipy.linalg.sqrtm; symmetric eigenvalues are faster, and real.
    """
    if not (cov_x.isfinite().all() and cov_y.isfinite().all()):
        return None
    value, vector = torch.linalg.eigh(cov_x)
    root = (vector * value.clamp(min=0).sqrt()) @ vector.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()
