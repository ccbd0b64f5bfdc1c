"""Score identity distillation (Zhou et al., ICML 2024): minimise a Fisher divergence, data-free.

    MESM = E[ w |d_real(xt) - d_fake(xt)|^2 ],    x = G(z), xt = x + sigma noise

d_fake only approximates the generator's score. So SiD mixes two estimates of MESM (model-based
explicit score matching). L1 is the plug-in estimate. L2 is a projected form. Their averages are
equal when d_fake is optimal, d_fake = E[x | xt].

    L1 = |d_real - d_fake|^2      L2 = (d_real - d_fake) (d_real - x)      loss = w (L2 - alpha L1)

With an optimal fake score the value is (1 - alpha) MESM on average: 0 at alpha = 1, negative above.
So a falling loss is not progress. MESM has the gradient A + B: x moves (A), and d_fake follows (B).
With d_fake frozen, L1 has the gradient A, and L2 has A + B / 2. So the gradient of the loss is
(1 - alpha) A + B / 2. Only at alpha = 1/2 is it half of MESM's own. Larger alphas do better in
practice, because the fake score lags behind the generator.
"""

import torch

from nano_dmd.noise import add_noise, expand, repeated


def sid_integrand(x, d_real, d_fake, alpha, normalise=True):
    """SiD's loss, elementwise, normaliser 1 / mean |x - d_real| included.  SiD sid_loss.py:53-55.

        (d_real - d_fake) * ((d_real - x) - alpha (d_real - d_fake)) / mean_pixels |x - d_real|

    x       (B, *S)  generator output
    d_real, d_fake  (B, *S)  x0-predictions at the same xt and sigma
    returns (B, *S)  differentiable in all three; the normaliser is a constant
    raises ValueError if the shapes differ
    """
    if not x.shape == d_real.shape == d_fake.shape:
        shapes = ", ".join(str(tuple(v.shape)) for v in (x, d_real, d_fake))
        raise ValueError(f"x, d_real and d_fake must agree in shape, got {shapes}")
    size = (x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)      # (B,)
    gap = d_real - d_fake
    return gap * ((d_real - x) - alpha * gap) / (expand(size, x) if normalise else 1.0)


def sid_loss(x, nets, batch, cfg):
    """SiD's loss of x (B, *S): (n B,), n = cfg.noisings.  Both denoisers' weights stay frozen.

    The gradient reaches x directly and through both denoisers.  If d_real and d_fake were detached,
    it would be DMD's for every alpha: all of SiD is in the Jacobians of the two networks.
    Differs: a mean over pixels; the official code sums them and scales by 100, a constant that Adam
    removes.  cfg.normalise off leaves the normaliser out (better in 2D).
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    sigma, noise = batch.noising(cfg.dm_sigma, x)
    xt = add_noise(x, sigma, noise)
    d_real, d_fake = nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)
    return sid_integrand(x, d_real, d_fake, cfg.alpha, cfg.normalise).flatten(1).mean(1)
