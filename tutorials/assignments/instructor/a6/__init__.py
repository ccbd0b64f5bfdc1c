"""Instructor's side of assignment 6.  The predictions of its handout, as the solution measures them:

P1  Yes: every positive h belongs to a convex f.  At r = 1000 it is 3878, the forward KL's 5909: a third less.  At 50 it is
    142 and 147.  Its slope tends to ln 20 + 1, so a missing mode has a finite price.
P2  The slope at a = .3, b = 1e-2, 1e-4, 1e-6.  Like 1/b: forward KL (29, 2999, 299999) and Jeffreys.  Like 1/sqrt(b): squared
    Hellinger (4.6, 54, 547).  Like ln(1/b): reverse KL (3.7, 8.4, 13.0) and Jensen-Shannon (2.9, 7.5, 12.1).  Limited:
    softened reverse KL (.89) and Neyman (2.86).  In notebook 12 those that grow like a power leave the mode, the others stay.
P3  661, 943, 745 and 0: E_q[r^2] is finite for v > 1/2 only.
P4  .20 in ten bins, .05 in forty.
P5  18: 2^(18 / 2) = 512 against 511.
P6  .0015 = rho^2 with rho = .01 / .26; .73 for the student of variance 1.5.

The report: (a) the f of P1; h is bounded, and with it every variance.  (b) Not below v = 1/2; noise adds the same to both
variances, and (v + sigma^2) / (1 + sigma^2) passes 1/2 at sigma^2 = 1 - 2 v.  (c) None: the loss is g^2 / 2 anyway.
A6.4's warning: a lone x_t has almost no neighbour, the logarithm of its density falls without limit, and its r explodes.
"""
