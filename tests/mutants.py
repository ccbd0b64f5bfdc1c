"""Wrong versions of the code that the tests must reject: a suite is as good as the mistakes it was shown to see.

Each is a small edit of one function: old text (found exactly once) -> new text, and the check that must then fail.
Where the mistake was met in the wild, `seen` says so; the others are the slips one makes while typing.

Applying a mutant compiles the edited function in its own module and swaps the code object, so that every reference to
the function, in METHODS or imported by name elsewhere, becomes the wrong version for a moment.
"""

import inspect
import textwrap
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Callable, NamedTuple

import test_generator as on_generator
import test_golden as on_golden
import test_losses as on_losses
import test_teacher as on_teacher


class Mutant(NamedTuple):
    name: str
    seen: str                       # where this mistake was met, "" if only imagined
    target: str                     # module:function or module:Class.method
    old: str
    new: str
    check: Callable                 # check() passes on the right version and raises AssertionError on this one


def find(target):
    """The plain function behind 'nano_dmd.gan:logits' or 'nano_dmd.generator:Generator.step', decorators removed."""
    module, _, path = target.partition(":")
    found = import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return inspect.unwrap(found)


def edited(function, old, new):
    """The code object of the function with one piece of its source replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{function.__qualname__} holds {old!r} {source.count(old)} times, not once: edit the mutant")
    scope = {}
    exec(compile(source.replace(old, new), f"<mutant of {function.__qualname__}>", "exec"), function.__globals__, scope)
    return inspect.unwrap(scope[function.__name__]).__code__


@contextmanager
def applied(mutant):
    """Within the block, the package is wrong in this one way."""
    function = find(mutant.target)
    right = function.__code__
    function.__code__ = edited(function, mutant.old, mutant.new)
    try:
        yield
    finally:
        function.__code__ = right


DMD, SID, GAN = "nano_dmd.dmd_loss", "nano_dmd.sid_loss", "nano_dmd.gan"
METHODS, GENERATOR, DENOISER, NOISE = "nano_dmd.methods", "nano_dmd.generator", "nano_dmd.denoiser", "nano_dmd.noise"
FAKE, DRAW = "nano_dmd.fake_score", "nano_dmd.engine.draw"
DMD_SIZE = "(x - d_real).abs().flatten(1).mean(1).clamp(min=1e-5)"
SID_SIZE = "(x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)"
ONE_SIZE = "(x - d_real).detach().abs().mean().clamp(min=1e-5).expand(len(x))"
FRESH = """for i in range(cfg.critic_steps):
        batches = [draw() for _ in range(cfg.accumulate)]"""
ONE_BATCH = """batches = [draw() for _ in range(cfg.accumulate)]
    for i in range(cfg.critic_steps):"""
WHO_MOVES = {method: partial(on_losses.test_who_moves, method) for method in ("dmd", "dmd2", "sid")}

MUTANTS = [
    # ---- DMD
    Mutant("dmd: sign flipped", "it confuses readers: FastVideo issue 836",
           f"{DMD}:dmd_gradient", "((d_fake - d_real) /", "((d_real - d_fake) /",
           on_losses.test_dmd_descends),
    Mutant("dmd: the half is missing", "OpenDMD dmd/model.py:194",
           f"{DMD}:descend", "return 0.5 *", "return", on_losses.test_dmd_loss_gradient_and_value),
    Mutant("dmd: normalised by mean |d_real|", "dmd-mnist train_dmd.py",
           f"{DMD}:dmd_gradient", "(x - d_real).abs()", "d_real.abs()",
           on_losses.test_dmd_normaliser_measures_the_distance_to_the_teacher),
    Mutant("dmd: normalised by mean |x - d_fake|", "",
           f"{DMD}:dmd_gradient", "(x - d_real).abs()", "(x - d_fake).abs()",
           on_losses.test_dmd_normaliser_measures_the_distance_to_the_teacher),
    Mutant("dmd: one normaliser for the whole batch", "FastVideo dmd2.py:692",
           f"{DMD}:dmd_gradient", DMD_SIZE, ONE_SIZE,
           on_losses.test_dmd_normaliser_is_per_sample),
    Mutant("dmd: normalised by the paired target", "flowmodels dmd.py",
           f"{DMD}:dmd_loss", "dmd_gradient(x, *", "dmd_gradient(batch.pair_x, *",
           on_losses.test_dmd_loss_gradient_and_value),
    Mutant("dmd: sum instead of mean in the normaliser", "",
           f"{DMD}:dmd_gradient", ".flatten(1).mean(1)", ".flatten(1).sum(1)", on_losses.test_dmd_gradient_of_images),
    Mutant("dmd: normaliser per row of pixels", "",
           f"{DMD}:dmd_gradient", "expand(size, x)", "(x - d_real).abs().mean(-1, keepdim=True)",
           on_losses.test_dmd_gradient_of_images),
    Mutant("dmd: normaliser not bounded below", "DMD2 edm_guidance.py:102-108",
           f"{DMD}:dmd_gradient", ".clamp(min=1e-5)", "", on_losses.test_normalisers_stay_above_1e_5),
    Mutant("dmd: NaN turned into 0", "DMD2 edm_guidance.py:108",
           f"{DMD}:dmd_gradient", "expand(size, x)).detach()", "expand(size, x)).nan_to_num().detach()",
           on_losses.test_nan_is_not_hidden),
    Mutant("dmd: target not detached", "",
           f"{DMD}:descend", "(x - g).detach()", "(x - g)", on_losses.test_dmd_loss_gradient_and_value),
    Mutant("dmd: sum instead of mean over a sample", "SiD's convention; it makes GAN weights mean something else",
           f"{DMD}:dmd_loss", ".flatten(1).mean(1)", ".flatten(1).sum(1)", on_losses.test_dmd_loss_gradient_and_value),
    Mutant("dmd: fake score asked at the clean sample", "",
           f"{DMD}:predictions", "nets.fake(xt,", "nets.fake(x,", on_losses.test_dmd_loss_gradient_and_value),
    Mutant("dmd: the two scores see different noise", "",
           f"{DMD}:predictions", "nets.fake(xt,", "nets.fake(add_noise(x, sigma, torch.randn_like(x)),",
           on_losses.test_dmd_is_the_gradient_of_kl),
    Mutant("dmd: real and fake swapped on the way", "",
           f"{DMD}:predictions", "nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)",
           "nets.fake(xt, sigma, cond), nets.real(xt, sigma, cond)", on_losses.test_dmd_is_the_gradient_of_kl),
    Mutant("dmd: noise levels of the critic", "",
           f"{DMD}:predictions", "cfg.dm_sigma, x", "cfg.critic_sigma, x",
           on_losses.test_dmd_loss_gradient_and_value),
    Mutant("dmd: shapes not checked", "",
           f"{DMD}:dmd_gradient", "if not x.shape == d_real.shape == d_fake.shape:", "if False:",
           on_losses.test_shapes_must_agree),
    Mutant("dmd: against the reference's numbers, sign flipped", "",
           f"{DMD}:dmd_gradient", "((d_fake - d_real) /", "((d_real - d_fake) /",
           partial(on_golden.test_dmd_gradient, "adm_cond")),
    Mutant("dmd: fake score not told the class", "",
           f"{DMD}:predictions", "nets.fake(xt, sigma, cond)", "nets.fake(xt, sigma, None)",
           on_losses.test_every_network_is_asked_for_the_class),
    Mutant("diff-instruct: normalised like dmd", "",
           f"{DMD}:diff_instruct_loss", "descend(x, d_fake - d_real)", "descend(x, dmd_gradient(x, d_real, d_fake))",
           on_losses.test_dmd_is_the_gradient_of_kl),
    Mutant("regression: classes of another batch", "",
           f"{DMD}:regression_loss", "batch.pair_cond", "batch.cond", on_losses.test_regression_loss_by_hand),
    Mutant("regression: noise and image of different pairs", "",
           f"{DRAW}:Draw.take_pairs", "self.device)[None]", "self.device).flip(0)[None]",
           on_losses.test_noise_image_pairs_stay_together),
    # ---- SiD
    Mutant("sid: sign of alpha", "",
           f"{SID}:sid_integrand", "- alpha * gap", "+ alpha * gap", on_losses.test_sid_integrand_by_hand),
    Mutant("sid: alpha on the wrong term", "",
           f"{SID}:sid_integrand", "((d_real - x) - alpha * gap)", "(alpha * (d_real - x) - gap)",
           on_losses.test_sid_value),
    Mutant("sid: alpha left out", "SF model/sid.py:128 (its TODO)",
           f"{SID}:sid_integrand", "alpha * gap", "gap", on_losses.test_sid_value),
    Mutant("sid: gap reversed in the projected term", "",
           f"{SID}:sid_integrand", "gap * ((d_real - x)", "gap * ((d_fake - x)", on_losses.test_sid_integrand_by_hand),
    Mutant("sid: xt instead of x in the projected term", "",
           f"{SID}:sid_loss", "sid_integrand(x, d_real", "sid_integrand(xt, d_real", on_losses.test_sid_value),
    Mutant("sid: fake score detached", "",
           f"{SID}:sid_loss", "nets.fake(xt, sigma, cond)", "nets.fake(xt, sigma, cond).detach()",
           on_losses.test_sid_gradient),
    Mutant("sid: real score detached", "the usual no_grad around a teacher",
           f"{SID}:sid_loss", "nets.real(xt, sigma, cond)", "nets.real(xt, sigma, cond).detach()",
           on_losses.test_sid_gradient_by_finite_differences),
    Mutant("sid: both scores detached, which is dmd", "",
           f"{SID}:sid_loss", "add_noise(x, sigma", "add_noise(x.detach(), sigma",
           on_losses.test_sid_with_jacobians_is_not_dmd),
    Mutant("sid: the path through x itself detached", "",
           f"{SID}:sid_integrand", "gap * ((d_real - x)", "gap * ((d_real - x.detach())",
           on_losses.test_sid_gradient_is_two_halves_of_mesm),
    Mutant("sid: normaliser with gradient", "",
           f"{SID}:sid_integrand", "(x - d_real).detach()", "(x - d_real)",
           on_losses.test_sid_gradient_by_finite_differences),
    Mutant("sid: one normaliser for the whole batch", "",
           f"{SID}:sid_integrand", SID_SIZE, ONE_SIZE,
           on_losses.test_sid_normaliser_is_per_sample),
    Mutant("sid: normalised by the distance to the fake score", "",
           f"{SID}:sid_integrand", SID_SIZE, SID_SIZE.replace("d_real", "d_fake"),
           partial(on_golden.test_sid_value, "ddpmpp_cond")),
    Mutant("sid: normalise=False ignored", "",
           f"{SID}:sid_integrand", "if normalise else 1.0", "", on_losses.test_sid_value),
    # ---- the fake score
    Mutant("fake score: weight 1/sigma^2 alone", "",
           f"{DENOISER}:edm_loss", "1 / sigma**2 + 1 / sigma_data**2", "1 / sigma**2",
           partial(on_golden.test_denoising_loss, "adm_cond")),
    Mutant("fake score: weight not squared", "",
           f"{DENOISER}:edm_loss", "1 / sigma**2 + 1 / sigma_data**2",
           "(sigma**2 + sigma_data**2) / (sigma * sigma_data)",
           on_losses.test_edm_loss_weight_undoes_the_preconditioning),
    Mutant("fake score: fitted to the noised sample", "",
           f"{DENOISER}:edm_loss", "cond) - x)", "cond) - add_noise(x, sigma, noise))",
           on_losses.test_denoising_loss_is_least_at_the_posterior_mean),
    Mutant("fake score: its loss reaches the generator", "",
           f"{METHODS}:update", "x.detach() if which == \"critic\" else x", "x", WHO_MOVES["sid"]),
    Mutant("fake score: noise levels of the generator loss", "",
           f"{FAKE}:denoising_loss", "cfg.critic_sigma, x", "cfg.dm_sigma, x",
           on_losses.test_denoising_loss_by_hand),
    Mutant("fake score: left in train mode, dropout in the gradient", "devrimcavusoglu/dmd training_loop.py:77",
           f"{FAKE}:FakeScore.train", "return self", "return nn.Module.train(self, mode)",
           on_losses.test_fake_score_never_has_dropout),
    # ---- the GAN
    Mutant("gan: generator runs away from real data", "",
           f"{GAN}:generator_logit_loss", "softplus(-logits_fake)", "softplus(logits_fake)",
           on_losses.test_gan_logit_losses_by_hand),
    Mutant("gan: saturating generator loss", "",
           f"{GAN}:generator_logit_loss", "F.softplus(-logits_fake).mean()", "-F.softplus(logits_fake).mean()",
           on_losses.test_gan_generator_loss_does_not_saturate),
    Mutant("gan: real and fake swapped in the critic", "",
           f"{GAN}:gan_critic_loss", "softplus(logits_fake) + F.softplus(-logits_real)",
           "softplus(-logits_fake) + F.softplus(logits_real)", on_losses.test_gan_critic_loss),
    Mutant("gan: both critic terms push the same way", "",
           f"{GAN}:critic_logit_loss", "softplus(-logits_real)", "softplus(logits_real)",
           on_losses.test_gan_logit_losses_by_hand),
    Mutant("gan: generator and critic on the same side", "",
           f"{GAN}:gan_generator_loss", "F.softplus(-nets", "F.softplus(nets",
           on_losses.test_gan_generator_loss_reaches_x_through_the_features),
    Mutant("gan: gradient blocked on its way to x", "what DMD2 issue 75 suspected",
           f"{GAN}:gan_generator_loss", "sigma, batch.cond)", "sigma, batch.cond).detach() + 0 * x",
           on_losses.test_gan_generator_loss_reaches_x_through_the_features),
    Mutant("gan: discriminator sees clean samples", "the misleading flag names of DMD2",
           f"{GAN}:gan_critic_loss", "add_noise(x, sigma, noise)", "x", on_losses.test_gan_critic_loss),
    Mutant("gan: discriminator sees clean data", "",
           f"{GAN}:gan_critic_loss", "add_noise(batch.real, sigma_real, noise_real)", "batch.real",
           on_losses.test_gan_critic_loss),
    Mutant("gan: real data judged under the fakes' labels", "",
           f"{GAN}:gan_critic_loss", "batch.real_cond]", "batch.cond]", on_losses.test_gan_critic_loss),
    Mutant("gan: one noise for real and generated, drawn once", "",
           f"{GAN}:gan_critic_loss", "batch.noising(cfg.gan_sigma, batch.real)", "sigma, noise",
           on_losses.test_gan_critic_loss),
    Mutant("gan: the critic's loss averaged over the batch", "then NaN reports and logs by sigma have nothing to name",
           f"{GAN}:gan_critic_loss", "return F.softplus(logits_fake) + F.softplus(-logits_real)",
           "return critic_logit_loss(logits_real, logits_fake)", on_losses.test_every_loss_is_one_value_per_sample),
    Mutant("gan: critic loss reaches the generator", "",
           f"{METHODS}:update", "x.detach() if which == \"critic\" else x", "x", WHO_MOVES["dmd2"]),
    # ---- the batch
    Mutant("batch: the critic's GAN loss remembered with the noise levels of real data", "",
           f"{DRAW}:Batch.noising", "sigma if self.sigma is None else self.sigma", "sigma",
           on_losses.test_a_batch_remembers_the_noise_levels_of_generated_samples),
    Mutant("batch: every loss remembered with the noise levels of the first", "",
           f"{DRAW}:Batch.keep", "(self.sigma, values), None", "(self.sigma, values), self.sigma",
           on_losses.test_a_batch_remembers_the_noise_levels_of_generated_samples),
    Mutant("batch: one noise for all samples", "",
           f"{DRAW}:Batch.noising", "torch.randn(n, *x.shape[1:]", "torch.randn(1, *x.shape[1:]",
           on_losses.test_a_noising_is_a_sigma_and_a_unit_noise),
    Mutant("batch: real data drawn although the GAN is off", "",
           f"{METHODS}:needs", " if user.get(name) not in off]", "]", on_losses.test_a_batch_brings_what_has_a_weight),
    # ---- the train step
    Mutant("step: generator update leaks into the critic", "",
           f"{METHODS}:train_step", "critic_requires_grad(nets, False)", "critic_requires_grad(nets, True)",
           WHO_MOVES["dmd2"]),
    Mutant("step: the same, with sid", "",
           f"{METHODS}:train_step", "critic_requires_grad(nets, False)", "critic_requires_grad(nets, True)",
           WHO_MOVES["sid"]),
    Mutant("step: critic update does not detach", "",
           f"{METHODS}:update", "x.detach() if which == \"critic\" else x", "x",
           on_losses.test_train_step_shows_the_critic_detached_samples),
    Mutant("step: the critic's samples without graph serve the generator", "",
           f"{METHODS}:samples", "batch.x is None or graph and not batch.x.requires_grad", "batch.x is None",
           on_losses.test_samples_are_made_once),
    Mutant("step: two generator passes where one serves both", "SiD's official code: 1.14 times the time",
           f"{METHODS}:samples", "batch.x is None or graph and not batch.x.requires_grad", "True",
           on_losses.test_one_generator_pass_serves_the_last_critic_update_and_the_generator),
    Mutant("step: teacher unfrozen along with the critic", "DMD2 edm_unified_model.py:58",
           f"{METHODS}:critic_requires_grad", "nets.fake.requires_grad_(on)",
           "(nets.fake.requires_grad_(on), nets.real.requires_grad_(on))", WHO_MOVES["sid"]),
    Mutant("step: critic_steps ignored", "",
           f"{METHODS}:train_step", "range(cfg.critic_steps)", "range(cfg.critic_steps - 1, cfg.critic_steps)",
           on_losses.test_train_step_order_and_counts),
    Mutant("step: one critic update short", "FastGen dmd2.py single_train_step: a ratio of 5 means 4",
           f"{METHODS}:train_step", "range(cfg.critic_steps)", "range(1, cfg.critic_steps)",
           on_losses.test_train_step_order_and_counts),
    Mutant("step: critic sees one batch over and over", "",
           f"{METHODS}:train_step", FRESH, ONE_BATCH,
           on_losses.test_train_step_order_and_counts),
    Mutant("step: critic loss steps the generator's optimiser", "",
           f"{METHODS}:update", "opts[which].step()", "opts[\"generator\"].step()",
           on_losses.test_train_step_order_and_counts),
    Mutant("step: parts of a batch summed, not averaged", "",
           f"{METHODS}:update", "total / len(batches)", "total", on_losses.test_train_step_in_parts),
    Mutant("step: all the parts' graphs held at once", "",
           f"{METHODS}:train_step", "cfg.accumulate == 1 and ", "",
           on_losses.test_train_step_in_parts),
    Mutant("step: every critic update pays for a graph of the generator", "",
           f"{METHODS}:update", "which == \"generator\" or keep_graph", "True",
           on_losses.test_one_generator_pass_serves_the_last_critic_update_and_the_generator),
    Mutant("step: weights ignored", "",
           f"{METHODS}:update", "weight * values.mean()", "values.mean()", on_losses.test_train_step_by_hand),
    Mutant("step: terms of weight 0 computed all the same", "DMD2 issue 69: its gan_alone still trains the fake score",
           f"{METHODS}:update", " if weight]", "]",
           on_losses.test_terms_of_weight_zero_are_not_computed),
    Mutant("step: gradients accumulate", "",
           f"{METHODS}:update", "opts[which].zero_grad(set_to_none=True)", "pass", on_losses.test_updates_do_not_accumulate),
    Mutant("step: gradient clipping parsed and never applied", "DMD2 train_sd_ode.py:63",
           f"{METHODS}:update", "if cfg.clip:", "if False:", on_losses.test_clip_limits_the_norm_over_the_whole_network),
    Mutant("step: average and network swapped", "",
           f"{METHODS}:train_step", "update_ema(nets.ema, nets.generator,", "update_ema(nets.generator, nets.ema,",
           on_losses.test_train_step_by_hand),
    Mutant("step: always trains the generator's last step", "",
           f"{METHODS}:samples", "batch.z, batch.cond, batch.step, batch.start", "batch.z, batch.cond",
           on_losses.test_train_step_trains_the_step_of_its_batch),
    # ---- the generator
    Mutant("ema: weight reversed", "",
           f"{GENERATOR}:update_ema", "1 - 0.5 **", "0.5 **", on_generator.test_ema_half_life),
    Mutant("ema: half-life taken for a time constant", "",
           f"{GENERATOR}:update_ema", "1 - 0.5 **", "1 - 2.718281828459045 ** -", on_generator.test_ema_half_life),
    Mutant("ema: no ramp", "",
           f"{GENERATOR}:update_ema", "min(half_life, 0.05 * step)", "half_life", on_generator.test_ema_ramp),
    Mutant("generator: noised data as multi-step input", "FastGen dmd2.py:107, DiffSynth issue 1617",
           f"{DRAW}:Draw.__call__", "if not cfg.backward_simulation:", "if True:",
           on_generator.test_training_inputs_do_not_depend_on_real_data),
    Mutant("generator: gradient through all steps", "what SiD-LSG does, on purpose",
           f"{GENERATOR}:Generator.forward", "torch.no_grad()", "torch.enable_grad()",
           on_generator.test_gradient_passes_through_the_last_step_only),
    Mutant("generator: every step at the first noise level", "",
           f"{GENERATOR}:Generator.step", "self.sigmas[i]", "self.sigmas[0]",
           on_generator.test_few_steps_are_denoise_and_noise_again),
    Mutant("generator: steps one noise level late", "",
           f"{GENERATOR}:Generator.step", "self.sigmas[i]", "self.sigmas[min(i + 1, len(self.sigmas) - 1)]",
           on_generator.test_few_steps_are_denoise_and_noise_again),
    Mutant("generator: one noise for all steps", "DMD2 issue 9: artefacts",
           f"{GENERATOR}:Generator.forward", "x, z[i], cond)", "x, z[0], cond)",
           on_generator.test_few_steps_are_denoise_and_noise_again),
    Mutant("generator: input not scaled by sigma", "right for SD's latents, wrong for EDM",
           f"{GENERATOR}:Generator.step", "else self.sigmas[0]",
           "else 1.0", on_generator.test_one_step_by_hand),
    Mutant("generator: samples with its first step only", "",
           f"{GENERATOR}:Generator.forward", "len(self.sigmas) - 1 if step is None", "0 if step is None",
           on_generator.test_the_last_step_is_sampling),
    Mutant("generator: start ignored", "",
           f"{GENERATOR}:Generator.forward", "step if start is None else 0", "step",
           on_generator.test_start_replaces_the_simulation),
    # ---- teachers and adapters
    Mutant("guidance: (w + 1) c - w u", "CS231n's convention: 7.5 means 8.5",
           "nano_dmd.real_score:guided", "return d_uncond +", "return d_cond +", on_teacher.test_guidance),
    Mutant("guidance: sign", "labml stable_diffusion/sampler/__init__.py:66, in the docstring",
           "nano_dmd.real_score:guided", "(d_cond - d_uncond)", "(d_uncond - d_cond)",
           on_teacher.test_guidance),
    Mutant("guidance: two calls when it is off", "",
           "nano_dmd.real_score:guided", "cond is None or w == 1", "cond is None",
           on_teacher.test_guidance_costs_a_second_call_only_when_it_is_on),
    Mutant("score: sigma not squared", "",
           f"{DENOISER}:score", "** 2", "", on_teacher.test_score_is_tweedie),
    Mutant("adapter: v has the other sign", "",
           f"{DENOISER}:FromV.forward", "x / norm - s *", "x / norm + s *",
           partial(on_teacher.test_adapters_reproduce_the_exact_mixture, "v")),
    Mutant("adapter: eps taken for v", "",
           f"{DENOISER}:FromV.forward", "return (x / norm - s *", "return (x * norm - s *",
           partial(on_teacher.test_adapters_reproduce_the_exact_mixture, "v")),
    Mutant("adapter: eps network fed variance-exploding input", "",
           f"{DENOISER}:FromEps._call", "function(x / (1 + s**2).sqrt(),", "function(x,",
           partial(on_teacher.test_adapters_reproduce_the_exact_mixture, "eps")),
    Mutant("adapter: class dropped", "",
           f"{DENOISER}:FromEps._call", "self.timestep(sigma), cond)", "self.timestep(sigma), None)",
           partial(on_teacher.test_adapters_reproduce_the_exact_mixture, "eps")),
    Mutant("adapter: timestep by searchsorted", "smalldiffusion examples/diffusers_wrapper.py:47",
           f"{DENOISER}:FromEps.timestep",
           "(sigma.log()[:, None] - self.sigmas.log()[None]).abs().argmin(1)",
           "torch.searchsorted(self.sigmas, sigma).clamp(max=len(self.sigmas) - 1)",
           on_teacher.test_timesteps_round_trip),
    Mutant("adapter: nearest sigma instead of nearest log-sigma", "",
           f"{DENOISER}:FromEps.timestep", "sigma.log()[:, None] - self.sigmas.log()[None]",
           "sigma[:, None] - self.sigmas[None]", on_teacher.test_timestep_is_nearest_in_log_sigma),
    Mutant("edm: c_skip and c_out swapped", "",
           f"{DENOISER}:EDM.forward", "(d / norm) ** 2 * x + s * d / norm *", "s * d / norm * x + (d / norm) ** 2 *",
           on_teacher.test_edm_coefficients),
    Mutant("edm: c_noise is sigma", "",
           f"{DENOISER}:EDM._call", "sigma.log() / 4", "sigma", on_teacher.test_edm_coefficients),
    Mutant("edm: class dropped", "",
           f"{DENOISER}:EDM._call", "sigma.log() / 4, cond)", "sigma.log() / 4, None)",
           on_teacher.test_edm_hands_the_class_on),
    Mutant("edm: input not scaled", "",
           f"{DENOISER}:EDM._call", "expand(c_in, x) * x", "x", on_teacher.test_edm_has_unit_variance_inside),
    Mutant("heun: only Euler", "",
           f"{DENOISER}:heun", "(here + slope(euler, following)) / 2", "(here + 0 * slope(euler, following))",
           on_teacher.test_heun_is_of_second_order),
    Mutant("heun: slope averaged at the old point", "",
           f"{DENOISER}:heun", "slope(euler, following)", "slope(x, following)",
           on_teacher.test_heun_is_of_second_order),
    Mutant("heun: starts from unit noise", "",
           f"{DENOISER}:heun", "z.double() * sigmas[0]", "z.double()",
           on_teacher.test_heun_solves_the_ode_of_a_gaussian),
    # ---- the noise axis and the mixture
    Mutant("noise: variance preserving", "",
           f"{NOISE}:add_noise", "x + expand(sigma, x) * noise",
           "(x + expand(sigma, x) * noise) / (1 + expand(sigma, x) ** 2).sqrt()",
           on_losses.test_add_noise_is_variance_exploding),
    Mutant("noise: several noisings mix up classes", "",
           f"{NOISE}:repeated", "cond.repeat_interleave(n, 0)", "cond.repeat(n)",
           on_losses.test_several_noisings_are_the_mean_over_noises),
    Mutant("noise: wrong shapes broadcast", "",
           f"{NOISE}:expand", "if v.shape != x.shape[:1]:", "if False:",
           on_teacher.test_expand_refuses_what_would_broadcast_silently),
    Mutant("noise: uniform in sigma instead of the Karras warp", "",
           f"{NOISE}:draw_sigma", "karras(torch.rand(n, device=device), a, b)",
           "a + (b - a) * torch.rand(n, device=device)",
           on_teacher.test_draw_sigma_has_the_distribution_it_names),
    Mutant("noise: lognormal in base 10", "",
           f"{NOISE}:draw_sigma", "torch.exp(", "10 ** (", on_teacher.test_draw_sigma_has_the_distribution_it_names),
    Mutant("noise: the grid runs upwards", "",
           f"{NOISE}:karras", "(high + u * (low - high))", "(low + u * (high - low))", on_teacher.test_karras_sigmas),
    Mutant("mixture: exponentials summed outside log space", "EDM2 toy_example.py:61",
           "toy.mixtures:Mixture.denoise", "terms.softmax(1)", "terms.exp() / terms.exp().sum(1, keepdim=True)",
           on_teacher.test_mixture_is_right_where_exp_would_underflow),
    Mutant("mixture: component's own variance forgotten", "",
           "toy.mixtures:Mixture._log_terms", "self.std**2 + sigma", "0 * self.std**2 + sigma",
           on_teacher.test_mixture_denoises_like_the_integral),
    Mutant("mixture: responsibilities without the volume term", "",
           "toy.mixtures:Mixture._log_terms", "square / var - volume", "square / var",
           on_teacher.test_mixture_denoises_like_the_integral),
    Mutant("mixture: class 0 is no class", "",
           "toy.mixtures:Mixture._log_terms", "(cond >= 0)", "(cond > 0)",
           on_teacher.test_conditional_mixture_is_the_mixture_of_its_class),
    Mutant("network: class 0 is no class", "",
           "nano_dmd.networks:UNet.embed", "(cond >= 0)", "(cond > 0)", on_teacher.test_no_class_is_minus_one),
    Mutant("network: class -1 is class 0", "",
           "nano_dmd.networks:UNet.embed", " * (cond >= 0)[:, None]", "", on_teacher.test_no_class_is_minus_one),
]
