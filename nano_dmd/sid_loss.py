"""Score identity distillation (Zhou et al., ICML 2024): minimise the Fisher divergence between the scores, data-free.

    MESM = E[ w |d_real(xt) - d_fake(xt)|^2 ],    x = G(z), xt = x + sigma noise

d_fake only approximates the generator's score, so SiD mixes the plug-in estimate (L1 below) with a projected
form (L2) that equals it when d_fake is optimal, because E[x | xt] = d_fake there:

    L1 = |d_real - d_fake|^2        L2 = (d_real - d_fake) (d_real - x)        loss = w (L2 - alpha L1)

With an optimal fake score the value is (1 - alpha) MESM: zero on average at alpha = 1, negative above, so a
falling loss is not progress. The gradient is half of MESM's own at alpha = 1/2 and nowhere else; larger alphas
do better in practice because the fake score lags behind the generator.
"""

import torch

from nano_dmd.noise import add_noise, draw_noise, draw_sigma, expand, repeated


def sid_integrand(x, d_real, d_fake, alpha, normalise=True):
    """SiD's loss, elementwise, the per-sample normaliser 1 / mean_pixels |x - d_real| included.  SiD sid_loss.py:53-55.

        (d_real - d_fake) * ((d_real - x) - alpha (d_real - d_fake)) / mean_pixels |x - d_real|

    x       (B, *S)  generator output              d_real, d_fake  (B, *S)  x0-predictions at the same xt, sigma
    returns (B, *S)  differentiable in all three; the normaliser is a constant.  raises ValueError if shapes differ
    """
    if not x.shape == d_real.shape == d_fake.shape:
        raise ValueError(f"x, d_real and d_fake must agree in shape, got {tuple(x.shape)}, {tuple(d_real.shape)} "
                         f"and {tuple(d_fake.shape)}")
    with torch.no_grad():
        size = expand((x - d_real).abs().flatten(1).mean(1).clamp(min=1e-5), x) if normalise else 1.0
    gap = d_real - d_fake
    return gap * ((d_real - x) - alpha * gap) / size


def sid_loss(x, nets, batch, cfg):
    """SiD's generator loss.  The gradient reaches x directly and through both denoisers; their weights stay frozen.

    Take that second path away (detach d_real and d_fake) and the gradient is DMD's for every alpha: all of SiD is
    in the Jacobians of the two networks. Differs: mean over everything, the official code sums pixels and scales
    by 100, a constant that Adam removes; cfg.normalise off leaves the normaliser out (better in 2D).
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    sigma = draw_sigma(cfg.dm_sigma, len(x), x.device)
    xt = add_noise(x, sigma, draw_noise(x))
    d_real, d_fake = nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)
    return batch.mean("sid_loss", sid_integrand(x, d_real, d_fake, cfg.alpha, cfg.normalise), sigma)
