// The targets: shapes of toy/mixtures.py as lists of modes {x, y, std, weight, label}, two more.
// The classes (label 0 or 1) are the explorer's own; guidance needs them.
"use strict";

const range = (n) => [...Array(n).keys()];

/** A circle of 8 modes, std 0.05; every other one is of class 1. */
function ring() {
  return range(8).map((k) => ({ x: 0.7036 * Math.cos(k * Math.PI / 4),
    y: 0.7036 * Math.sin(k * Math.PI / 4), std: 0.05, weight: 1, label: k % 2 }));
}

function grid25() {
  return range(25).map((k) => ({ x: 0.3518 * (Math.floor(k / 5) - 2), y: 0.3518 * (k % 5 - 2),
    std: 0.05, weight: 1, label: k % 2 }));
}

/** Two interleaved arms of 60 components; an arm is a class. */
function spirals() {
  const arm = range(60).map((k) => Math.sqrt(0.15 + 0.85 * k / 59) * 3 * Math.PI)
    .map((t) => [t / (3 * Math.PI) * Math.cos(t), t / (3 * Math.PI) * Math.sin(t)]);
  return scaled([...arm, ...arm.map(([x, y]) => [-x, -y])], 0.03, (k) => (k < 60 ? 0 : 1));
}

/** 8 dark squares of a 4 x 4 board, 16 components each; left and right half are the classes. */
function checkerboard() {
  const dark = range(16).map((k) => [Math.floor(k / 4), k % 4])
    .filter(([i, j]) => (i + j) % 2 === 0);
  const points = dark.flatMap(([i, j]) => range(16).map((k) =>
    [i + (Math.floor(k / 4) + 0.5) / 4 - 2, j + (k % 4 + 0.5) / 4 - 2]));
  return scaled(points, 0.06, (k) => (k < 64 ? 0 : 1));
}

/** Modes at 0.5 points / std(points): one std of all coordinates, divided by their number - 1. */
function scaled(points, std, label) {
  const all = points.flat(), mean = all.reduce((a, b) => a + b, 0) / all.length;
  const variance = all.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (all.length - 1);
  return points.map(([x, y], k) => ({ x: 0.5 * x / Math.sqrt(variance),
    y: 0.5 * y / Math.sqrt(variance), std, weight: 1, label: label(k) }));
}

const SHAPES = { ring8: ring, grid25, spirals, checkerboard,
  two: () => [-0.5, 0.5].map((x, k) => ({ x, y: 0, std: 0.12, weight: 1, label: k })),
  one: () => [{ x: 0, y: 0, std: 0.15, weight: 1, label: 0 }] };

/** The teacher's weights when it is wrong: even modes (1 + skew), odd ones (1 - skew) times theirs.
 *  ring8_skewed is skew = 0.6. */
function skewed(modes, skew) {
  return modes.map((mode, k) => ({ ...mode, weight: mode.weight * (1 + (k % 2 ? -skew : skew)) }));
}

if (typeof module !== "undefined") module.exports = { SHAPES, skewed };
