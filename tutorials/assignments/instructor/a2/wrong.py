"""Wrong answers to A2, each a mistake somebody makes."""

from tutorials.assignments.instructor import Wrong

FIT = "return (w * x * xt).sum() / (w * xt**2).sum()"
COMPROMISE = "return (weight * a**2).sum() / (weight * (a**2 + sigma**2)).sum()"
FRESH = "    for _ in range(critic_steps):\n        with torch.no_grad():\n            x = generator(draw())\n"
UPDATE = "        opts[which].zero_grad()\n        loss.backward()\n        opts[which].step()\n"
MOVE = "generator_loss(generator(draw()), critic)"
FEWEST = "math.ceil(4 * math.atanh(h) / -math.log1p(-k))"
EMA = "(1 - 0.5 ** (batch / half_life)) / (1 - 0.5 ** (seen / half_life))"

WRONG = [
    # A2.1
    Wrong("slope not squared", "A2.1", "return slope**2 * (1 / sigma**2", "return slope * (1 / sigma**2"),
    Wrong("weight divided by the slope", "A2.1", "return slope**2 * (1 / sigma**2", "return slope**-2 * (1 / sigma**2"),
    Wrong("eps loss unweighted, as in DMD2 for Stable Diffusion", "A2.1", '"eps": sigma,',
          '"eps": (1 / sigma**2 + 1 / sigma_data**2) ** -0.5,'),
    Wrong("v weight that holds for unit variance only", "A2.1", '"v": sigma / (1 + sigma**2).sqrt(),',
          '"v": (1 / sigma**2 + 1 / sigma_data**2) ** -0.5,'),
    Wrong("the public sigma_data instead of the argument", "A2.1", "(1 / sigma**2 + 1 / sigma_data**2)          #",
          "(1 / sigma**2 + 1 / 0.807**2)          #", public_passes=True),
    Wrong("sign of x in v", "A2.1", "target = (noise - s * x) / norm", "target = (noise + s * x) / norm"),
    Wrong("noise and data exchanged in v", "A2.1", "target = (noise - s * x) / norm", "target = (s * noise - x) / norm"),
    Wrong("network fed the unscaled xt", "A2.1", "net(add_noise(x, sigma, noise) / norm,", "net(add_noise(x, sigma, noise),"),
    Wrong("class not passed on", "A2.1", "/ norm, sigma, cond)", "/ norm, sigma)"),
    Wrong("one weight for the whole batch", "A2.1", 'expand(output_weight("v", sigma, sigma_data), x) *',
          'output_weight("v", sigma, sigma_data).mean() *'),
    Wrong("sum over pixels", "A2.1", "* (v - target) ** 2).mean()", "* (v - target) ** 2).flatten(1).sum(1).mean()"),
    Wrong("samples not detached", "A2.1", "x, s = x.detach(), expand(sigma, x)", "s = expand(sigma, x)"),
    # A2.2
    Wrong("regression of xt on x", "A2.2", FIT, "return (w * xt**2).sum() / (w * x * xt).sum()"),
    Wrong("divided by the data's power", "A2.2", "/ (w * xt**2).sum()", "/ (w * x**2).sum()"),
    Wrong("weights left out", "A2.2", "w = expand(weight, x)", "w = expand(torch.ones_like(weight), x)"),
    Wrong("mean of the samples' own best f", "A2.2", FIT,
          "return (w.flatten() * (x * xt).flatten(1).sum(1) / (xt**2).flatten(1).sum(1)).sum() / w.sum()"),
    Wrong("weights in the numerator only", "A2.2", "/ (w * xt**2).sum()", "/ (xt**2).sum()"),
    Wrong("average of the levels' own best f", "A2.2", COMPROMISE,
          "return (weight * a**2 / (a**2 + sigma**2)).sum() / weight.sum()"),
    Wrong("a instead of its square", "A2.2", "return (weight * a**2).sum()", "return (weight * a).sum()"),
    Wrong("n instead of n - 2", "A2.2", "/ (n - 2))", "/ n)"),
    Wrong("variance instead of its root", "A2.2", "return math.sqrt(f * (1 - f) / (n - 2))", "return f * (1 - f) / (n - 2)"),
    Wrong("spread of the data instead of what is left", "A2.2", "math.sqrt(f * (1 - f)", "math.sqrt(f"),
    # A2.3
    Wrong("critic reuses one batch", "A2.3", FRESH, "    x = generator(draw()).detach()\n    for _ in range(critic_steps):\n"),
    Wrong("graph kept in the critic's updates", "A2.3", FRESH, FRESH.replace("torch.no_grad()", "torch.enable_grad()")),
    Wrong("one critic update too many", "A2.3", "in range(critic_steps):", "in range(critic_steps + 1):"),
    Wrong("always the public number of critic updates", "A2.3", "in range(critic_steps):", "in range(3):"),
    Wrong("gradients never zeroed", "A2.3", "        opts[which].zero_grad()\n", ""),
    Wrong("gradients zeroed after the step only", "A2.3", UPDATE,
          "        loss.backward()\n        opts[which].step()\n        opts[which].zero_grad()\n"),
    Wrong("gradients zeroed before they are used", "A2.3", UPDATE,
          "        loss.backward()\n        opts[which].zero_grad()\n        opts[which].step()\n"),
    Wrong("a generator update before the critic's as well", "A2.3", "    losses = []\n",
          f'    losses = []\n    moved = update("generator", {MOVE})\n'),
    Wrong("critic not frozen", "A2.3", "        p.requires_grad_(False)\n", "        pass\n"),
    Wrong("critic frozen with no_grad", "A2.3", MOVE, "generator_loss(generator(draw()), torch.no_grad()(critic))"),
    Wrong("critic left frozen", "A2.3", "        p.requires_grad_(True)\n", "        pass\n"),
    Wrong("everything thawed, as in DMD2's edm_unified_model.py:58", "A2.3",
          "    for p in trainable:\n        p.requires_grad_(True)\n", "    critic.requires_grad_(True)\n"),
    Wrong("the critic's last samples for the generator", "A2.3", MOVE, "generator_loss(x, critic)"),
    Wrong("losses returned with their graphs", "A2.3", "        return loss.item()", "        return loss"),
    # A2.4
    Wrong("factor 2 of the square lost", "A2.4", "(2 * lr / dim", "(lr / dim"),
    Wrong("sum over dimensions", "A2.4", "(2 * lr / dim *", "(2 * lr *"),
    Wrong("the public dimension", "A2.4", "(2 * lr / dim *", "(2 * lr / 41 *", public_passes=True),
    Wrong("1 - r once", "A2.4", "weight * keep**2", "weight * keep"),
    Wrong("r for 1 - r", "A2.4", "keep = sigma**2 /", "keep = std**2 /"),
    Wrong("weight times level averaged apart", "A2.4", "(weight * keep**2).mean()", "weight.mean() * (keep**2).mean()"),
    Wrong("lag after the generator moved", "A2.4", "return velocity * q / (1 - q)", "return velocity / (1 - q)"),
    Wrong("lag of n = 1 over n", "A2.4", "return velocity * q / (1 - q)", "return velocity * (1 - k) / k / n"),
    Wrong("n small steps as one large one", "A2.4", "    q = (1 - k) ** n                                              # lag",
          "    q = 1 - n * k                                                 # lag"),
    Wrong("generator moves before the critic learns", "A2.4", "half = (1 + q - h * (1 - q)) / 2", "half = (1 + q - h) / 2"),
    Wrong("smaller real factor", "A2.4", "return half + math.sqrt(half**2 - q)", "return half - math.sqrt(half**2 - q)"),
    Wrong("decay without the root", "A2.4", "return math.sqrt(q), 2 * math.pi", "return q, 2 * math.pi"),
    Wrong("period of half a turn", "A2.4", "return math.sqrt(q), 2 * math.pi", "return math.sqrt(q), math.pi"),
    Wrong("rule of thumb n k = 4 h", "A2.4", FEWEST, "math.ceil(4 * h / k)"),
    Wrong("rounded down", "A2.4", FEWEST, FEWEST.replace("ceil", "floor")),
    # A2.5
    Wrong("no correction", "A2.5", EMA, "1 - 0.5 ** (batch / half_life)"),
    Wrong("the library's ramp", "A2.5", EMA, "1 - 0.5 ** (batch / min(half_life, 0.05 * seen))"),
    Wrong("seen before this batch", "A2.5", "(1 - 0.5 ** (seen / half_life))",
          "(1 - 0.5 ** (max(seen - batch, batch) / half_life))"),
    Wrong("e-folding time", "A2.5", EMA, "(1 - math.exp(-batch / half_life)) / (1 - math.exp(-seen / half_life))"),
    Wrong("every batch as large as this one", "A2.5", "    return (1 - 0.5 ** (batch / half_life)) / (1 -",
          "    seen = batch * round(seen / batch)\n    return (1 - 0.5 ** (batch / half_life)) / (1 -"),
    Wrong("weight on the old average", "A2.5", "slow.lerp_(fast, weight)", "slow.lerp_(fast, 1 - weight)"),
    Wrong("the net moves too", "A2.5", "slow.lerp_(fast, weight)", "fast.copy_(slow.lerp_(fast, weight))"),
    Wrong("buffers forgotten", "A2.5", "            slow.copy_(fast)", "            pass"),
    Wrong("parameters replaced", "A2.5", "    weight = ema_weight(batch, seen, half_life)\n",
          "    weight = ema_weight(batch, seen, half_life)\n    average.weight = torch.nn.Parameter(average.weight.detach())\n"),
    Wrong("age of an endless run", "A2.5", "(b / (1 - b) - updates * b**updates / (1 - b**updates))", "b / (1 - b)"),
    Wrong("age in updates", "A2.5", "return batch * (b / (1 - b)", "return (b / (1 - b)"),
    Wrong("newest a batch old", "A2.5", "return batch * (b / (1 - b)", "return batch * (1 / (1 - b)"),
]
