"""Score identity distillation (Zhou et al., ICML 2024): minimise a Fisher divergence, data-free.

    MESM = E[ w |d_real(xt) - d_fake(xt)|^2 ],    x = G(z), xt = x + sigma noise

d_fake only approximates the generator's score. So SiD mixes two estimates of MESM (model-based
explicit score matching). L1 is the plug-in estimate. L2 is a projected form. Their averages are
equal when d_fake is optimal, d_fake = E[x | xt].

    L1 = |d_real - d_fake|^2      L2 = (d_real - d_fake) (d_real - x)      loss = w (L2 - alpha L1)

With an optimal fake score the value is (1 - alpha) MESM on average: 0 at alpha = 1, negative above.
So a falling loss is not progress. MESM has the gradient A + B: x moves (A), and d_fake follows (B).
With d_fake frozen, L1 has the gradient A, and L2 has A + B / 2. So the gradient of the loss is
(1 - alpha) A + B / 2. Only at alpha = 1/2 is it half of MESM's own. The paper's runs do best
at 1 and 1.2. One reason: a lagging fake score lets a student collapse, and larger alphas resist.
"""

import torch

from nano_dmd.fake_score import predictions
from nano_dmd.noise import expand, repeated, same_shape
from nano_dmd.real_score import normaliser

HUBER = 0.00054                                    # sim_loss's c: iCT's .00054 sqrt(N), as a mean


def sid_integrand(x, d_real, d_fake, alpha, normalise=True):
    """SiD's loss, elementwise, normaliser 1 / mean |x - d_real| included.  SiD sid_loss.py:53-55.

        (d_real - d_fake) * ((d_real - x) - alpha (d_real - d_fake)) / mean_pixels |x - d_real|

    x       (B, *S)  generator output
    d_real, d_fake  (B, *S)  x0-predictions at the same xt and sigma
    returns (B, *S)  differentiable in all three; the normaliser is a constant
    raises ValueError if the shapes differ
    """
    same_shape(x, d_real, d_fake)
    size = normaliser(x, d_real) if normalise else x.new_ones(len(x))                # (B,)
    gap = d_real - d_fake
    return gap * ((d_real - x) - alpha * gap) / expand(size, x)


def sid_loss(x, nets, batch, cfg):
    """SiD's loss of x (B, *S): (n B,), n = cfg.noisings.  Both denoisers' weights stay frozen.

    The gradient reaches x directly and through both denoisers.  If d_real and d_fake were detached,
    it would be DMD's for every alpha: all of SiD is in the Jacobians of the two networks.
    Differs: a mean over pixels; the official code sums them and scales by 100, a constant that Adam
    removes.  cfg.normalise off leaves the normaliser out (better in 2D).
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    _, _, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
    return sid_integrand(x, d_real, d_fake, cfg.alpha, cfg.normalise).flatten(1).mean(1)


def sim_loss(x, nets, batch, cfg):
    """SIM (arXiv 2410.16794): SiD's integrand at alpha = 1, divided by the size of the gap: (n B,).

        gap (d_fake - x) / sqrt(mean_pixels gap^2 + c^2),    gap = d_real - d_fake

    The paper's pseudo-Huber distance of the scores.  Unlike SiD's, this normaliser has a graph.
    Differs: c is that of denoisers, for every sigma (paper: of scores; their weight is free).
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    _, _, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
    size = ((d_real - d_fake).square().flatten(1).mean(1) + HUBER**2).sqrt()
    return sid_integrand(x, d_real, d_fake, 1.0, normalise=False).flatten(1).mean(1) / size
