// Holds math.js to golden.json:  node explorer/check.js [another math.js]
// Prints the worst error of every quantity, |a - b| / max(1, |b|); fails above 1e-6.
"use strict";
const fs = require("fs");
const path = require("path");

const M = require(path.resolve(process.argv[2] || path.join(__dirname, "math.js")));
const { SHAPES, skewed } = require("./shapes.js");
const golden = JSON.parse(fs.readFileSync(path.join(__dirname, "golden.json"), "utf8"));
const worst = {};

/** Notes the largest error of numbers found against the golden ones. */
function hold(name, found, want) {
  found = typeof found === "number" ? [found] : Array.from(found);
  want = typeof want === "number" ? [want] : want;
  if (found.length !== want.length) worst[name] = Infinity;
  want.forEach((w, k) => {
    const error = Math.abs(found[k] - w) / Math.max(1, Math.abs(w));
    worst[name] = Math.max(worst[name] || 0, error === error ? error : Infinity);
  });
}

/** The golden modes of a shape; every other one is of class 1. */
function modes(name) {
  const { means, std, weights } = golden.shapes[name];
  return weights.map((weight, k) =>
    ({ x: means[2 * k], y: means[2 * k + 1], std, weight, label: k % 2 }));
}

for (const name in golden.shapes) {                // the shapes themselves
  const made = name === "ring8_skewed" ? skewed(SHAPES.ring8(), 0.6) : SHAPES[name]();
  const total = made.reduce((sum, mode) => sum + mode.weight, 0), want = golden.shapes[name];
  hold(`shape ${name}`, made.flatMap((m) => [m.x, m.y]), want.means);
  hold(`shape ${name}`, made.map((m) => m.weight / total), want.weights);
  hold(`shape ${name}`, made.map((m) => m.std), want.weights.map(() => want.std));
}
hold("karras", [0, 0.25, 0.5, 0.75, 1].map((u) => M.karras(u, 0.05, 2)), golden.karras);

for (const c of golden.points) {                   // one sample's quantities
  const real = M.mixture(modes(c.shape)), fake = M.kernels(c.particles, golden.width);
  const at = { real: M.noised(real, c.sigma), fake: M.noised(fake, c.sigma),
    cond: M.noised(real, c.sigma, 1) };
  for (let i = 0; i < c.x.length / 2; i++) {
    const pair = (list) => list.slice(2 * i, 2 * i + 2);
    const triple = (list) => list.slice(3 * i, 3 * i + 3);
    const x = pair(c.x), xt = pair(c.xt), out = [0, 0], more = [0, 0];
    const [r, f, d, g] = [1, 2, 3, 4].map(M.answer);
    M.denoise(at.real, ...xt, r);
    M.denoise(at.fake, ...xt, f);
    M.denoise(at.cond, ...xt, d);
    hold("d_real", r.d, pair(c.d_real));
    hold("d_fake", f.d, pair(c.d_fake));
    hold("d_cond", d.d, pair(c.d_cond));
    hold("Jacobian of d_real", r.J, triple(c.J_real));
    hold("Jacobian of d_fake", f.J, triple(c.J_fake));
    hold("log p_real", [r.log_p, M.log_prob(at.real, ...xt)], [c.log_real[i], c.log_real[i]]);
    hold("log p_fake", [f.log_p, M.log_prob(at.fake, ...xt)], [c.log_fake[i], c.log_fake[i]]);
    M.score(r.d, xt, c.sigma, out);
    hold("score_real", out, pair(c.score_real));
    M.score(f.d, xt, c.sigma, out);
    hold("score_fake", out, pair(c.score_fake));
    M.guided(r, d, golden.guidance, g);
    hold("guided", g.d, pair(c.d_guided));
    hold("normaliser", M.normaliser(x, r.d), c.normaliser[i]);
    M.dmd_gradient(x, r.d, f.d, true, out);
    hold("dmd", out, pair(c.dmd));
    M.dmd_gradient(x, r.d, f.d, false, out);
    hold("diff_instruct", out, pair(c.diff_instruct));
    for (const key in c.sid) {
      const [alpha, normalise] = [parseFloat(key), key.endsWith("True")];
      const [value, direct, through] = c.sid[key];
      hold("sid, value", M.sid_integrand(x, r.d, f.d, alpha, normalise), value[i]);
      M.sid_gradient(x, r, f, alpha, normalise, out, more);
      hold("sid, direct", out, pair(direct));
      hold("sid, path", more, pair(through));
    }
    const logit = r.log_p - f.log_p;
    hold("gan, logit", logit, c.logit[i]);
    hold("gan, loss", M.generator_logit_loss(logit), c.gan_loss[i]);
    M.gan_gradient(r.d, f.d, logit, c.sigma, out);
    hold("gan", out, pair(c.gan));
    M.augmentation_gradient(x, d.d, r.d, golden.guidance, out);
    hold("augmentation", out, pair(c.augmentation));
    const ratio = Math.exp(Math.max(-5, Math.min(5, logit)));
    for (const h in c.weights) hold(`h(r) of ${h}`, M.WEIGHTS[h](ratio), c.weights[h][i]);
  }
}

const { particles, own, noise, sigmas, methods } = golden.batch;
for (const method in methods) {                    // every method, averaged over noises
  const teacher = M.mixture(modes("ring8_skewed")), data = M.mixture(modes("ring8"));
  const cfg = { method, alpha: 1.2, normalise: true, divergence: "js", w_gan: golden.w_gan,
    cond: method === "decoupled" ? 1 : -1, guidance: golden.guidance, matching: true,
    h: golden.width };
  const fake = M.kernels(particles, golden.width), { a, b, loss } = methods[method];
  const found = M.gradients(particles, teacher, data, fake, own, noise, sigmas, cfg);
  hold(`all particles, ${method}`, found.a, a);
  hold(`all particles, ${method}`, found.b, b.length ? b : Array.from(found.b, () => 0));
  hold(`all particles, ${method}, loss`, found.loss, loss);
}
const { shape, kl } = golden.kl, target = M.mixture(modes(shape));
hold("KL", M.kl(golden.kl.particles, target, golden.kl.own, golden.width), kl);

const bad = Object.keys(worst).filter((name) => !(worst[name] <= 1e-6));
for (const name in worst) console.log(`${worst[name].toExponential(1)}  ${name}`);
console.log(bad.length ? `above 1e-6: ${bad.join("; ")}` : "all within 1e-6");
process.exit(bad.length ? 1 : 0);
