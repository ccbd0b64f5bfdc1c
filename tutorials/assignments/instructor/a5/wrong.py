"""Wrong answers to A5, each a mistake somebody makes."""

from tutorials.assignments.instructor import Wrong

SIMULATE = "    with torch.no_grad():\n        for i in range(int(step.max())):\n            rows = step > i\n"
OPEN = "    if True:\n        for i in range(int(step.max())):\n"
EARLIER_CALL = "            x[rows] = net(add_noise(x[rows], sigma, z[i, rows]), sigma, None if cond is None else cond[rows])\n"
LAST = "noise = z[step, torch.arange(len(step))]                      # each row's own slice"
EARLIER = "    with torch.no_grad():\n        for i in range(first):\n            x = step(i, x, z[i])\n"
GAP = "        gaps.append((mean - made) ** 2 + ((std**2 + sigma**2).sqrt() - var.sqrt()) ** 2)\n"
MOVE = "        made, var = c + g * made, g**2 * var\n"

WRONG = [
    # A5.1
    Wrong("sigma for t", "A5.1", "t = sigma / (1 + sigma)  ", "t = sigma  "),
    Wrong("sign of the velocity", "A5.1", "x = xt - t * net(", "x = xt + t * net("),
    Wrong("each step from the last step's input, as an ODE would", "A5.1", "xt = (1 - t) * x + t * noise", "xt = x + t * noise"),
    Wrong("the first noise for all steps", "A5.1", "xt = (1 - t) * x + t * noise", "xt = (1 - t) * x + t * z[0]"),
    Wrong("step 0 starts from z whatever its time", "A5.1", "        xt = (1 - t) * x + t * noise\n",
          "        xt = (1 - t) * x + t * noise if estimates else noise\n"),
    # A5.2
    Wrong("every row goes through every step", "A5.2", "            rows = step > i\n", "            rows = step >= 0\n"),
    Wrong("all rows computed, some thrown away", "A5.2", EARLIER_CALL,
          "            sigma = levels[i].expand(len(x))\n"
          "            x[rows] = net(add_noise(x, sigma, z[i]), sigma, cond)[rows]\n"),
    Wrong("graph through all steps", "A5.2", SIMULATE, OPEN + "            rows, x = step > i, x.clone()\n"),
    Wrong("graph built, then detached", "A5.2", SIMULATE, OPEN + "            rows, x = step > i, x.detach().clone()\n"),
    Wrong("noise of the first step once more", "A5.2", LAST, "noise = z[0]"),
    Wrong("simulated samples not noised again", "A5.2", "return net(add_noise(x, levels[step], noise),",
          "return net(torch.where(expand(step == 0, x), add_noise(x, levels[step], noise), x),"),
    # A5.3
    Wrong("generator's own noise left out of its input", "A5.3", "- var.sqrt()) ** 2)", "- (var - sigma**2).sqrt()) ** 2)"),
    Wrong("compared after the step", "A5.3", GAP + MOVE, MOVE + GAP),
    Wrong("share of the error in std", "A5.3", "math.prod(std**2 / (std**2 + sigma**2)",
          "math.prod(std / (std**2 + sigma**2) ** 0.5"),
    Wrong("the public std instead of the argument", "A5.3", "    return math.prod(std**2",
          "    std = 0.603\n    return math.prod(std**2", public_passes=True),
    # A5.4
    Wrong("interval rounded up", "A5.4", "i * (total // n) for", "i * -(-total // n) for"),
    Wrong("always 50 original steps", "A5.4", "    spaced = [", "    original = 50\n    spaced = ["),
    Wrong("nearest in sigma", "A5.4", "return nearest.indices.tolist()",
          "return [int((((1 - kept) / kept).sqrt() - s).abs().argmin()) for s in sigmas]"),
    Wrong("nothing refused", "A5.4", "if (nearest.values > math.log(tolerance)).any():", "if False:"),
    # A5.5
    Wrong("graph through the first steps", "A5.5", EARLIER, EARLIER.replace("torch.no_grad()", "torch.enable_grad()")),
    Wrong("one step too few", "A5.5", "first = None, len(z) - through", "first = None, len(z) - through + 1"),
    Wrong("gradients switched on for the caller", "A5.5", "    for i in range(first, len(z)):\n        x = step(i, x, z[i])\n",
          "    for i in range(first, len(z)):\n        with torch.enable_grad():\n            x = step(i, x, z[i])\n"),
    Wrong("through both is twice the last", "A5.5", "return last, last + slope * (theta * r1) ** 2 * 2 * v0 / theta",
          "return last, 2 * last"),
    Wrong("variance without importance weights", "A5.5", "((g**2).sum(1) / p).sum()", "((g**2).sum(1) * p).sum()"),
]
