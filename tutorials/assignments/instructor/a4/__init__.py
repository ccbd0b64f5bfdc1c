"""Instructor's side of assignment 4.  The predictions of its handout, as the solution measures them:

P1  .3, .15, 0, -.06
P2  .27, .1485, .027, -.0216: least at alpha = 1/2, where the error enters to second order only
P3  1, 0, .5, .5, .8
P4  3 arrives, 4 does not: the boundary is sqrt(11) = 3.317; with the levels 0.5, 1 and 2 mixed it is 4.493, between those
    of the single levels, 2.693, 3.317 and 5.099.  SiD's start, a = 2.5 / 7.25 = .345, is far inside
P5  SiD at sigma = sqrt(2) s, DMD at sigma = s
P6  no: 4 r (1 - r)^2 has no alpha in it; harder
P7  9.0625, 1.5625, 1.2625; the limit is 1 + s^2 / tau^2 = 1.25

A4.1 (3)  at alpha = 1/2 a game for half the difference of the teacher's and the fake score's denoising losses
A4.2 (4)  alpha = 1/2: half of dM/dA.  alpha = 1: half of the score part, the gradient with the samples' law held
A4.5 (2)  all equal: guidance on the teacher alone.  kappa1 = 1, kappa2 = kappa4: guidance cancels, the data is a fixed point
to hand in: diagnostics.gaps plugs d_fake in, E|g - e|^2 = M - 2 E g.e + E|e|^2: biased to first order in the error
"""
