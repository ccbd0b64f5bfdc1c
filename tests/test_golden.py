"""Our losses against numbers that the reference implementations of EDM, DMD2 and SiD produced (tests/golden).

Inputs here are the denoisers' outputs, so the losses are tested apart from any network. SiD's gradient passes through
the networks themselves: that, and the networks, are in teachers/test_edm.py.

Tolerances: the references are float32 with sums of 3072 terms; we compute in float64 from the same inputs, so 1e-5
relative is their rounding, not ours.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from nano_dmd.denoiser import edm_loss
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.sid_loss import sid_integrand

NETWORKS = ("ddpmpp_cond", "adm_cond", "ncsnpp_uncond")


def golden(network):
    """{name: float64 tensor} of one network."""
    tensors = load_file(Path(__file__).parent / "golden" / "losses.safetensors")
    return {k.removeprefix(network + "."): v.double() for k, v in tensors.items() if k.startswith(network + ".")}


@pytest.mark.parametrize("network", NETWORKS)
def test_dmd_gradient(network):
    """DMD2: (d_fake - d_real) / mean_CHW |x - d_real|."""
    t = golden(network)
    assert_close(dmd_gradient(t["x"], t["denoised_real"], t["denoised_fake"]), t["dmd_grad"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_sid_value(network):
    """SiD: the sum over all elements of gap ((d_real - x) - alpha gap) / mean|x - d_real|, gap = d_real - d_fake."""
    t = golden(network)
    for alpha in (1.0, 1.2):
        total = sid_integrand(t["x"], t["denoised_real"], t["denoised_fake"], alpha).sum()
        assert_close(total, t[f"sid_loss_sum_alpha{alpha}"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_denoising_loss(network):
    """EDM's weight (sigma^2 + sd^2) / (sigma sd)^2 and DMD2's 1/sigma^2 + 1/sd^2 are one and the same."""
    t = golden(network)

    def answer(xt, sigma, cond):                                  # stands for the fake network, at the same xt
        assert_close(xt, t["x"] + t["sigma"][:, None, None, None] * t["noise"], rtol=1e-12, atol=1e-12)
        return t["denoised_fake"]

    loss = edm_loss(answer, t["x"], t["sigma"], t["noise"], sigma_data=0.5).mean()
    assert_close(loss, t["fake_loss_edm_weight_mean"][0], rtol=1e-5, atol=0)
    assert_close(loss, t["fake_loss_karras_snr_weight_mean"][0], rtol=1e-5, atol=0)


def test_the_two_weights_are_one():
    """1/sigma^2 + 1/sd^2 = (sd^2 + sigma^2) / (sigma sd)^2, over the whole noise axis."""
    sigma, sd = torch.logspace(-3, 2, 50, dtype=torch.float64), 0.5
    zero = torch.zeros(50, 1, dtype=torch.float64)
    unit = edm_loss(lambda xt, sigma, cond: torch.ones_like(xt), zero, sigma, zero)   # sigma_data is 0.5 unless given
    assert_close(unit[:, 0], (sigma**2 + sd**2) / (sigma * sd) ** 2, rtol=1e-12, atol=0)
