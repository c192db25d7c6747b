"""Families against torch.distributions, and against sums or integrals over the latent variable."""

import math

import pytest
import torch

from bllkern import families

from checks import NAMES, SUPPORT, distribution, exponents, log_sum, parameters


def log_base_measure(name):
    """``log h(z)`` at every value of a latent unit."""
    if name == "poisson":
        return -torch.lgamma(SUPPORT[name] + 1)
    if name.startswith("gaussian"):
        return -0.5 * math.log(2 * math.pi) - (SUPPORT[name] ** 2 / 2 if name == "gaussian" else 0)
    return 0


@pytest.mark.parametrize("name", NAMES)
def test_log_partitions_are_integrals_over_the_latent(name):
    f, a = families.get(name), parameters(name, 4, 6)
    for power, partition in ((1, f.A(a)), (2, f.A2(a))):
        integral = log_sum(name, exponents(name, a) + power * log_base_measure(name))
        torch.testing.assert_close(partition, integral, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_mean_is_the_expected_sufficient_statistic(name):
    a = parameters(name, 4, 6)
    d = distribution(name, a)
    expected = torch.cat([d.mean, d.mean**2 + d.variance], -1) if name == "gaussian_learned" else d.mean
    torch.testing.assert_close(families.get(name).mean(a), expected.reshape(a.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("partition, mean", [("A", "mean"), ("A2", "mean2")])
def test_means_are_gradients_of_the_log_partitions(name, partition, mean):
    f, a = families.get(name), parameters(name, 4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(f, partition)(a).sum(), a)
    torch.testing.assert_close(getattr(f, mean)(a), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_log_partition_of_the_exponential_families_of_torch(name):
    """torch's own log-normaliser; its Normal has the constant base measure, so the gaussian's differs by a^2 terms."""
    a = parameters(name, 4, 6)
    d = distribution(name, a)
    if name == "gaussian":
        expected = d._log_normalizer(a, torch.full_like(a, -0.5)) - 0.5 * math.log(2 * math.pi)
    else:
        expected = d._log_normalizer(a)
    torch.testing.assert_close(families.get(name).A(a), expected.sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_log_density_is_that_of_torch(name):
    """``log h(z) + T(z) . a - A(a)`` for a sampled z."""
    f, a = families.get(name), parameters(name, 4, 6)
    d = distribution(name, a)
    z = d.sample()
    statistic = torch.cat([z, z**2], -1) if name == "gaussian_learned" else z.reshape(a.shape)
    log_h = {
        "gaussian": -(z**2) / 2 - math.log(2 * math.pi) / 2,
        "gaussian_learned": torch.full_like(z, -math.log(2 * math.pi) / 2),
        "poisson": -torch.lgamma(z + 1),
    }.get(name, torch.zeros_like(z))
    log_density = log_h.flatten(1).sum(-1) + (statistic * a).sum(-1) - f.A(a)
    torch.testing.assert_close(log_density, d.log_prob(z).sum(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_agreement_is_made_of_log_partitions(name):
    f, a, b = families.get(name), parameters(name, 4, 6), parameters(name, 4, 6)
    torch.testing.assert_close(f.agreement(a, b), f.A(a) + f.A(b) - f.A2(a + b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bernoulli", "categorical", "gaussian", "poisson"])
def test_activations_are_natural_parameters_as_they_are(name):
    z = torch.randn(3, 4)
    assert families.get(name).natural(z) is z


def test_natural_parameters_of_learned_precision_have_negative_second_half():
    z = torch.tensor([[3.0, -2.0, 1e4, -1e4]])
    a = families.get("gaussian_learned").natural(z)
    assert torch.equal(a[:, :2], z[:, :2]) and (a[:, 2:] < 0).all() and a.isfinite().all()


@pytest.mark.parametrize("name", ["bernoulli", "categorical:2", "gaussian"])
def test_extreme_parameters_stay_finite(name):
    f, a = families.get(name), torch.tensor([[1e4, -1e4, 1e4, 1e4], [-1e4, -1e4, 0.0, -1e4]])
    for result in (f.A(a), f.mean(a), f.A2(a), f.mean2(a)):
        assert result.isfinite().all()


def test_poisson_uses_scaled_bessel_functions():
    """I0(2 exp(a/2)) itself would overflow float32 from a = 7.6 on; log I0(x) = x - log(2 pi x) / 2 for large x."""
    f, a = families.get("poisson"), torch.tensor([[20.0]])
    x = 2 * math.exp(10)
    assert f.A2(a).item() == pytest.approx(x - math.log(2 * math.pi * x) / 2, rel=1e-5)
    assert f.mean2(a).item() == pytest.approx(x / 2, rel=1e-4)


def test_get_finds_families_by_name_or_takes_them():
    assert families.get("bernoulli") is families.get("bernoulli")
    assert families.get("categorical:5") == families.Categorical(5)
    assert families.get("categorical").group_size is None
    mine = families.Categorical(4)
    assert families.get(mine) is mine


@pytest.mark.parametrize("name", ["normal", "", "categorical:", "categorical:x", "categorical:-2", "bernoulli:2"])
def test_get_refuses_other_names(name):
    with pytest.raises(ValueError, match="family must be one of.*'bernoulli'.*'categorical:G'"):
        families.get(name)


@pytest.mark.parametrize("family", [3, None, families.Bernoulli, ["bernoulli"]])
def test_get_refuses_other_types(family):
    with pytest.raises(TypeError, match="family must be a name or a bllkern.families.Family"):
        families.get(family)


@pytest.mark.parametrize("size", [0, -1, 2.0, "3"])
def test_group_size_must_be_a_positive_int(size):
    with pytest.raises(ValueError, match="group_size must be None or a positive int"):
        families.Categorical(size)


def test_group_size_in_a_name_must_be_positive():
    with pytest.raises(ValueError, match="group_size"):
        families.get("categorical:0")


@pytest.mark.parametrize("name, width", [("categorical:3", 4), ("categorical", 0), ("gaussian_learned", 3)])
def test_widths_must_be_whole_latent_variables(name, width):
    with pytest.raises(ValueError, match=f"message must have .*last dimension.*got {width}"):
        families.get(name).check_width(width, "message")


def test_family_itself_is_abstract():
    for method in ("A", "mean", "A2", "mean2"):
        with pytest.raises(TypeError, match="abstract"):
            getattr(families.Family(), method)(torch.zeros(1, 1))
