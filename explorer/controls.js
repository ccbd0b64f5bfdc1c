// What can be set on the page, each with its one sentence, and the experiments.
"use strict";

const is = (...methods) => (w) => methods.includes(w.cfg.method);
const has_classes = (w) => w.modes.some((mode) => mode.label === 1);

// [key, name, sentence, kind, ...]; kinds are range, log (a range of logarithms), check and select.
// A function at the end says when the control is shown.
const CONTROLS = {
  Method: [
    ["method", "Method", "Which loss moves the points.", "select",
      { dmd: "DMD", diff_instruct: "Diff-Instruct", sid: "SiD", gan: "GAN",
        dmd2: "DMD2 = DMD + GAN", f_distill: "f-distill", decoupled: "Decoupled DMD" }],
    ["normalise", "Normaliser", "Divides by mean |x - d_real|: points close to data keep moving.",
      "check", is("dmd", "dmd2", "sid")],
    ["alpha", "alpha", "1/2 descends half the Fisher divergence; 1 leaves out a part of it.",
      "range", [-0.5, 2, 0.05], is("sid")],
    ["divergence", "Divergence", "What weight h(r) a point gets; r = p_real / p_fake.", "select",
      { rkl: "reverse KL, h = 1", kl: "forward KL, h = r", js: "Jensen-Shannon, r/(r+1)",
        sf: "softened rkl, 1/(r+1)", sh: "Hellinger, sqrt(r)/2", jf: "Jeffreys, r + 1",
        neyman: "Neyman, 2/r" }, is("f_distill")],
    ["w_gan", "GAN weight", "How much the GAN adds. Its discriminator is the best: logit = ln r.",
      "log", [0.001, 1], is("dmd2")],
    ["matching", "Matching", "The part with the fake score. Without it augmentation is alone.",
      "check", is("decoupled")],
    ["cond", "Class", "What the student should make. Modes of class B have dashed circles.",
      "select", { "-1": "all classes", 0: "class A", 1: "class B" }, has_classes],
    ["guidance", "Guidance w", "Teacher: u + w (c - u), u without class, c with it. 1 is off.",
      "range", [0, 8, 0.25], (w) => has_classes(w) && w.cfg.cond >= 0],
    ["rate", "Step length", "A step moves a point by this times minus its gradient, at most 0.2.",
      "log", [0.0005, 1]],
  ],
  "Noise and the fake score": [
    ["delay", "Fake score is late by", "It knows where the points were so many steps ago.",
      "range", [0, 40, 1]],
    ["spread", "Average over sigmas", "The mean over noise levels between two ends, not one sigma.",
      "check"],
    ["sigma", "sigma", "How much noise is added before both scores look.",
      "log", [0.02, 5], (w) => !w.cfg.spread],
    ["low", "lowest sigma", "Small noise shows each mode.", "log", [0.02, 1], (w) => w.cfg.spread],
    ["high", "highest sigma", "Large noise shows only the whole.",
      "log", [0.1, 10], (w) => w.cfg.spread],
    ["draws", "Noises for a point", "A gradient is the mean over so many noises, in pairs n, -n.",
      "range", [2, 64, 2]],
  ],
  Picture: [
    ["arrows", "Arrows", "Scores are drawn on a grid, at the (highest) sigma.", "select",
      { moves: "where points go", parts: "parts of the move", scores: "both scores",
        gap: "difference of the scores", none: "none" }],
  ],
  Target: [
    ["shape", "Shape", "Modes to start from. Drag them as you like.", "select",
      { ring8: "ring of 8", grid25: "grid of 25", spirals: "spirals", checkerboard: "checkerboard",
        two: "two modes", one: "one mode" }],
    ["skew", "Teacher's mistake", "Every other mode has too much weight, not in the data.",
      "range", [0, 0.9, 0.1]],
    ["weight", "Weight of the chosen mode", "Its share of the data, before division by the sum.",
      "log", [0.05, 20]],
    ["std", "Width of the chosen mode", "Its standard deviation.", "log", [0.02, 0.6]],
    ["label", "Class of the chosen mode", "Guidance needs two classes.", "select",
      { 0: "class A", 1: "class B" }],
  ],
  Student: [
    ["n", "Points", "A student of so many points.", "range", [20, 500, 10]],
    ["start", "Start", "Where the points are at step 0.", "select",
      { blob: "a small blob", wide: "a wide blob", left: "on the left", mode: "on the first mode",
        target: "on the data" }],
    ["h", "Width of a point", "A point is a blob: a sample is its centre plus this times noise.",
      "log", [0.01, 0.3]],
    ["seed", "Seed", "All random numbers follow from it.", "range", [0, 99, 1]],
  ],
};
const RESTARTS = ["n", "start", "seed"], OF_MODE = ["weight", "std", "label"];

// [name, link, what one sees]
const TRY = [
  ["The loss says nothing", "sigma=0.3",
    "DMD from a blob. The loss falls at once and stays near 0. The true KL goes on falling."],
  ["Late fake score", "shape=one&start=left&delay=12&rate=0.1&sigma=0.6&n=200",
    "The fake score knows only the hollow points, of 12 steps ago. The student swings. "
    + "Set the delay to 0."],
  ["SiD at alpha 1.2", "method=sid&alpha=1.2&arrows=parts&n=100&start=wide",
    "Green is DMD's direction; the dashed part goes through the Jacobians. "
    + "The loss is below 0 and rises, while the true KL falls."],
  ["Normaliser off", "normalise=false&rate=0.1&start=left",
    "Close to the data the pull is weak: points stay between the modes. "
    + "Switch the normaliser on."],
  ["Covers or seeks", "method=f_distill&divergence=kl&shape=two&start=mode&sigma=0.25&rate=0.01"
    + "&n=200&mode=1",
    "All points start on one mode. Forward KL, h = r, fills the empty mode faster than h = 1. "
    + "Neyman, h = 2/r, is slowest."],
  ["Wrong teacher", "skew=0.6&shape=two&start=target&sigma=0.5&n=200&mode=1",
    "The teacher gives the right mode 20 % instead of 50 %. DMD copies that. "
    + "Choose GAN: it looks at the data and repairs."],
  ["Guidance never stops", "method=decoupled&cond=0&matching=false&arrows=parts&shape=two"
    + "&start=wide&rate=0.05&sigma=1&n=200",
    "Augmentation alone runs away from class B and does not stop. "
    + "Switch matching on: the points come back and rest."],
];
