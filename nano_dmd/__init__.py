"""nano_dmd: distil diffusion models into one-step generators.

Reading order: noise, denoiser, networks, teacher, real_score, fake_score, generator, dmd_loss, gan,
sid_loss, f_distill, decoupled, sida, real_uid, trajectory, methods.  Fifteen minutes: methods,
dmd_loss, fake_score.
"""

__version__ = "0.1.0"
