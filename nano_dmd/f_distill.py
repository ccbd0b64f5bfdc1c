"""f-distill (arXiv 2502.15681): DMD's gradient, each sample weighted by how real it looks.

    grad_theta D_f(p_real || p_fake) = E[ h(r) (s_fake(xt) - s_real(xt)) dx/dtheta ]
    r = p_real(xt) / p_fake(xt),      h(r) = f''(r) r^2,      D_f = E_fake[ f(r) ]

DMD descends the reverse KL divergence: h = 1. It seeks modes. A sample far from real data costs
much, and a mode without samples costs little. In the forward KL h = r: samples count most where the
student puts too few. That covers modes. The ratio r comes from the GAN's discriminator: a perfect
logit is ln r.

Differs: FastGen's r comes from the teacher's features, here from the fake score's; on ImageNet it
averages the means of the bins over steps.  With guidance r compares data with fakes, although
d_real is the guided teacher; so does FastGen.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from nano_dmd.dmd_loss import descend, dmd_gradient
from nano_dmd.fake_score import predictions
from nano_dmd.noise import expand, repeated

WEIGHTS = {                            # h(r) by divergence; f(r) is beside it
    "rkl": torch.ones_like,            # -ln r: reverse KL, DMD
    "kl": lambda r: r,                 # r ln r: forward KL
    "js": lambda r: r / (r + 1),       # r ln r - (r + 1) ln((r + 1) / 2): Jensen-Shannon
    "sf": lambda r: 1 / (r + 1),       # (r + 1) ln(1/2 + 1/(2r)): softened reverse KL
    "sh": lambda r: r.sqrt() / 2,      # (1 - sqrt r)^2: squared Hellinger
    "jf": lambda r: r + 1,             # (r - 1) ln r: Jeffreys
    "neyman": lambda r: 2 / r,         # (1 - r)^2 / r: an extreme mode seeker
}


def centred(ratio, sigma, bins=10):
    """ratio (B,) over its mean in each of some bins of log sigma (B,): E_fake[r] = 1 at any sigma.

    The bins are equally wide and cover the batch.  Differs: FastGen's are linear in sigma.  With
    EDM's noise, 64 percent of the samples would share the first.
    """
    low, high = sigma.log().aminmax()
    place = (sigma.log() - low) / (high - low).clamp(min=1e-6)                 # in [0, 1]
    member = F.one_hot((bins * place).long().clamp(max=bins - 1), bins).to(ratio)       # (B, bins)
    mean = (ratio @ member) / member.sum(0).clamp(min=1)
    return ratio / (member @ mean)


def sample_weights(logits, sigma, divergence):
    """h(r) over its mean: the weight of each sample, (B,).  logits = ln r and sigma are (B,).

    r is clipped to [.1, 20] before it is centred, as in FastGen (f_distill.py:19-111).  The batch
    is that of all processes together, but one part of it with --accumulate.  It has a bin for each
    32 samples, 10 at most: a sample alone in its bin has r = 1, whatever it looks like.
    """
    ratio = logits.clamp(-10, 10).exp().clamp(0.1, 20)
    bins = max(1, min(10, len(ratio) // 32))
    h = WEIGHTS[divergence](centred(ratio, sigma, bins))
    return h / h.mean()


def exact_log_ratio(real, x, xt, sigma):
    """ln r (B,) where the teacher has a density.  Fakes: the batch, a mixture of its samples.

    p_fake(xt_i) = mean_j N(xt_i; x_j, sigma_i^2), x (B, *S).  For few dimensions: in many, each
    sample is alone.  Leaving x_i itself out has no bias, and a larger error: then a sample without
    neighbours has p_fake = 0 (tutorials, notebook 12).
    """
    gap = xt.flatten(1)[:, None] - x.flatten(1)                                        # (B, B, D)
    log_kernels = -gap.square().sum(2) / (2 * sigma[:, None] ** 2)
    volume = sigma.log() + math.log(2 * math.pi) / 2
    log_fake = log_kernels.logsumexp(1) - math.log(len(x)) - x[0].numel() * volume
    return real.log_prob(xt, sigma) - log_fake


def f_distill_loss(x, nets, batch, cfg):
    """dmd_loss with sample_weights: (n B,), n = cfg.noisings.  cfg.divergence names h.

    With "rkl" it is dmd_loss.  The GAN term is a loss of its own, as in DMD2.  ln r belongs to the
    xt and sigma of the gradient that h multiplies.  Differs: a public reimplementation
    (AaronCaoZJ/DMDs sd_guidance.py:184-230) draws new ones for it.
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    with torch.no_grad():
        xt, sigma, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
        if cfg.ratio == "critic":
            logits = nets.discriminator(nets.fake.features(xt, sigma, cond))
        else:
            logits = batch.jointly(partial(exact_log_ratio, nets.real.denoiser), x, xt, sigma)
        h = batch.jointly(partial(sample_weights, divergence=cfg.divergence), logits, sigma)
    g = expand(h, x) * dmd_gradient(x, d_real, d_fake)
    return descend(x, g).flatten(1).mean(1)
