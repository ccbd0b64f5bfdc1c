"""Instructor's side of assignment 1.  The handout's predictions:

P1  x_t - sigma^2 / b = 8 up to rounding, because far out the pull is 1/b everywhere; Gaussian: 10 * 0.5 / 1.5 = 3.33.
P2  Larger: sigma^2 = 1.  Far out the log prior is a straight line, which moves the posterior and leaves its width; a
    Gaussian prior always narrows it, here to 0.5 / 1.5 = 0.33.
P3  10, 10 / 22 = 0.45, sqrt(10) / 2 = 1.58.  Jensen-Shannon: at most 1/2, as r / (2 (1 + r)).
P4  Reverse: sqrt(a s), 0.32 and 3.2.  Forward: a itself, 0.1 and 10, whatever the data.
P5  Further off.  E_fake[r^2] is finite for sigma^2 > s^2 - 2 a^2 only, here above 0.99; below, the average rests on samples
    so rare that most runs hold none: 0.04, 0.10, 0.05, 0.04, 0.08, 0.29 of the truth with torch.manual_seed 0 to 5.

The closing questions: under the forward KL a collapsed generator hears much more, at its own scale, but from samples where
it has hardly any, so what it measures is the little that it can see.  Clipping r bounds the variance and gives a different,
biased gradient: beyond the clip, samples count as if the divergence were another.
"""
