"""Wrong answers to A3 that the checks must reject; several were met in public code (the handout names them)."""

from tutorials.assignments.instructor import Wrong

CRITIC = "(F.softplus(-logits_real) + smooth * logits_real).mean() + F.softplus(logits_fake).mean()"
FREEZE = """    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
"""
NO_FINALLY = """    for p, _ in flags:
        p.requires_grad_(False)
    yield
    for p, flag in flags:
        p.requires_grad_(flag)
"""
PULL_DATA = "pull_data = math.log(1 + share / data) - math.log(1 + (1 - share) / (1 - data))"

WRONG = [
    Wrong("labels of fake samples smoothed too", "A3.1", "F.softplus(logits_fake).mean()",
          "(F.softplus(logits_fake) - smooth * logits_fake).mean()"),
    Wrong("one mean over real and fake together", "A3.1", CRITIC,
          "2 * torch.cat([F.softplus(-logits_real) + smooth * logits_real, F.softplus(logits_fake)]).mean()"),
    Wrong("logarithm of a sigmoid", "A3.1", CRITIC,
          "-((1 - smooth) * torch.sigmoid(logits_real).log() + smooth * torch.sigmoid(-logits_real).log()).mean() "
          "- torch.sigmoid(-logits_fake).log().mean()"),
    Wrong("smoothing only shifts the optimum", "A3.1", "torch.logaddexp(log_ratio.new_tensor(smooth).log(), -log_ratio)",
          "(-log_ratio)"),
    Wrong("a margin in the generator's hinge loss", "A3.1", "-logits_fake.mean(), F.relu",
          "F.relu(1 - logits_fake).mean(), F.relu"),

    Wrong("densities summed outside log space", "A3.2", ".logsumexp(1)", ".exp().sum(1).log()"),
    Wrong("one noise level for the whole batch", "A3.2", "sigma[:, None, None, None] ** 2", "sigma.mean() ** 2"),
    Wrong("mixture weights forgotten", "A3.2", "(weights.log() + ", "(0 * weights.log() + "),
    Wrong("gradient of the wrong sign", "A3.2", "* (d_fake - d_real)\n", "* (d_real - d_fake)\n"),
    Wrong("the saturating loss's weight", "A3.2", "torch.sigmoid(-logits) / sigma**2", "torch.sigmoid(logits) / sigma**2"),
    Wrong("threshold at the other mean", "A3.2", "distance / (2 * NormalDist().inv_cdf(accuracy))",
          "distance / NormalDist().inv_cdf(accuracy)"),
    Wrong("the data's own width forgotten", "A3.2", "math.sqrt(max(total**2 - std**2, 0.0))",
          "total if total > std else 0.0"),
    Wrong("a table of one quantile", "A3.2", "NormalDist().inv_cdf(accuracy)", "0.39779861734769595", public_passes=True),

    Wrong("penalty without a graph", "A3.3", "logit(x).sum(), x, create_graph=True", "logit(x).sum(), x"),
    Wrong("squares averaged over pixels", "A3.3", "slope.square().flatten(1).sum(1).mean()", "slope.square().mean()"),
    Wrong("norm not squared", "A3.3", "slope.square().flatten(1).sum(1).mean()",
          "slope.square().flatten(1).sum(1).sqrt().mean()"),
    Wrong("the caller's x takes part", "A3.3", "x = x.detach().requires_grad_()", "x = x.requires_grad_()"),
    Wrong("not divided by alpha, as FastGen's", "A3.3", "((logit(x + alpha * noise) - logit(x)) / alpha)",
          "((logit(x + alpha * noise) - logit(x)))"),
    Wrong("central difference over one alpha", "A3.3", "/ (2 * alpha)", "/ alpha"),
    Wrong("trace only in the bias", "A3.3", "(hessian.trace() ** 2 + 2 * hessian.square().sum())", "hessian.trace() ** 2"),

    Wrong("ratio upside down", "A3.4", "logits.detach().exp()", "(-logits.detach()).exp()"),
    Wrong("r^2 forgotten", "A3.4", "r.detach() ** 2 * second.detach()", "second.detach()"),
    Wrong("logits cut instead of ratios", "A3.4", ".exp().clamp(low, high)", ".clamp(low, high).exp()"),
    Wrong("gradient through the ratio", "A3.4", "r.detach() ** 2 *", "logits.exp().clamp(low, high) ** 2 *"),
    Wrong("weights not of mean 1", "A3.4", "expand(h / h.mean(), x)", "expand(h, x)"),
    Wrong("one weight for all samples", "A3.4", "expand(h / h.mean(), x)", "h.mean()"),

    Wrong("no_grad instead of frozen", "A3.5", "with frozen(fake, discriminator):", "with torch.no_grad():"),
    Wrong("weights not frozen", "A3.5", "with frozen(fake, discriminator):", "if True:"),
    Wrong("all weights train afterwards", "A3.5", "p.requires_grad_(flag)", "p.requires_grad_(True)"),
    Wrong("an error leaves weights frozen", "A3.5", FREEZE, NO_FINALLY),
    Wrong("saturating loss", "A3.5", "return generator_logit_loss(", "return -critic_loss(torch.zeros(1), "),
    Wrong("classes not passed on", "A3.5", "sigma, noise), sigma, cond)", "sigma, noise), sigma)"),
    Wrong("balance upside down", "A3.5", "norms[0] / norms[1]", "norms[1] / norms[0]"),
    Wrong("graph used up", "A3.5", "x, retain_graph=True)", "x)"),
    Wrong("no limit", "A3.5", ".clamp(max=limit)", ""),
    Wrong("the GAN taken for a reverse KL", "A3.5", PULL_DATA,
          "pull_data = math.log(share / (1 - share)) - math.log(data / (1 - data))"),
    Wrong("the critic follows within the step", "A3.5", PULL_DATA,
          PULL_DATA + " + share / (share + data) - (1 - share) / (2 - share - data)"),
    Wrong("sign of the weight", "A3.5", "return -pull_teacher / pull_data", "return pull_teacher / pull_data"),
    Wrong("the public answer", "A3.5", "return -pull_teacher / pull_data", "return 2.7866877307", public_passes=True),
]
