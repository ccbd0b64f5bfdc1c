"""Wrong answers to assignment 7 that its checks reject, each in the tasks it names and in no other."""

from tutorials.assignments.instructor import Wrong

SPLIT = "return f_cond - d_cond, -(w - 1) * (d_cond - d_uncond), (k - 1) * (f_cond - f_uncond)"
SLOPE = "slope, = torch.autograd.grad(log_posterior(point).sum(), point)"
LINE = "total = total + weight / 2 * (gap * (end - start)).sum(1) / sigma**2"
SIZE = "    size = (x - d_cond).abs().flatten(1).mean(1).clamp(min=floor)"
STEP = "return (-(w - 1) * (d_cond - d_uncond) / expand(size, x)).detach()"
PULL = "pull = (d_fake - d_cond) / expand((x - d_cond).abs().flatten(1).mean(1).clamp(min=floor), x)"
PUSH = "push = augmentation_step(x, real(below, level, cond), real(below, level, None), w, floor)"
LOSS = "return descend(x, pull).flatten(1).mean(1) + descend(x, push).flatten(1).mean(1)"
RATIO = "return (x - guided).abs().flatten(1).mean(1) / (x - d_cond).abs().flatten(1).mean(1)"
SHIELD = "return 0.5 * ((v + (a - mean) ** 2) / var - 1 - (v / var).log())"
FLOW = "t = shift(u * unshift(t_step, c), c)\n"
SHARE = "return (unshift(sigma / (1 + sigma), c) / unshift(t_step, c)).clamp(max=1)"
BELOW = "low, high = min(least, level / 10) ** (1 / rho), level ** (1 / rho)\n    return (low + u * (high - low)) ** rho"
PARTS = "return pull, (w - 1) * torch.stack([-(tau**2) * along, a * (high - low).mean()])"
REST = "return ((1 - low).mean() / (high - low).mean()).item()"
SPREAD = "return (a * (1 - lr * (w - 1) * (high - low).mean()) ** updates).item()"
MEANS = "M = ((1 - r).mean() + (w - 1) * (1 - low).mean()) / ((1 - r).mean() + (w - 1) * (high - low).mean())"
TIMES = "antiderivative = [x / 2 + v / (4 * m) * math.exp(2 * m * x / v) for x in (start, end)]"
RAW = '"v": -sigma / (1 + sigma**2).sqrt(), "flow": -sigma / (1 + sigma), "sit": sigma / (1 + sigma)}[kind]'
MISS = "return (out * (target - y_cond).abs()).flatten(1).mean(1)"

WRONG = [
    # A7.1
    Wrong("split: w for w - 1", "A7.1", SPLIT, SPLIT.replace("-(w - 1)", "-w")),
    Wrong("split: a minus lost, the student is pushed away from its prompt", "A7.1", SPLIT, SPLIT.replace("-(w - 1)", "(w - 1)")),
    Wrong("split: right for an unguided fake score only", "A7.1",
          SPLIT, SPLIT.replace("(k - 1) * (f_cond - f_uncond)", "0 * f_cond")),
    Wrong("split: the fake's guidance counted in the matching", "A7.1", SPLIT,
          "return (f_uncond + k * (f_cond - f_uncond) - d_cond, -(w - 1) * (d_cond - d_uncond), 0 * d_cond)"),
    Wrong("split: matching of the unconditional answers", "A7.1", SPLIT,
          "return f_uncond - d_uncond, -w * (d_cond - d_uncond), k * (f_cond - f_uncond)"),
    Wrong("classifier: sigma for sigma^2", "A7.1", "expand(sigma, xt) ** 2 * slope", "expand(sigma, xt) * slope"),
    Wrong("classifier: up, where the step is descended", "A7.1", "return -(w - 1) * expand(sigma, xt)",
          "return (w - 1) * expand(sigma, xt)"),
    Wrong("classifier: the gradient of the batch's mean", "A7.1", SLOPE, SLOPE.replace(".sum()", ".mean()")),
    Wrong("classifier: no graph under torch.no_grad()", "A7.1",
          "with torch.enable_grad():", "with torch.set_grad_enabled(torch.is_grad_enabled()):"),
    Wrong("classifier: requires_grad switched on for the caller's xt", "A7.1", "point = xt.detach().clone().requires_grad_()",
          "point = xt.requires_grad_()"),
    Wrong("line: the gradient without 1 / sigma^2", "A7.1", LINE, LINE.replace(" / sigma**2", "")),
    Wrong("line: weights that sum to 2", "A7.1", LINE, LINE.replace("weight / 2 *", "weight *")),
    Wrong("line: the gap of one end times the way", "A7.1", "xt = start + (node + 1) / 2 * (end - start)\n", "xt = start\n"),
    Wrong("line: the gap in the middle times the way", "A7.1", "leggauss(80)", "leggauss(1)"),
    # A7.2
    Wrong("step: w for w - 1", "A7.2", STEP, STEP.replace("-(w - 1)", "-w")),
    Wrong("step: one mean for the batch", "A7.2", SIZE, SIZE.replace(".flatten(1).mean(1)", ".mean().expand(len(x))")),
    Wrong("step: the floor added, not held", "A7.2", SIZE, SIZE.replace(".clamp(min=floor)", " + floor")),
    Wrong("step: the normaliser of the guided answer", "A7.2",
          SIZE, SIZE.replace("x - d_cond", "x - d_uncond - w * (d_cond - d_uncond)")),
    Wrong("step: carries a graph", "A7.2", STEP, STEP.replace(".detach()", "")),
    Wrong("loss: the matching with a guided teacher, guidance twice", "A7.2", PULL,
          PULL.replace("(d_fake - d_cond) /", "(d_fake - d_cond - (w - 1) * (d_cond - real(xt, sigma, None))) /")),
    Wrong("loss: one noise for both", "A7.2", "add_noise(x, level, other)", "add_noise(x, sigma, noise)"),
    Wrong("loss: the noisings exchanged", "A7.2", "(sigma, noise), (level, other) = for_matching, for_augmentation",
          "(level, other), (sigma, noise) = for_matching, for_augmentation"),
    Wrong("loss: one normaliser, the matching's, for both", "A7.2", PUSH,
          "push = -(w - 1) * (real(below, level, cond) - real(below, level, None)) / expand(\n"
          "            (x - d_cond).abs().flatten(1).mean(1).clamp(min=floor), x)"),
    Wrong("loss: the matching has no floor", "A7.2", PULL, PULL.replace(".clamp(min=floor)", "")),
    Wrong("loss: the square of the sum for the sum of squares", "A7.2",
          LOSS, "return descend(x, pull + push).flatten(1).mean(1)"),
    Wrong("loss: the sum over the pixels", "A7.2", LOSS, LOSS.replace(".mean(1)", ".sum(1)")),
    Wrong("loss: the right value and no gradient", "A7.2",
          LOSS, "return 0.5 * (pull**2 + push**2).mean(1) + 0 * x.flatten(1).sum(1)"),
    Wrong("loss: a bare product for descend, with the value 0 of a difference", "A7.2", LOSS,
          "total = ((pull + push).detach() * x).flatten(1).mean(1)\n    return total - total.detach()"),
    Wrong("ratio: upside down", "A7.2",
          RATIO, "return (x - d_cond).abs().flatten(1).mean(1) / (x - guided).abs().flatten(1).mean(1)"),
    Wrong("shield: CDM's -1 for -1/2", "A7.2", SHIELD, "return 0.5 * ((v + (a - mean) ** 2) / var - (v / var).log()) - 1"),
    Wrong("shield: the other KL", "A7.2", SHIELD, "return 0.5 * ((var + (a - mean) ** 2) / v - 1 - (var / v).log())"),
    Wrong("shield: the unbiased variance", "A7.2", "flat.var(1, unbiased=False)", "flat.var(1)"),
    # A7.3
    Wrong("shift: upside down", "A7.3", "return c * t / (1 + (c - 1) * t)", "return t / (c - (c - 1) * t)"),
    Wrong("unshift: shifts again", "A7.3", "return t / (c - (c - 1) * t)", "return shift(t, c)"),
    Wrong("levels: u runs from the noisy end, as EDM's karras does", "A7.3", BELOW, BELOW.replace("low + u", "high - u")),
    Wrong("levels: uniform in sigma", "A7.3", BELOW, "low = min(least, level / 10)\n    return low + u * (level - low)"),
    Wrong("levels: a last step of little noise starts at least", "A7.3",
          "min(least, level / 10) ** (1 / rho)", "least ** (1 / rho)"),
    Wrong("levels: rho is ignored", "A7.3", "(low + u * (high - low)) ** rho",
          "(min(least, level / 10) ** (1 / 7) + u * (level ** (1 / 7) - min(least, level / 10) ** (1 / 7))) ** 7"),
    Wrong("flow levels: drawn after the shift", "A7.3", FLOW, "t = u * t_step\n"),
    Wrong("flow levels: shifted twice", "A7.3", FLOW, "t = shift(u * t_step, c)\n"),
    Wrong("flow levels: never shifted back", "A7.3", FLOW, "t = u * unshift(t_step, c)\n"),
    Wrong("flow levels: the whole range, not below the step", "A7.3", FLOW, "t = shift(0.999 * u, c)\n"),
    Wrong("flow levels: a time returned for sigma", "A7.3", "    return t / (1 - t)\n    ### END", "    return t\n    ### END"),
    Wrong("share: of times after the shift", "A7.3", SHARE, "return (sigma / (1 + sigma) / t_step).clamp(max=1)"),
    Wrong("share: above 1 beyond the step", "A7.3", SHARE, SHARE.replace(".clamp(max=1)", "")),
    Wrong("median: upside down", "A7.3",
          "return right / (1 - right) * (1 - wrong) / wrong", "return wrong / (1 - wrong) * (1 - right) / right"),
    Wrong("median: of the times, not of sigma", "A7.3",
          "return right / (1 - right) * (1 - wrong) / wrong", "return right / wrong"),
    # A7.4
    Wrong("drift: the denoisers' distance for the gradient, no dx/dM", "A7.4", "tau**2 * (M - 1) * (1 - r).mean()",
          "(M - 1) * (1 - r).mean()"),
    Wrong("drift: dx/da forgotten", "A7.4", "a * (f - r).mean()", "(f - r).mean()"),
    Wrong("drift: augmentation at the matching's levels", "A7.4",
          "    low, high = s**2 / (s**2 + aug**2), (s**2 + tau**2) / (s**2 + tau**2 + aug**2)\n    pull",
          "    aug = match\n    low, high = s**2 / (s**2 + aug**2), (s**2 + tau**2) / (s**2 + tau**2 + aug**2)\n    pull"),
    Wrong("drift: a constant push, its dependence on xt forgotten", "A7.4",
          "along = (1 - low).mean() - M * (high - low).mean() ", "along = (1 - low).mean() "),
    Wrong("drift: w for w - 1", "A7.4", PARTS, PARTS.replace("(w - 1)", "w")),
    Wrong("rest: at w, as guided scores of much noise have it", "A7.4", REST, "return 1 + tau**2"),
    Wrong("rest: the mean of the places, not the place of the mean", "A7.4", REST,
          "return ((1 - low) / (high - low)).mean().item()"),
    Wrong("spread: a constant loss per update", "A7.4", SPREAD,
          "return (a - updates * lr * (w - 1) * (high - low).mean() * a).item()"),
    Wrong("spread: the limit of small steps", "A7.4", SPREAD,
          "return (a * (-lr * (w - 1) * (high - low).mean() * updates).exp()).item()"),
    Wrong("both: the mean at w", "A7.4", MEANS, "M = torch.tensor(w)"),
    Wrong("both: M as if d_uncond were 0", "A7.4", MEANS, MEANS.replace("(w - 1) * (high - low)", "0 * (high - low)")),
    Wrong("both: the levels averaged before the fraction", "A7.4", "(a**2 / (a**2 + match**2)).mean() < wanted",
          "a**2 / (a**2 + match.mean() ** 2) < wanted"),
    Wrong("both: a negative variance answered by half the data's std", "A7.4",
          "if wanted > 0 else 0.0", "if wanted > 0 else s / 2"),
    Wrong("largest w: without the 1", "A7.4",
          "return (1 + (s**2 / (s**2 + match**2)).mean()", "return ((s**2 / (s**2 + match**2)).mean()"),
    Wrong("largest w: numbers copied from the public run", "A7.4",
          "return (1 + (s**2 / (s**2 + match**2)).mean() / (high - low).mean()).item()",
          "return {(3, 2): 7.475946361, (1, 1): 6.461055575, (2, 2): 7.771587164}[len(match), len(aug)]", public_passes=True),
    Wrong("time: w for w - 1", "A7.4", "speed = (w - 1) * sigma**2 / v * m ", "speed = w * sigma**2 / v * m "),
    Wrong("time: a constant push", "A7.4", TIMES, "antiderivative = [x for x in (start, end)]"),
    Wrong("time: the push of a sample that is nearly sure", "A7.4", TIMES, TIMES.replace("x / 2 + ", "")),
    # A7.5
    Wrong("raw: the sign of eps", "A7.5", '"eps": -sigma, ', '"eps": sigma, '),
    Wrong("raw: SiT as if it were flow", "A7.5", RAW, RAW.replace('"sit": sigma', '"sit": -sigma')),
    Wrong("raw: flow time for sigma", "A7.5", RAW, RAW.replace('"flow": -sigma / (1 + sigma)', '"flow": -sigma')),
    Wrong("raw: v without its factor", "A7.5", RAW, RAW.replace('"v": -sigma / (1 + sigma**2).sqrt()', '"v": -sigma')),
    Wrong("raw: w for w - 1", "A7.5", "return -(w - 1) * expand(out, y_cond)", "return -w * expand(out, y_cond)"),
    Wrong("raw: the difference of the outputs as it is", "A7.5", "return -(w - 1) * expand(out, y_cond)", "return -(w - 1)"),
    Wrong("normaliser: of the raw outputs, no factor", "A7.5", MISS, "return (target - y_cond).abs().flatten(1).mean(1)"),
    Wrong("normaliser: v with a plus", "A7.5", '"v": ((noise - s * x)', '"v": ((noise + s * x)'),
    Wrong("normaliser: one for the batch", "A7.5", MISS, "return (out * (target - y_cond).abs()).mean().expand(len(x))"),
    Wrong("normaliser: SiT's target with the sign of flow's", "A7.5",
          '"sit": (x - noise, s / (1 + s))', '"sit": (noise - x, s / (1 + s))'),
    Wrong("diagnose: asks at w = 2, where both push", "A7.5",
          "step(3 * one, zero, one, zero, 1.0)", "step(3 * one, zero, one, zero, 2.0)"),
    Wrong("diagnose: expects the constant 1", "A7.5", "if abs(first / second - 1) < 1e-6:  ", "if abs(first - 1) < 1e-6:  "),
    Wrong("diagnose: takes no normaliser for one of the batch", "A7.5",
          'return factor, "none" if abs(alone / first - 1) < 1e-6 else "batch"',
          'return factor, "batch"'),
    Wrong("diagnose: does not ask whether the size moves with w", "A7.5",
          'return factor, "sample" if abs(far / near - rise) < 1e-6 else "guided"',
          'return factor, "sample"'),
    Wrong("diagnose: forgets that the factor changes the rise", "A7.5",
          'rise = 5.0 if factor == "w - 1" else 3.0 ', "rise = 5.0 "),
]
