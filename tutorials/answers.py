"""The answers to the questions of the notebooks.  Try the questions before you read on.

    check("04.1", 0.8)           what a notebook calls: right, or what this wrong number suggests

A key is a notebook and a question: 1, 2, ... are its predictions, E (or E1, E2) is its exercise.  A right answer is a
number, or a word that the question offers.  `slips` are the typical wrong answers and what each of them overlooks.
"""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    right: float | str
    hint: str                                         # for an answer that is wrong and not in slips
    slips: dict = field(default_factory=dict)         # wrong answer -> what it overlooks
    rtol: float = 0.02                                # how far off a number may be; of the right answer 0, this much itself
    also: tuple = ()                                  # other words that mean the right one

    def matches(self, answer, target):
        if isinstance(target, str):
            return word(answer) in ({target, *self.also} if target == self.right else {target})
        found = number(answer)
        return found is not None and abs(found - target) <= self.rtol * (abs(target) or 1)


def word(answer):
    """'The smallest.' -> 'smallest'."""
    return str(answer).lower().strip(" .").removeprefix("the ")


def number(answer):
    """'4.9 %' -> 4.9; None for what is no number."""
    try:
        return float(answer.rstrip("% ") if isinstance(answer, str) else answer)
    except ValueError:
        return None


Q = Question
PERFECT = (math.sqrt(2 / (1 + 14.6**2)) - 1 / 14.6) / (1 - 1 / 14.6)          # 15.E1: the student's slope g from 14.6 to 1
MIDDLE = math.sqrt(2 / (1 + 14.6**2))                                         # and the slope of x_mid on x_in
APART = 0.73 * 28                                                             # 16.E: the distance of two pictures
SIGMA_249 = 0.69321                                                           # Stable Diffusion's noise at timestep 249
ABAR_399, ABAR_999 = 0.42609, 0.0046601                                       # and its share of signal, alpha bar
GAIN_999 = (1 - math.sqrt(ABAR_999)) / math.sqrt(1 - ABAR_999)                # 18.3: eps = gain z of a perfect student

QUESTIONS = {
    "00.1": Q(0, "Average the two values, each with its probability given xt.", {
        1: "It is right half of the time. A squared error is least at the mean of the two.",
        -1: "It is right half of the time. A squared error is least at the mean of the two.",
        "random": "Then the expected squared error is 2. The mean has 1."}),
    "00.2": Q("smallest", "Choose between smallest and largest.", {
        "largest": "As a denoiser it is worst there. The score divides the denoiser's error by sigma^2."}),
    "00.3": Q(4, "The error is proportional to n^-2.", {
        2: "That is a sampler of first order, Euler's.", 8: "That is a sampler of third order.",
        0.25: "Turn it round: the error shrinks by a factor above 1."}, 0.05),
    "00.4": Q(15, "In float32 exp(-v) is 0 from about v = 104 on. How many standard deviations are that?", {
        3: "exp(-3^2 / 2) is .01: no problem.", 100: "exp(-100^2 / 2) has 2,000 zeros. float32 has about 45.",
        "never": "exp(-v) is 0 in float32 from about v = 104 on; then the score is 0 / 0."}, 0.15),
    "00.E": Q(math.sqrt((0.25 / 0.26) ** 2 + 0.25 * 0.01 / 0.26), "There are two modes, and each has a width.", {
        0.1: "That is the width of one mode before anything was seen. Which mode it is, is not known.",
        0.25 / 0.26: "Nearly: the two modes are that far apart. Each of them also has a width.",
        (0.25 / 0.26) ** 2 + 0.25 * 0.01 / 0.26: "That is the variance.",
        0.5: "That is sigma. Which of the two modes it is, is open.",
        math.sqrt(1.01): "That is the std of the data. xt = 0 moves both modes a little to the middle."}, 0.005),
    "01.1": Q("nowhere", "Choose between left, right and nowhere.", {
        "left": "So it is at sigma = 1. At 0.1, do noised samples ever come where the left mode is felt?",
        "right": "All samples are on the right mode already, with the right std."}, also=("none", "no direction")),
    "01.2": Q(math.log(2), "On one mode, the data's density is half the student's.", {
        0: "The student would need the density of the data everywhere, and data have a second mode.",
        0.5: "Half of the mass is missing: log(1 / .5) is more than .5.",
        math.log(101) / 2 - math.log(2): "That is the forward KL."}),
    "01.3": Q("same", "Choose between grows, falls and same.", {
        "grows": "The value is |g|^2 / 2. The mistake changes the sign of g alone.",
        "falls": "The value is |g|^2 / 2. The mistake changes the sign of g alone."}, also=("unchanged", "nothing", "equal")),
    "01.E": Q(math.sqrt(0.46864 - 0.01), "The second derivative at the middle must vanish: E[cosh(n / sqrt v)^-2] = v.", {
        math.sqrt(0.46864): "That is the root of v = std^2 + sigma^2. Take the std of the modes away.",
        0.46864: "That is v = std^2 + sigma^2."}, 0.01),
    "02.1": Q("no", "Choose between yes and no.", {
        "yes": "The loss sees the distribution of x. z -> x and z -> -x have the same one where data are symmetric."}),
    "02.2": Q("depends", "Choose between yes, no and depends.", {
        "yes": "With much noise. And where no noised sample ever comes?",
        "no": "With little noise. And with noise that reaches from mode to mode?"}),
    "02.3": Q("smaller", "Choose between larger and smaller.", {
        "larger": "Far from the target d_fake is about x. What is |d_fake - d_real| / |x - d_real| then?"}),
    "02.E": Q(1, "With u = sigma^2: f - r = u (a^2 - s^2) / ((a^2 + u)(s^2 + u)). Where is its slope 0?", {
        1.25: "Not the mean of the two scales. The product (a^2 + u)(s^2 + u) asks for another mean."}),
    "03.1": Q(0.864, "It overshoots: the critic believes that a is still small. How far, in a critic's lag of 9 updates?", {
        0.5: "A critic that is always right would bring it there from below. This one is late."}, 0.1),
    "03.2": Q(9 / 1.44, "A lag is m / (1 - m), m = rho^n.", {
        1: "A critic with more steps is nearer to its target.", math.sqrt(5): "The lag is m / (1 - m), m = rho^n.",
        5: "A little more: the lag is m / (1 - m) with m = rho^n, not 1 / n."}, 0.05),
    "03.3": Q("rises", "Choose between rises, falls and stays.", {
        "falls": "At the start the fake score is a copy of the teacher. How large is the loss then?",
        "stays": "At the start the fake score is a copy of the teacher, and the loss is small."}),
    "03.E": Q(10, "Trace^2 >= 4 determinant, with m = rho^n in place of rho.", {
        9: "The bound is 9.7; n is a whole number above it.", 5: "Take the root: sqrt(m) <= (1 - kappa) / (1 + kappa)."}, 0.001),
    "04.1": Q(0.8, "The best discriminator says p_real / (p_real + p_fake). Differentiate -log of it.", {
        0.2: "That is the saturating form, log(1 - sigmoid).", 4: "The ratio is 4. The factor lies between 0 and 1.",
        0.25: "The factor is p_fake / (p_real + p_fake), not p_real / p_fake."}),
    "04.2": Q("same", "Choose between same, less and nothing.", {
        "less": "A frozen weight still lets a gradient pass to the layer's input.",
        "nothing": "That is torch.no_grad(). A frozen weight still lets a gradient pass to the layer's input."}),
    "04.3": Q(0.8, "Without the GAN, nothing in the loss has seen data.", {
        0.5: "Without the GAN, nothing in the loss has seen data."}, 0.05),
    "04.E": Q(0.4, "The best discriminator compares the noised samples' density with that of clean data.", {
        0.5: "Then noised samples have variance .5^2 + .3^2. Clean data have .5^2.", 0.16: "That is the variance.",
        math.sqrt(0.34): "The noise is added to the generated samples: they must have less than .5 before it."}),
    "05.1": Q(0.559, "Follow v -> a^2 (v + sigma^2), step by step, with a = 1 / (1 + sigma^2).", {
        1: "A denoiser answers with a mean, and a mean varies less than the data.", 0.313: "That is the variance."}),
    "05.2": Q(4, "The ratio is (v + sigma^2) / (1 + sigma^2). Which step has the smallest sigma?", {
        1: "There sigma is 14.6, and sigma^2 = 214 covers the difference.",
        2: "There sigma is 4.08, and sigma^2 = 17 covers the difference.", 3: "There sigma is 1.61. The next step has less."}),
    "05.3": Q("each", "Choose between own, data and each.", {
        "own": "In use it wins. Asked on noised real data it has not been trained.",
        "data": "On noised real data it wins. In use its inputs are others."}, also=("both",)),
    "05.E": Q(math.sqrt((0.36 + SIGMA_249**2) / (1 + SIGMA_249**2)), "Its gain makes the variance 1 on its training inputs.", {
        1: "So it is on the inputs of its training. In use, they have variance .36 + sigma^2.",
        0.6: "Not that bad: the noise that is added is the same in both.",
        (0.36 + SIGMA_249**2) / (1 + SIGMA_249**2): "That is the variance."}, 0.01),
    "06.1": Q("not at all", "Choose between the three words. Which term still holds x, and is alpha in it?", {
        "linearly": "alpha stands before |d_real - d_fake|^2. Detached, that term has no gradient."},
        also=("independent", "constant", "no", "none", "does not")),
    "06.2": Q(math.sqrt(11), "The slope is 2a (r - f)(r - 1 - alpha (r - f)). Where does the last factor change its sign?", {
        11: "That is a^2.", 1: "From there on it is too wide, and the loss pulls it back, at first.",
        "never": "For alpha > 1 the last factor of the slope changes its sign at some a."}),
    "06.3": Q(math.sqrt(1 / 3), "Take the derivative of d_real away from the slope, and set the rest to 0.", {
        1: "So it is with both Jacobians, or with none.", 1 / 3: "That is the variance.",
        math.sqrt(2): "So it is the other way round, with the teacher's Jacobian alone."}),
    "06.E": Q(math.sqrt((1.5 * 0.25 + 0.09) / 0.5), "a^2 = (alpha s^2 + sigma^2) / (alpha - 1).", {
        (1.5 * 0.25 + 0.09) / 0.5: "That is a^2.", math.sqrt((1.5 * 0.25 + 9) / 0.5): "That is the edge at sigma = 3."}),
    "07.1": Q("spread", "Choose between dmd_loss, disc_loss, mesm, spread and mean.", {
        "dmd_loss": "It is divided by |x - d_real|. It hardly moves.",
        "disc_loss": "A discriminator wins in good runs, too.", "mesm": "It sees the collapse through a critic that is late.",
        "mean": "Samples that are all alike can have the right mean."}),
    "07.2": Q(13, "SiD has the larger number: 800 million images, 10 F each, and F is 42 GFLOP.", {
        2.1: "That is DMD. SiD takes longer."}, 0.05),
    "07.3": Q(10, "A perfect generator's distance is all bias, and the bias is proportional to 1 / N.", {
        math.sqrt(10): "A distance of Frechet is quadratic: its bias falls like 1 / N.",
        1: "A finite sample has a wrong mean and covariance. The distance measures that."}, 0.1),
    "07.E": Q(6.1 - 3.2 / 0.00015 * 0.00003, "FD = a + b / N. Two measurements give b.", {
        6.1 - 3.2 / 0.00015 * 0.00005: "That is a, for infinitely many samples."}, 0.005),
    "08.1": Q(4.9, "The largest sigma of this schedule is 14.6, not 80.", {
        32: "So it is with EDM's levels. The largest sigma of this schedule is 14.6."}, 0.05),
    "08.2": Q(-0.5, "Guidance adds w - 1 times the difference of the two scores, and scores have precisions as slopes.", {
        0.5: "That is without guidance.", 1.5: "That is 3 x .5. The second term is missing: 2 x 1 comes off."}),
    "08.3": Q(1, "Put a student that equals the data into both answers. How far apart are they?", {
        3: "That is the teacher's guidance alone, at large noise. The fake score answers with guidance, too.",
        2.29: "So it is at sigma 1.5 with the teacher alone guided."}),
    "08.E": Q(815, "sigma must be the std of the latents: 1 / 0.18215.", {
        354: "That is with the factor: sigma = 1.",
        34: "The other way round: without the factor the latents are larger."}, 0.003),
    "09.1": Q(2.1, "One share has std sqrt(7 / 50,000). The worst of eight is about twice its mean.", {
        1.2: "That is the std of one share. The question asks for the worst of eight."}, 0.05),
    "09.2": Q(5.7, "The difference of two means of five has std sqrt(2 / 5).", {
        16: "That is one seed against a known mean.", 24: "That is one seed each.", 1.3: "Both means scatter, not one."}, 0.05),
    "09.3": Q(1.87, "The largest of twenty standard normal numbers, on average.", {
        0: "You kept the best one, and it was best by luck.", 1.64: "One of twenty lies above that. The largest lies higher."}),
    "09.E": Q(22, "The difference of the means has std sqrt(2 / n) seed-to-seed deviations.", {
        11: "Both means scatter, not one.", 31: "95 of 100 on one side is 1.645, not 1.96."}, 0.001),
    "10.1": Q(8.3, "The teacher has 2.57 billion weights of 2 bytes. What do the two LoRAs add?", {
        5.1: "That is the teacher alone.", 32.0: "So it is with a full student."}),
    "10.2": Q(14.6146 / 1.1604, "D = xt - sigma eps: the error is sigma times as large.", {
        1: "D = xt - sigma eps: the error is sigma times as large.", 14.6: "That is sigma at 999. Divide by sigma at 399."}),
    "10.3": Q(32, "D = xt - sigma eps. At large sigma D itself grows, too.", {
        1: "D = xt - sigma eps: a mistake in eps counts sigma times.",
        14.6146 / 0.03: "So it is for the error itself. But at large sigma D is larger, too."}, 0.15),
    "10.E": Q(319.5, "78 x 2048 numbers of 2 bytes, a million times.", {
        639: "float16 has 2 bytes.", 315.4: "77 tokens and one more row, the pooled vector.", 118.3: "That is for SD 1.5."},
        0.005),
    "11.1": Q(1, "sigma = t / (1 - t), at the median t.", {0.5: "That is t. sigma = t / (1 - t)."}),
    "11.2": Q(0, "At t = .999 the input says almost nothing about x.", {
        0.5: "So it is with many steps. One step goes to D, the mean of all data."}),
    "11.3": Q(2, "D = xt - t u. With the wrong sign it is xt + t u, and u is about the noise.", {
        0: "So it is with the right sign.", 1: "The noise is added twice."}),
    "11.E": Q(3, "Shift t = .5, then sigma = t / (1 - t). Or: the shift multiplies sigma.", {
        1: "That is without the shift.", 0.75: "That is t."}),
    "12.1": Q(4, "They leave it there if a few samples near the other mode cannot outvote the rest.", {
        1: "rkl does. It is not alone: where h falls with r, or levels off, it does as well."}, 0.001),
    "12.2": Q("neyman", "A name of the seven: h(1 / r), with the h of the forward KL, h(r) = r.", {
        "rkl": "rkl has h = 1. Here h is 1 / r.", "kl": "The name does not matter: the weight is now 1 / r."}),
    "12.3": Q("yes", "Choose between yes and no. Which variable does the mistake depend on?", {
        "no": "The mistake depends on sigma alone, and E_fake[r] = 1 at every sigma."}),
    "12.E1": Q(1000 * math.sqrt(2) / (1.5 * math.sqrt(math.e)), "With h = r: E_q h = 1 and E_q h^2 = int p^2 / q.", {
        1000: "They would have to count the same."}, 0.01),
    "12.E2": Q(2, "q / r = q^2 / p must vanish far away.", {
        1: "A wider student still has a finite mean, up to a limit.", math.sqrt(2): "That is the std."}, 0.01),
    "13.1": Q(4.65, "Nothing stops it: the teacher's class is surer with every step to the right.", {
        1: "Matching stops there. Guidance alone never looks at where the student is."}, 0.05),
    "13.2": Q(1.57, "Between the data's mean and infinity: matching pulls back.", {1: "So it is with matching alone."}, 0.03),
    "13.3": Q("point", "Choose between point (all to one), outwards and nowhere.", {
        "outwards": "So the corners' samples go. In the middle there is a place where the classifier is surest.",
        "nowhere": "The classifier is not equally sure everywhere in the middle."}),
    "13.4": Q(1, "Compare w and w - 1, for each of the two.", {7: "7 in place of 6 is a little more guidance. Nobody sees it."}),
    "13.E1": Q(3.2, "It stops where d_c = d_u.", {
        0.8: "That is the prompt. At 0.8 the difference d_c - d_u is not 0.", 2.4: "w changes the speed, not the place."}),
    "13.E2": Q(6, "The factor that belongs to guidance 7 is w - 1.", {
        7: "The code uses the number as the factor itself.", 8: "The other way round."}, 0.001),
    "14.1": Q("further", "Choose between nearer, same and further.", {
        "nearer": "Real data are in the fake score's loss. Which way does that move d_real - d_fake?",
        "same": "The tracker is now fitted to a mixture, and it must agree with the teacher."}),
    "14.2": Q(13, "How many percent of the variance are left, with equal weights?", {
        0: "Shared noise removes the part that both have from the noise. The samples themselves differ.",
        50: "The two are correlated: more goes away."}, 0.1),
    "14.3": Q(0.55, "DMD2's share on the left: between the teacher's and the data's.", {
        0.5: "Nearly. The distribution matching loss still pulls to the teacher.", 0.8: "That is without data."}, 0.05),
    "14.E1": Q(0.9, "p_fake = p_teacher + (1 - a) / a (p_teacher - p_real).", {
        0.725: "The mixture is the tracker's. Solve a p_fake + (1 - a) p_real = p_teacher.", 0.8: "So it is at a = 1."}, 0.01),
    "14.E2": Q(0.6, "The share on the left becomes 1.", {0.75: "There the share is .9."}, 0.01),
    "15.1": Q(-28, "Too small is negative. The factor is g m V / d^2.", {
        28: "The size is right. Too small is negative.", 0: "x and the noise in xt are not independent."}, 0.05),
    "15.2": Q(1.57, "The fake score takes the samples for narrower than they are.", {
        math.sqrt(2): "So it is with the right fake score."}, 0.03),
    "15.3": Q(math.sqrt(2 / math.pi), "The official loss descends the sign. cos = E|g| / sqrt(E g^2).", {
        1: "The size of each pixel is lost.", 2 / math.pi: "That is its square."}, 0.01),
    "15.4": Q("partly", "Choose between yes, no and partly.", {
        "yes": "In four steps, runs of one way differ by a factor of three.", "no": "In two steps one of them stands apart."}),
    "15.E1": Q(PERFECT * MIDDLE * (1 + 14.6**2), "g m V / d^2, with the g of a perfect student.", {
        1 / (PERFECT * MIDDLE * (1 + 14.6**2)): "The other way round: a number below 1."}, 0.01),
    "15.E2": Q(math.sqrt(2), "The ratio is sigma^2 (d^2 + s^2) / ((sigma^2 - s^2) d^2).", {2: "That is sigma^2."}, 0.01),
    "16.1": Q(1, "The gradient of the logit is a difference of two scores. Write both by Tweedie's formula.", {
        0: "Both compare p_real and p_fake at the same noised sample, and the logit's gradient is a difference of scores.",
        -1: "The GAN raises the logit, and DMD descends a KL divergence: both go to where p_real / p_fake is larger."}),
    "16.2": Q(1, "SiD's gradient is (1 - alpha) A + B / 2. At which alpha is one part gone?", {
        0.5: "It is half the gradient of SiD's own divergence. DMD descends another one, a KL divergence.",
        1.2: "There A comes back, with the other sign."}),
    "16.3": Q("regression", "Choose between dmd, gan and regression. Which has a digit in mind before it sees the picture?", {
        "dmd": "It takes a digit that is likely for this picture, and the picture has a class already.",
        "gan": "With a perfect discriminator its direction is DMD's."}),
    "16.E": Q(math.sqrt(APART**2 / (2 * math.log(19)) - 0.01), "Log odds: d^2 / (2 (sigma^2 + .1^2)), over all pixels.", {
        math.sqrt(0.73**2 / (2 * math.log(19)) - 0.01): "That is for one pixel. The distance is that of all 784.",
        APART / math.sqrt(math.log(19)): "A factor of 2 is missing below d^2.",
        APART**2 / (2 * math.log(19)): "That is the variance."}, 0.01),
    "17.1": Q(0, "None. A wrong formula still computes finite numbers.", {
        1: "The one that mixes up dimensions can raise an error. Here its shapes fit."}),
    "17.2": Q(8, "Compare orange with grey, or count the rows of the table below whose first number is above 1.5.", {
        12: "Some mistakes do no harm in this setting.", 5: "That answers the third question."}, 0.01),
    "17.3": Q(5, "The value of the loss is |g|^2 / 2. It need not know where the samples are.", {
        12: "Three of the twelve show in the samples only, and some nowhere.", 8: "That answers the second question."}, 0.01),
    "17.E": Q(20, "d_real = s^2 xt / (s^2 + sigma^2). Compute both variances.", {
        10: "So it is for data of std 1.", 400: "That is the ratio of the variances.", 0.05: "The other way round."}, 0.01),
    "18.1": Q(7.8, "r (in + out) numbers for a layer of in x out weights. The layers have 320 to 1280 channels.", {
        0.5: "That is rank 4.", 2.0: "That is rank 16.", 31.3: "That is rank 256."}),
    "18.2": Q(25.6, "Three networks of 860 million, and for two of them moments; gradients for one at a time.", {
        9.6: "These are the weights. Gradients and moments come on top.", 28.8: "One network has gradients at a time."}),
    "18.3": Q((1 - math.sqrt(1 - ABAR_399) * GAIN_999) / math.sqrt(ABAR_399),
              "x0 = (x - sqrt(1 - abar) eps) / sqrt(abar), with the abar of 399.", {
        1: "So it is at 999. At 399 the noise is taken away with other factors.",
        math.sqrt(ABAR_399): "So it is if the network still is the teacher at 399."}),
    "18.E": Q(3.23, "Teacher in 2 bytes, shared; LoRA weights in 4 + 2, gradients of the larger one in 4.", {
        1.60: "That is the teacher alone.", 3.48: "Gradients are needed for one network at a time."}, 0.01),
}

# Notebook 17: function of the notebook, (right, wrong) pieces of its source, the mistake's name
EXHIBITS = {
    "A": ("dmd", [("(x - d_real).abs().mean(1, keepdim=True)", "(x - d_real).abs().mean()")], "batch normaliser"),
    "B": ("guided", [("(w - 1)", "w")], "w for w - 1"),
    "C": ("f_distill", [("level, yt = s, xt", "level, yt = noised(x)")], "h at another xt"),
    "D": ("dmd", [("(x - d_real).abs()", "d_real.abs()")], "mean |d_real|"),
    "E": ("second_step", [("0.25 * torch.randn(N, 2)", "cloud.sample(N)[0]")], "noised data"),
    "F": ("dmd", [("s[:, None] * torch.randn(N, 2)", "(s.view(-1, 1, 2) * torch.randn(N // 2, 2, 2)).view(N, 2)")],
          "wrong dimension"),
    "G": ("with_pairs", [("0.5 * (x - (x - g)", "(x - (x - g)")], "no 1/2"),
    "H": ("f_distill", [("g = r[:, None]", "g = -r[:, None]")], "negative ratio"),
    "I": ("dmd", [("(x - d_real).abs()", "(xt - d_real).abs()"), ("draw_sigma(NOISE, N, \"cpu\")",
                                                                 "draw_sigma(NOISE, 1, \"cpu\").expand(N)")], "|xt - d_real|"),
    "J": ("sida", [("softplus(-logit) / size", "softplus(-logit) * (1 / size).mean()")], "batch scalar"),
    "K": ("dmd", [("own(x)", "own(x[torch.rand(N) > 0.13])")], "dropout"),
    "L": ("dmd", [("(d_fake - d_real) / size", "((d_fake - d_real) / size).sign() * ((d_fake - d_real) / size).abs().mean()")],
          "sign only"),
}


def reply(key, answer):
    """The sentence for an answer (a number, a tensor of one, a word, None for not yet) to question `key`."""
    question = QUESTIONS[key]
    if answer is None:
        return f"{key}: not answered yet. Put your answer in place of None."
    if question.matches(answer, question.right):
        return f"{key}: right."
    said = next((said for slip, said in question.slips.items() if question.matches(answer, slip)), question.hint)
    no_number = number(answer) is None and not isinstance(question.right, str) and said == question.hint
    kind = "Here a number is asked for. " * no_number
    return f"{key}: not yet. {kind}{said}"
