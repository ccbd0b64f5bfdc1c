"""nano_dmd: distil diffusion models into one-step generators.  DMD, DMD2 and SiD through one train step.

Reading order: noise, networks, teacher, real_score, fake_score, dmd_loss, gan, sid_loss, generator, train.
"""

__version__ = "0.1.0"
