"""PRESETS: the settings of every run that has a name.

NAME is shared by its methods; NAME-METHOD says what differs for one. `--preset NAME-METHOD` or
`--preset NAME --method METHOD` picks it. The knobs are explained in engine/config.py.

Published settings are written in our conventions. "Uniform t" of the papers is a karras(low,high).
SiD sums over pixels and scales by 100 (SiD-LSG by 1); losses here are means. So w_sid = 100 CHW,
w_fake = CHW. Adam removes such factors, but for its eps. Half-lives in images become updates.
"""

# What bench --report measures, the most important first.
REPORTED = ("sid", "dmd2", "dmd")

# 2D points, exact score, one CPU thread: about 45 s each.
PRESETS = {
    "toy": dict(
        teacher="toy:ring8", method="dmd2", sigmas="1", bf16=True, batch=1024, threads=1,
        steps=9000, lr_generator=1e-3, lr_critic=2e-3, warmup=100, decay_from=0.0, clip=0, ema=300,
        dm_sigma="lognormal(-1.4,1.2)", critic_sigma="lognormal(-1.2,1.4)",
        gan_sigma="lognormal(-1.4,1.2)", log_every=100, sample_every=250, save_every=1000,
        pairs=100_000, pair_steps=64, pair_sigma=20),
    "toy-dmd": dict(steps=6000, lr_generator=2e-3),
    "toy-dmd2": dict(critic_steps=2, noisings=2, batch=512, steps=4400, lr_generator=2e-3,
                     w_gan=0.01, w_disc=0.03),
    "toy-sid": dict(
        steps=8500, batch=768, noisings=2, lr_generator=1.3e-3, decay_from=0.2, ema=500, alpha=0.5,
        normalise=False, beta2=0.999, dm_sigma="lognormal(-1.8,1.6)"),
    "toy-diff_instruct": dict(lr_generator=2e-3),
    "toy-regression": dict(steps=6000, lr_generator=2e-3),
    "toy-f_distill": dict(
        batch=512, steps=4400, lr_generator=2e-3, w_gan=0.01, w_disc=0.03, divergence="kl"),
    "toy-decoupled": dict(lr_generator=2e-3, w_aug=0.0),          # no classes: matching alone
    "toy-tdm": dict(sigmas="1,0.15", ode_steps=True, steps=6000),
    "toy-phased": dict(sigmas="1,0.15", ode_steps=True, steps=6000),
}
# SiD's relatives, at its settings.
TOY_SID = PRESETS["toy-sid"]
PRESETS |= {
    "toy-sim": dict(TOY_SID, steps=6500),
    "toy-sida": dict(TOY_SID, noisings=1, steps=4000, w_gan=1e-3, w_disc=1e-3),
    "toy-real_uid": dict(TOY_SID, noisings=1, steps=6500, uid_a=0.92, uid_b=0.94),
}

# 8x8 digits, two CPU cores: about a minute each.
PRESETS |= {
    "digits": dict(
        bf16=True, sigmas="2.5", dm_sigma="lognormal(-0.8,1.2)", gan_sigma="lognormal(-0.5,1.2)"),
    "digits-dmd": dict(steps=500, lr_generator=1.5e-3, lr_critic=1.5e-3, control=True),
    "digits-dmd2": dict(steps=400, critic_steps=2, w_gan=0.1, w_disc=0.03),
    "digits-sid": dict(steps=440, critic_steps=2, lr_generator=5e-4, lr_critic=1.5e-3),
    "digits-diff_instruct": dict(steps=600),
    "digits-regression": dict(steps=500, lr_generator=1.5e-3),
    "digits-f_distill": dict(steps=350, critic_steps=2, w_gan=0.1, w_disc=0.03, divergence="kl"),
    "digits-decoupled": dict(steps=500, critic_steps=2, guidance=1.5),
    "digits-sim": dict(
        steps=440, critic_steps=2, lr_generator=3e-4, lr_critic=1.5e-3, decay_from=0.2),
    "digits-sida": dict(steps=550, lr_generator=5e-4, lr_critic=1.5e-3, w_gan=1e-2, w_disc=0.015),
    "digits-real_uid": dict(steps=600, lr_generator=5e-4, lr_critic=1.5e-3, uid_a=0.92, uid_b=0.94),
    "digits-tdm": dict(steps=550, critic_steps=2, sigmas="2.5,0.6", ode_steps=True),
    "digits-phased": dict(steps=550, critic_steps=2, sigmas="2.5,0.6", ode_steps=True),
}

# 28x28 digits, 5,000 of MNIST, six minutes with the teacher: the settings of the 8x8 ones.  But two
# steps have more noise between them: at 0.6 one sees the digit, and the last step collapses.
MNIST = {"digits": dict(teacher="mnist"), "digits-tdm": dict(sigmas="10,2"),
         "digits-phased": dict(sigmas="10,2")}
PRESETS |= {name.replace("digits", "mnist"): preset | MNIST.get(name, {})
            for name, preset in PRESETS.items() if name.startswith("digits")}

# Images from EDM's published teachers, at the papers' settings: days on one GPU.
LARGE = dict(bf16=True, decay_from=1.0, log_every=100, sample_every=1000, save_every=2000)
PRESETS |= {
    "cifar10": dict(LARGE, teacher="edm:cifar10-cond", method="sid"),
    "cifar10-uncond": dict(LARGE, teacher="edm:cifar10-uncond", method="sid"),
    "imagenet64": dict(LARGE, teacher="edm:imagenet64", method="dmd2"),
    "ffhq64": dict(LARGE, teacher="edm:ffhq64", method="sid"),
    "afhqv2-64": dict(LARGE, teacher="edm:afhqv2-64", method="sid"),
}

# DMD paper, appendix B.1 (CIFAR-10) and B.2 (ImageNet).
DMD = dict(
    sigmas="80", dm_sigma="karras(0.0032,72)", critic_sigma="karras(0.002,80)",
    gan_sigma="karras(0.002,80)", beta1=0.9, beta2=0.999, weight_decay=0.01, clip=10, warmup=500,
    ema=0)
CIFAR_DMD = dict(DMD, steps=300_000, batch=392, lr_generator=5e-5, lr_critic=5e-5, reg_loss="lpips")
PRESETS |= {
    "cifar10-dmd": dict(CIFAR_DMD, w_reg=0.25, pairs=100_000),
    "cifar10-uncond-dmd": dict(CIFAR_DMD, w_reg=0.5, pairs=500_000),
    "imagenet64-dmd": dict(
        DMD, steps=350_000, batch=336, lr_generator=2e-6, lr_critic=2e-6, w_reg=0.25,
        reg_loss="lpips", pairs=25_000, pair_steps=256),
}

# CIFAR-10: FastGen config_dmd2_cifar10.py (conditional; its 100k iterations are 20k steps here);
# DMD2 itself has no such recipe.  ImageNet: DMD2 experiments/imagenet/*.sh, main/edm/train_edm.py.
CIFAR_DMD2 = dict(
    DMD, steps=20_000, batch=2048, lr_generator=1e-4, lr_critic=1e-4, critic_steps=5, w_gan=1e-3,
    w_disc=1e-2, flip=True, ema=500)
PRESETS |= {
    "cifar10-dmd2": CIFAR_DMD2,
    "cifar10-uncond-dmd2": CIFAR_DMD2,
    "imagenet64-dmd2": dict(                       # 200k critic updates
        DMD, steps=40_000, batch=280, lr_generator=2e-6, lr_critic=2e-6, critic_steps=5, w_gan=3e-3,
        w_disc=1e-2),
}

# SiD run_sid.sh, in the order below: lines 49-71, 20-45, 73-98, 100-125, 127-151.
# Differs: for FFHQ the generator's beta1 is .9 there.
SID = dict(
    sigmas="2.5", dm_sigma="karras(0.002,24.4)", beta2=0.999, clip=0, warmup=0, alpha=1.2,
    lr_generator=1e-5, lr_critic=1e-5, w_sid=307_200, w_fake=3072, ema=1953, batch=256)
SID64 = dict(SID, w_sid=1_228_800, w_fake=12_288)
PRESETS |= {
    "cifar10-sid": dict(SID, steps=3_125_000),     # 800 M images
    "cifar10-uncond-sid": dict(SID, steps=1_953_125),             # 500 M images
    "imagenet64-sid": dict(                        # 1000 M images
        SID64, steps=122_070, batch=8192, lr_generator=4e-6, lr_critic=4e-6, ema=244),
    "ffhq64-sid": dict(SID64, steps=976_562, batch=512, ema=977),
    "afhqv2-64-sid": dict(
        SID64, steps=976_562, batch=512, lr_generator=5e-6, lr_critic=5e-6, alpha=1.0, ema=977),
}

# Diff-Instruct README.md:44-51.
PRESETS["cifar10-diff_instruct"] = dict(
    SID, dm_sigma="lognormal(-1.2,1.2)", sigmas="1", steps=390_000, batch=128, w_dm=3072, ema=3906)

# f-distill: FastGen's configs for CIFAR-10 (100k iterations) and ImageNet-64 (600k); the paper's
# divergences.  SIM has published no training code: SiD's settings.
# SiDA: 300 M images.  Differs: there G rests for 100k images, its GAN term begins at 200k, and the
# critic's gradients are clipped value by value.
# RealUID train_distil.py, a U-Net of flow matching.  Its 800k iterations are read as the updates of
# both sides, 5 of the critic's to one of G's.
PRESETS |= {
    "cifar10-f_distill": dict(CIFAR_DMD2, divergence="kl"),
    "cifar10-uncond-f_distill": dict(CIFAR_DMD2, divergence="kl"),
    "imagenet64-f_distill": dict(
        DMD, steps=120_000, batch=512, lr_generator=2e-6, lr_critic=2e-6, critic_steps=5,
        w_gan=3e-3, w_disc=1e-2, divergence="js"),
    "cifar10-sim": dict(SID, steps=1_953_125),
    "cifar10-sida": dict(SID, steps=1_171_875, alpha=1.0, w_gan=1e-4, w_disc=1.0),
    "cifar10-uncond-sida": dict(SID, steps=1_171_875, alpha=1.0, w_gan=1e-4, w_disc=1.0),
}
UID = dict(
    SID, sigmas="80", dm_sigma="flow(0.002,0.987)", critic_sigma="flow(0.002,0.987)", steps=133_333,
    critic_steps=5, lr_generator=3e-5, lr_critic=3e-5, clip=1, ema=1155)
PRESETS |= {
    "cifar10-real_uid": dict(UID, uid_a=0.98, uid_b=0.96),
    "cifar10-uncond-real_uid": dict(UID, uid_a=0.92, uid_b=0.94),
}

# Stable Diffusion 1.5 with --prompts FILE; the published batch on one GPU by --accumulate.
SD = dict(
    teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", bf16=True, half_frozen=True,
    checkpointing=True, decay_from=1.0, beta1=0.9, beta2=0.999, weight_decay=0.01, clip=10,
    warmup=500, ema=0, sigmas="t999", unit_noise=True, dm_sigma="sd(20,980)",
    critic_sigma="sd(0,999)", gan_sigma="sd(0,999)", lr_generator=1e-5, lr_critic=1e-5,
    pair_sigma=14.6, least_sigma=0.138, log_every=20, sample_every=100, save_every=200)
SD_DMD2 = dict(steps=4000, batch=2048, guidance=1.75, critic_steps=10)
FOUR_STEPS = "t999,t749,t499,t249"
SMALL_BATCH = dict(steps=2000, batch=8, guidance=1.75, critic_steps=5, sigmas=FOUR_STEPS)
PRESETS |= {
    "sd15": dict(SD, method="dmd2"),
    # DMD paper, B.3.  Differs: L2 on latents (there --reg_loss lpips), Heun (there PNDM, 50 steps).
    "sd15-dmd": dict(
        steps=20_000, batch=2304, guidance=3.0, w_reg=0.25, pairs=500_000, pair_steps=26),
    # DMD2 experiments/sdv1.5/*.sh: stage 1 (40k critic updates), then stage 2 (5k) on --init RUN.
    "sd15-dmd2": SD_DMD2,
    "sd15-dmd2-gan": dict(
        SD | SD_DMD2, method="dmd2", steps=500, w_gan=1e-3, w_disc=1e-2, lr_generator=5e-7,
        lr_critic=5e-7),
    # DMD2 does several steps for SDXL alone.
    "sd15-dmd2-4step": dict(SD | SD_DMD2, method="dmd2", sigmas=FOUR_STEPS),
    # f-distill's own settings for one step; and two methods on two cards of 32 GB, batch 4 each:
    # AaronCaoZJ/DMDs.  Guidance is DMD2's; the fork does not say another.
    "sd15-f_distill": dict(SD_DMD2, w_gan=1e-3, w_disc=1e-2, divergence="js"),
    "sd15-f_distill-4step": dict(
        SD | SMALL_BATCH, method="f_distill", w_gan=1e-3, w_disc=1e-2, divergence="js"),
    "sd15-decoupled-4step": dict(SD | SMALL_BATCH, method="decoupled"),
    # SiD-LSG run_sid.sh:61-88, 10 M images.  Differs: guidance is 2 there; 1.5 has the best FID.
    "sd15-sid": dict(
        steps=19_531, batch=512, sigmas="t625", unit_noise=False, guidance=1.5, fake_guidance=1.5,
        critic_dropout=0.1, dm_sigma="sd(20,979)", critic_sigma="sd(20,979)", alpha=1.0, beta1=0.0,
        weight_decay=0.0, clip=0, warmup=0, lr_generator=1e-6, lr_critic=1e-6, ema=98, w_sid=16_384,
        w_fake=16_384),
}

# Stable Diffusion XL at 1024 pixels: DMD2 experiments/sdxl/*.sh, one block of flags each, 64 GPUs.
# Its GAN asks for --data.  Steps here are generator updates: a fifth of the published iterations.
XL = dict(
    SD, teacher="stabilityai/stable-diffusion-xl-base-1.0", method="dmd2", steps=4800, batch=128,
    guidance=8.0, critic_steps=5, w_gan=5e-3, w_disc=1e-2, lr_generator=5e-7, lr_critic=5e-7)
PRESETS |= {
    "sdxl": XL,
    # sdxl_cond999_8node_lr5e-7 and sdxl_lora_cond999_8node_lr5e-5.  As published, the critic of the
    # LoRA student is full: --lora_critic 64 makes it fit on one GPU.
    "sdxl-dmd2-4step": dict(XL, steps=3800, sigmas=FOUR_STEPS),
    "sdxl-dmd2-lora": dict(
        XL, steps=3200, sigmas=FOUR_STEPS, lora_generator=64, lr_generator=5e-5, lr_critic=5e-5),
    # One step at timestep 399 (at 999 it leaves blocks of noise): main/train_sd_ode.py on pairs,
    # then sdxl_cond399 from --init RUN.  Differs: pairs by 26 Heun steps, there 50 of Euler.
    "sdxl-regression": dict(
        steps=2000, batch=256, sigmas="t399", lr_generator=1e-5, clip=0, w_gan=0, w_disc=0,
        pairs=10_000, pair_steps=26, reg_loss="lpips", lpips_decoder="madebyollin/taesdxl"),
    "sdxl-dmd2": dict(sigmas="t399"),
}

# SANA 0.6B, a flow teacher, at 512 pixels (Efficient-Large-Model/Sana_600M_1024px_diffusers is the
# one for 1024).  Steps t = .999, .75, .5, .25: the published 1 would be infinite noise.
SANA = dict(
    SD, teacher="Efficient-Large-Model/Sana_600M_512px_diffusers", sigmas="f0.999,f0.75,f0.5,f0.25",
    guidance=4.5, pair_sigma=200, least_sigma=0.02, gan_sigma="flow(0.02,0.98)", warmup=0)
PRESETS |= {
    "sana": dict(SANA, method="sid"),
    # SiD-DiT run_sid_dit.sh, 1.5 M images: logit-normal(ln 2, 1.6) times.  Differs: weights are
    # 1 / mean |x - d_real| (there an option, 1 - t by default), the critic's see text_to_image.py.
    "sana-sid": dict(
        steps=6000, batch=256, fake_guidance=4.5, dm_sigma="lognormal(0.693,1.6)",
        critic_sigma="lognormal(0.693,1.6)", alpha=1.0, beta1=0.0, weight_decay=0.0, clip=0,
        lr_generator=5e-6, lr_critic=5e-6, w_sid=819_200, w_fake=8192),
    # Nobody has published one: FastGen's for FLUX (config_dmd2.py), without its GAN (w_gan .03).
    "sana-dmd2": dict(
        steps=1000, batch=128, critic_steps=5, dm_sigma="flow(0.001,0.999)",
        critic_sigma="flow(0.001,0.999)", lr_generator=1e-5, lr_critic=1e-5),
}

# CIFAR-10 from a teacher of one's own.  scratch: one H100, 20 to 40 minutes (estimated);
# small: a CPU, to see every part work.
CIFAR = dict(sigmas="2.5", dm_sigma="lognormal(-0.8,1.4)", gan_sigma="lognormal(-0.5,1.2)")
PRESETS |= {
    "cifar10-scratch": dict(
        LARGE | CIFAR, teacher="cifar10-scratch", method="dmd2", compile=True, batch=256,
        warmup=100, decay_from=0.5, ema=200, flip=True, log_every=50, sample_every=250,
        save_every=500, pairs=50_000),
    "cifar10-scratch-dmd": dict(steps=5000, lr_generator=2e-4, lr_critic=2e-4),
    "cifar10-scratch-dmd2": dict(
        steps=4000, lr_generator=1e-4, lr_critic=2e-4, critic_steps=2, w_gan=0.03, w_disc=0.03),
    "cifar10-scratch-sid": dict(steps=6000, lr_generator=1e-4, lr_critic=2e-4),
    "cifar10-small": dict(
        CIFAR, teacher="cifar10-small", method="dmd", bf16=True, batch=32, steps=300,
        sample_every=100, save_every=100, pairs=1500, eval_images=1000),
    "cifar10-small-dmd": dict(control=True),
    "cifar10-small-dmd2": dict(
        critic_steps=2, steps=200, lr_generator=2e-4, w_gan=0.1, w_disc=0.03),
    "cifar10-small-sid": dict(lr_generator=1e-4, lr_critic=1e-3),
}
