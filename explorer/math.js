// The maths of the explorer: every function of the page that is not drawing or input.
//
// Names are those of the Python package (docs/vocabulary.md): x clean, xt noised, sigma, d_real and
// d_fake the denoisers' answers, "real" the teacher, "fake" the generator. Everything is 2D and in
// double precision. Points are stored flat: x[2 i], x[2 i + 1]. golden.py compares it all with the
// package. A classic script: browsers do not load modules from file://. Node loads it with require.
"use strict";

// ---- random numbers

/** count unit normals (Float64Array) that follow from two whole numbers: mulberry32, Box-Muller. */
function normals(seed, step, count) {
  let a = (Math.imul(seed, 0x9e3779b1) ^ Math.imul(step + 1, 0x85ebca6b)) >>> 0;
  const uniform = () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const z = new Float64Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
    z[i] = radius * Math.cos(angle);
    if (i + 1 < count) z[i + 1] = radius * Math.sin(angle);
  }
  return z;
}

/** The same numbers, but the second half is minus the first: means of odd functions are exact. */
function antithetic(seed, step, count) {
  const z = normals(seed, step, count);
  for (let i = count / 2; i < count; i++) z[i] = -z[i - count / 2];
  return z;
}

/** Noise level of u in [0, 1]: 0 -> high, 1 -> low, uniform in sigma^(1/7).  noise.karras */
function karras(u, low, high) {
  const a = low ** (1 / 7), b = high ** (1 / 7);
  return (b + u * (a - b)) ** 7;
}

// ---- mixtures of Gaussians

/** sum_k weight_k N(mean_k, std_k^2 I) from modes {x, y, std, weight, label}.  mixtures.Mixture */
function mixture(modes) {
  const total = modes.reduce((sum, mode) => sum + mode.weight, 0);
  return {
    mean: Float64Array.from(modes.flatMap((mode) => [mode.x, mode.y])),               // (2 K)
    var: Float64Array.from(modes, (mode) => mode.std ** 2),                           // (K)
    log_weight: Float64Array.from(modes, (mode) => Math.log(mode.weight / total)),    // (K)
    label: Int8Array.from(modes, (mode) => mode.label || 0),                          // (K)
  };
}

/** The generator's distribution: mean_i N(x_i, h^2 I) of the particles x (2 N). */
function kernels(x, h) {
  const n = x.length / 2;
  return {
    mean: Float64Array.from(x), var: new Float64Array(n).fill(h * h),
    log_weight: new Float64Array(n).fill(-Math.log(n)), label: new Int8Array(n),
  };
}

/** The mixture after noise sigma >= 0: variances grow.  cond >= 0 keeps the modes of one class.
 *
 * const_k = ln weight_k - ln(2 pi (std_k^2 + sigma^2)),   shrink_k = std_k^2 / (std_k^2 + sigma^2)
 * As in Python the weights of a class are not divided by their sum: D and scores do not care.
 */
function noised(mix, sigma, cond = -1) {
  const keep = [...mix.label.keys()].filter((k) => cond < 0 || mix.label[k] === cond);
  const total = Float64Array.from(keep, (k) => mix.var[k] + sigma * sigma);
  return {
    sigma, n: keep.length,
    mx: Float64Array.from(keep, (k) => mix.mean[2 * k]),
    my: Float64Array.from(keep, (k) => mix.mean[2 * k + 1]),
    inverse: total.map((v) => 1 / v),
    shrink: total.map((v, i) => mix.var[keep[i]] / v),
    constant: total.map((v, i) => mix.log_weight[keep[i]] - Math.log(2 * Math.PI * v)),
  };
}

const LEAST = -40;          // e^-40 = 4e-18: what is left out is far below double precision
const CELLS = 64;
const TABLE = Float64Array.from({ length: 42 * CELLS }, (_, i) => Math.exp(-i / CELLS));

/** exp(v) for -41 < v <= 0, to 1e-15, faster than Math.exp: a table, times a series in the rest. */
function exp_below_0(v) {
  const i = (0.5 - v * CELLS) | 0, r = v + i / CELLS;                      // |r| <= 1 / 128
  return TABLE[i] * (1 + r * (1 + r / 2 * (1 + r / 3 * (1 + r / 4 * (1 + r / 5 * (1 + r / 6))))));
}

let terms = new Float64Array(512);                 // ln of weight_k N(xt; mean_k, ..), reused

/** Fills `terms` at xt = (a, b); returns the largest. */
function log_terms(p, a, b) {
  const { n, mx, my, inverse, constant } = p;
  if (terms.length < n) terms = new Float64Array(2 * n);
  const out = terms;
  let top = -Infinity;
  for (let k = 0; k < n; k++) {
    const u = mx[k] - a, v = my[k] - b, term = constant[k] - 0.5 * inverse[k] * (u * u + v * v);
    out[k] = term;
    if (term > top) top = term;
  }
  return top;
}

/** log p(xt) of a noised mixture, in log space: far away p itself is 0.  Mixture.log_prob */
function log_prob(p, a, b) {
  const top = log_terms(p, a, b), here = terms, n = p.n;
  let sum = 0;
  for (let k = 0; k < n; k++) if (here[k] - top > LEAST) sum += exp_below_0(here[k] - top);
  return top + Math.log(sum);
}

/** The exact denoiser at xt = (a, b) and its Jacobian; sigma > 0.  Mixture.denoise
 *
 *     D = E[x | xt] = xt + sum_k share_k u_k,      u_k = (1 - shrink_k) (mean_k - xt)
 *     J = dD / dxt = Cov[x | xt] / sigma^2 = sum_k share_k shrink_k I + Cov_k[u_k] / sigma^2
 *
 * share = softmax of the terms.  Into out: d (2), J (3: xx, xy, yy), log_p.  J is symmetric.
 */
function denoise(p, a, b, out) {
  const top = log_terms(p, a, b), here = terms, { n, mx, my, shrink } = p;
  let sum = 0, u = 0, v = 0, uu = 0, uv = 0, vv = 0, shrunk = 0;
  for (let k = 0; k < n; k++) {
    const term = here[k] - top;
    if (term < LEAST) continue;
    const e = exp_below_0(term), pull = 1 - shrink[k];
    const du = pull * (mx[k] - a), dv = pull * (my[k] - b), eu = e * du, ev = e * dv;
    sum += e;
    u += eu;
    v += ev;
    uu += eu * du;
    uv += eu * dv;
    vv += ev * dv;
    shrunk += e * shrink[k];
  }
  u /= sum;
  v /= sum;
  const s2 = p.sigma * p.sigma, total = sum * s2;
  out.log_p = top + Math.log(sum);
  out.d[0] = a + u;
  out.d[1] = b + v;
  out.J[0] = shrunk / sum + uu / total - u * u / s2;
  out.J[1] = uv / total - u * v / s2;
  out.J[2] = shrunk / sum + vv / total - v * v / s2;
}

const answer = () => ({ d: new Float64Array(2), J: new Float64Array(3), log_p: 0 });

/** u + w (c - u), for predictions and Jacobians alike; w = 1 is off.  real_score.guided */
function guided(uncond, cond, w, out) {
  for (let k = 0; k < 2; k++) out.d[k] = uncond.d[k] + w * (cond.d[k] - uncond.d[k]);
  for (let k = 0; k < 3; k++) out.J[k] = uncond.J[k] + w * (cond.J[k] - uncond.J[k]);
}

/** score = grad log p(xt) = (D(xt) - xt) / sigma^2, into out (2).  denoiser.score */
function score(d, xt, sigma, out) {
  for (let k = 0; k < 2; k++) out[k] = (d[k] - xt[k]) / (sigma * sigma);
}

// ---- one sample's gradients.  Descend them.  x, xt, d_real, d_fake, ... are pairs of numbers

/** mean_pixels |x - d_real|, at least 1e-5.  real_score.normaliser */
function normaliser(x, d_real) {
  return Math.max(1e-5, (Math.abs(x[0] - d_real[0]) + Math.abs(x[1] - d_real[1])) / 2);
}

/** g = (d_fake - d_real) / mean |x - d_real|: DMD eq. 7-8.  Not normalised: Diff-Instruct */
function dmd_gradient(x, d_real, d_fake, normalise, out) {
  const size = normalise ? normaliser(x, d_real) : 1;
  for (let k = 0; k < 2; k++) out[k] = (d_fake[k] - d_real[k]) / size;
}

/** SiD's loss, summed over both coordinates: gap (d_real - x - alpha gap) / mean |x - d_real| */
function sid_integrand(x, d_real, d_fake, alpha, normalise) {
  let sum = 0;
  for (let k = 0; k < 2; k++) {
    const gap = d_real[k] - d_fake[k];
    sum += gap * (d_real[k] - x[k] - alpha * gap);
  }
  return sum / (normalise ? normaliser(x, d_real) : 1);
}

/** The gradient of sid_integrand, in the two parts in which x has an effect, over the normaliser:
 *
 *     direct = d_fake - d_real                                           x itself; DMD's direction
 *     path   = (J_real - J_fake) (d_real - x - 2 alpha gap) + J_real gap      x moves xt moves both
 */
function sid_gradient(x, real, fake, alpha, normalise, direct, path) {
  const size = normalise ? normaliser(x, real.d) : 1, J = real.J, F = fake.J;
  const gap0 = real.d[0] - fake.d[0], gap1 = real.d[1] - fake.d[1];
  const v0 = real.d[0] - x[0] - 2 * alpha * gap0, v1 = real.d[1] - x[1] - 2 * alpha * gap1;
  direct[0] = -gap0 / size;
  direct[1] = -gap1 / size;
  const cross = J[1] - F[1];
  path[0] = ((J[0] - F[0]) * v0 + cross * v1 + J[0] * gap0 + J[1] * gap1) / size;
  path[1] = (cross * v0 + (J[2] - F[2]) * v1 + J[1] * gap0 + J[2] * gap1) / size;
}

/** -(w - 1) (d_cond - d_uncond) / mean |x - d_cond|.  decoupled.augmentation_gradient */
function augmentation_gradient(x, d_cond, d_uncond, w, out) {
  const size = normaliser(x, d_cond);
  for (let k = 0; k < 2; k++) out[k] = -(w - 1) * (d_cond[k] - d_uncond[k]) / size;
}

/** softplus(-logit): what a generator pays the discriminator.  gan.generator_logit_loss */
function generator_logit_loss(logit) {
  return Math.max(0, -logit) + Math.log1p(Math.exp(-Math.abs(logit)));
}

/** Its gradient when the discriminator is the best one, logit = ln r = ln p_real - ln p_fake:
 *
 *     sigmoid(-ln r) (score_fake - score_real) = (d_fake - d_real) / sigma^2 / (1 + r)
 */
function gan_gradient(d_real, d_fake, logit, sigma, out) {
  const weight = 1 / (1 + Math.exp(Math.min(700, logit)));
  for (let k = 0; k < 2; k++) out[k] = weight * (d_fake[k] - d_real[k]) / (sigma * sigma);
}

const WEIGHTS = {                   // h(r) by divergence, r = p_real / p_fake; f_distill.WEIGHTS
  rkl: () => 1,
  kl: (r) => r,
  js: (r) => r / (r + 1),
  sf: (r) => 1 / (r + 1),
  sh: (r) => Math.sqrt(r) / 2,
  jf: (r) => r + 1,
  neyman: (r) => 2 / r,
};

/** h(r) over its mean, (n B).  logits = ln r are in n groups of B, one noise level each.
 *
 * r is clipped to [.1, 20], then divided by its mean at that noise level.  f_distill.sample_weights
 */
function sample_weights(logits, groups, divergence) {
  const size = logits.length / groups;
  const r = logits.map((logit) => Math.min(20, Math.max(0.1, Math.exp(logit))));
  const mean = (part) => part.reduce((sum, value) => sum + value, 0) / part.length;
  for (let j = 0; j < groups; j++) {
    const group = r.subarray(j * size, (j + 1) * size), centre = mean(group);
    for (let i = 0; i < size; i++) group[i] /= centre;
  }
  const h = r.map(WEIGHTS[divergence]), centre = mean(h);
  return h.map((value) => value / centre);
}

// ---- all particles.  One "look": a particle, its sample x, its xt, and what everybody says there

const half_square = (g) => (g[0] * g[0] + g[1] * g[1]) / 4;        // descend's value, mean of two

/** The methods: (look, cfg, a, b) writes two parts of the gradient to a and b, returns the loss */
const METHODS = {
  dmd(look, cfg, a) {
    dmd_gradient(look.x, look.real.d, look.fake.d, cfg.normalise, a);
    return half_square(a);
  },
  diff_instruct(look, cfg, a) {
    dmd_gradient(look.x, look.real.d, look.fake.d, false, a);
    return half_square(a);
  },
  sid(look, cfg, direct, path) {
    sid_gradient(look.x, look.real, look.fake, cfg.alpha, cfg.normalise, direct, path);
    return sid_integrand(look.x, look.real.d, look.fake.d, cfg.alpha, cfg.normalise) / 2;
  },
  gan(look, cfg, a) {
    gan_gradient(look.data.d, look.fake.d, look.logit, look.sigma, a);
    return generator_logit_loss(look.logit);
  },
  dmd2(look, cfg, a, b) {
    dmd_gradient(look.x, look.real.d, look.fake.d, cfg.normalise, a);
    gan_gradient(look.data.d, look.fake.d, look.logit, look.sigma, b);
    for (let k = 0; k < 2; k++) b[k] *= cfg.w_gan;
    return half_square(a) + cfg.w_gan * generator_logit_loss(look.logit);
  },
  f_distill(look, cfg, a) {                        // gradients() multiplies it by h(r)
    dmd_gradient(look.x, look.real.d, look.fake.d, true, a);
    return half_square(a);
  },
  decoupled(look, cfg, matching, augmentation) {
    dmd_gradient(look.x, look.cond.d, look.fake.d, true, matching);
    if (!cfg.matching) matching.fill(0);
    augmentation_gradient(look.x, look.cond.d, look.uncond.d, cfg.guidance, augmentation);
    return half_square(matching) + half_square(augmentation);
  },
};

/** An empty look: a sample x, its xt, what everybody answers there, and ln r. */
const new_look = () => ({ x: [0, 0], xt: [0, 0], sigma: 0, real: answer(), cond: answer(),
  uncond: answer(), fake: answer(), data: answer(), logit: 0 });

/** Puts x = particle i + h own, xt = x + sigma noise into a look; own and noise at their row. */
function sample_at(look, particles, i, own, noise, row, h, sigma) {
  for (let k = 0; k < 2; k++) {
    look.x[k] = particles[2 * i + k] + h * own[2 * row + k];
    look.xt[k] = look.x[k] + sigma * noise[2 * row + k];
  }
}

/** The gradient at every particle, averaged over noises: what the page draws and play descends.
 *
 *     x = particle + h * own,     xt = x + sigma_j * noise         (own, noise: unit normal, fixed)
 *
 * particles (2 N); own, noise (2 N J) by draw j; sigmas (J).  teacher, data, fake are mixtures.
 * cfg: method, alpha, normalise, divergence, w_gan, cond (-1: all classes), guidance, matching, h.
 * returns a, b (2 N): two parts, g = a + b; loss: its value; mesm: mean |d_real - d_fake|^2
 */
function gradients(particles, teacher, data, fake, own, noise, sigmas, cfg) {
  const n = particles.length / 2, J = sigmas.length, method = METHODS[cfg.method];
  const look = new_look();
  const parts = new Float64Array(4 * n * J), losses = new Float64Array(n * J);
  const logits = new Float64Array(n * J), a = new Float64Array(2), b = new Float64Array(2);
  let mesm = 0;
  for (let j = 0; j < J; j++) {
    const at = look_at(teacher, data, fake, sigmas[j], cfg);
    for (let i = 0; i < n; i++) {
      const row = j * n + i;
      sample_at(look, particles, i, own, noise, row, cfg.h, sigmas[j]);
      at(look);
      losses[row] = method(look, cfg, a, b);
      logits[row] = look.logit;
      for (let k = 0; k < 2; k++) {
        parts[4 * row + k] = a[k];
        parts[4 * row + 2 + k] = b[k];
        mesm += (look.real.d[k] - look.fake.d[k]) ** 2 / (2 * n * J);
      }
    }
  }
  const h = cfg.method === "f_distill" && sample_weights(logits, J, cfg.divergence);
  const out = { a: new Float64Array(2 * n), b: new Float64Array(2 * n), loss: 0, mesm };
  for (let row = 0; row < n * J; row++) {
    const i = row % n, weight = h ? h[row] : 1;
    for (let k = 0; k < 2; k++) {
      out.a[2 * i + k] += weight * parts[4 * row + k] / J;
      out.b[2 * i + k] += weight * parts[4 * row + 2 + k] / J;
    }
    out.loss += weight * weight * losses[row] / (n * J);
  }
  return out;
}

/** Teacher, data and fake at noise level sigma: a function that fills a look from its x, xt. */
function look_at(teacher, data, fake, sigma, cfg) {
  const split = cfg.cond >= 0;
  const at_uncond = noised(teacher, sigma), at_cond = noised(teacher, sigma, cfg.cond);
  const at_data = data === teacher ? null : noised(data, sigma, cfg.cond);
  const at_fake = noised(fake, sigma);
  const share = Math.log(class_share(data, cfg.cond));
  return (look) => {
    const [a, b] = look.xt;
    look.sigma = sigma;
    denoise(at_fake, a, b, look.fake);
    denoise(at_cond, a, b, look.cond);
    if (split) denoise(at_uncond, a, b, look.uncond);
    if (split) guided(look.uncond, look.cond, cfg.guidance, look.real);
    else look.real = look.uncond = look.cond;
    if (at_data) denoise(at_data, a, b, look.data);
    else look.data = look.cond;
    look.logit = look.data.log_p - share - look.fake.log_p;
  };
}

/** The weight of a class in a mixture, 1 for cond = -1. */
function class_share(mix, cond) {
  return mix.log_weight.reduce((sum, w, k) =>
    sum + (cond < 0 || mix.label[k] === cond ? Math.exp(w) : 0), 0);
}

/** KL(p_fake || p_real) of clean samples, by a fixed normal draw `own` (2 N J) for each particle:
 *
 *     mean_ij [ ln p_fake(y) - ln p_real(y) ],     y = x_i + h own_ij
 */
function kl(particles, real, own, h, cond = -1) {
  const fake = noised(kernels(particles, h), 0), target = noised(real, 0, cond);
  const n = particles.length, share = Math.log(class_share(real, cond));
  let sum = 0;
  for (let i = 0; i < own.length; i += 2) {
    const a = particles[i % n] + h * own[i], b = particles[(i + 1) % n] + h * own[i + 1];
    sum += log_prob(fake, a, b) - log_prob(target, a, b) + share;
  }
  return sum / (own.length / 2);
}

const nano = { normals, antithetic, karras, mixture, kernels, noised, exp_below_0, log_prob,
  denoise, answer, guided, score, normaliser, dmd_gradient, sid_integrand, sid_gradient,
  augmentation_gradient, generator_logit_loss, gan_gradient, WEIGHTS, sample_weights, METHODS,
  new_look, sample_at, gradients, look_at, kl, class_share };
if (typeof module !== "undefined") module.exports = nano;
