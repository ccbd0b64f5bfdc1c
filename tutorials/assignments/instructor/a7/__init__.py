"""Instructor's side of assignment 7.  The predictions of its handout, as the solution measures them:

P1  3, for every w: the point where the classifier finds the prompt most probable, (s^2 + tau^2 + sigma^2) / tau^2
P2  0.034: each update multiplies it by 1 - 0.2 / 6
P3  1.8 and 0.447; with level 0.3 for the augmentation 1.149 and 0.853
P4  4; with level 0.3 for the augmentation 13.66
P5  1.08, 4.14, 113.4; at noise level 10 all three together 2.05
P6  1/3; the right median is 2.2 times as noisy.  After the shift 0.556 of the draws lie below 1
P7  eps 0.1 and 10, v 0.0995 and 0.995, flow 0.0909 and 0.909

A7.1 (1)  k = w: where the fake score's two answers are the teacher's, `own` and augmentation cancel, so the data is a fixed
    point of the three parts.  k = 0, w = 1: no augmentation, and own = f_uncond - f_cond: guidance by the fake score itself
A7.2 (4)  it stops a drift of the brightness and of the contrast of an image; it sees neither content nor the loss of variety
    between images
A7.4  the smallest a is at sigma^2 = s sqrt(s^2 + tau^2), where R - r is largest: there the push differs most from sample to
    sample.  Less noise: the classifier is sure.  More noise: it is unsure of all samples alike, and the push moves them together
A7.5  implementation_1 ("w - 1", "sample"), implementation_2 ("w", "sample"), implementation_3 ("w - 1", "batch")
to hand in: w - 1 = 7 means 8; the floor and the noise levels change the weights of samples and levels, which no single w undoes
"""
