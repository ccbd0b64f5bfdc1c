"""RealUID (arXiv 2509.22459): SiD as a game of two, with real data and no discriminator.

    L = a |d_real - (b/a) x|^2 - a |d_fake - (b/a) x|^2 - (1 - a) |d_fake(yt) - (1-b)/(1-a) y|^2

x = G(z), y is real data, xt and yt share noise and sigma. The generator minimises L: the teacher
should find its samples easy, its tracker hard. The tracker maximises L, so it fits generated and
real samples together, with weights a and 1 - a. Its best answer, with both clean means d_x, d_y, is

    d_fake = (b p_fake d_x + (1 - b) p_real d_y) / (a p_fake + (1 - a) p_real)

At p_fake = p_real that is what the teacher should say, for every (a, b). With a = b = 1 there is no
real data, and L is twice SiD's integrand at alpha = 1/2, without its normaliser.

If the teacher is wrong, G still makes the tracker agree with the teacher. It does not make the
samples agree with the data: with a = b they move away from it, with b well above a towards it
(tutorials, notebook 14).
"""

from nano_dmd.denoiser import edm_weight
from nano_dmd.fake_score import predictions
from nano_dmd.noise import add_noise, expand, repeated, same_shape
from nano_dmd.real_score import normaliser


def real_uid_integrand(x, d_real, d_fake, a, b):
    """a (d_real - (b/a) x)^2 - a (d_fake - (b/a) x)^2, elementwise, without a normaliser.

    x, d_real, d_fake (B, *S), the predictions at the same xt; returns (B, *S), differentiable in
    all three.  src/losses.py:7-30, with x in place of the velocity.  raises ValueError if the
    shapes differ
    """
    same_shape(x, d_real, d_fake)
    target = b / a * x
    return a * ((d_real - target) ** 2 - (d_fake - target) ** 2)


def real_uid_loss(x, nets, batch, cfg):
    """The generator's side: (n B,), n = cfg.noisings.  Both networks' weights stay frozen.

    Differs: divided by mean |x - d_real| like SiD's loss, unless cfg.normalise is off; the
    official code weighs by flow matching's time instead.
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    _, _, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
    loss = real_uid_integrand(x, d_real, d_fake, cfg.uid_a, cfg.uid_b).flatten(1).mean(1)
    return loss / normaliser(x, d_real) if cfg.normalise else loss


def real_uid_critic_loss(x, nets, batch, cfg):
    """The tracker's side, weighted as denoising_loss is; returns (B,).

    Differs: with a = 1 and another b the official code drops the real data without a word; here
    --uid_b must then be 1.
    """
    a, b = cfg.uid_a, cfg.uid_b
    sigma, noise = batch.noising(cfg.critic_sigma, x)
    d_fake = nets.fake(add_noise(x, sigma, noise), sigma, batch.cond)
    loss = a * (d_fake - b / a * x) ** 2
    if a < 1:
        d_data = nets.fake(add_noise(batch.real, sigma, noise), sigma, batch.real_cond)
        loss = loss + (1 - a) * (d_data - (1 - b) / (1 - a) * batch.real) ** 2
    return (expand(edm_weight(sigma, nets.sigma_data), x) * loss).flatten(1).mean(1)
