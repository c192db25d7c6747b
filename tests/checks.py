"""What several tests compare with, and how: oracles from torch.distributions, errors of vectors."""

import torch
import torch.nn.functional as F
from torch import distributions as D
from torch.utils._python_dispatch import TorchDispatchMode

from bllkern import backends, families

NAMES = ["bernoulli", "categorical:3", "categorical", "gaussian", "gaussian_learned", "poisson"]
LOW_PRECISION = [torch.bfloat16, torch.float16]

GRID = torch.linspace(-80, 80, 8001, dtype=torch.float64)
SUPPORT = {  # values of a latent unit; Gaussians are integrated on a grid, counts are cut where nothing is left
    "bernoulli": torch.tensor([0.0, 1.0], dtype=torch.float64),
    "gaussian": GRID,
    "gaussian_learned": GRID,
    "poisson": torch.arange(200, dtype=torch.float64),
}


def parameters(name, *shape, dtype=torch.float64):
    """Random natural parameters; of rates, ones near 1."""
    return families.get(name).natural((0.5 if name == "poisson" else 1.5) * torch.randn(*shape)).to(dtype)


def grouped(name, a):
    """Parameters [..., D] of a categorical family as [..., groups, group size]."""
    return a.unflatten(-1, (-1, families.get(name).group_size or a.shape[-1]))


def distribution(name, a):
    """The distribution of the latent units whose natural parameters are ``a`` [..., D]."""
    if name == "bernoulli":
        return D.Bernoulli(logits=a)
    if name.startswith("categorical"):
        return D.OneHotCategorical(logits=grouped(name, a))
    if name == "gaussian":
        return D.Normal(a, 1.0)
    if name == "gaussian_learned":
        eta1, eta2 = a.chunk(2, -1)
        variance = -0.5 / eta2
        return D.Normal(eta1 * variance, variance.sqrt())
    return D.Poisson(a.exp())


def log_densities(name, a):
    """``log`` of the density at every value of every latent unit [..., units, values]."""
    d = distribution(name, a)
    if name.startswith("categorical"):
        return d.logits
    return d.log_prob(SUPPORT[name].reshape(-1, *[1] * a.dim())).movedim(0, -1)


def exponents(name, a):
    """``T(z) . a`` at every value of every latent unit [..., units, values]."""
    if name.startswith("categorical"):
        return grouped(name, a)
    z = SUPPORT[name]
    if name == "gaussian_learned":
        eta1, eta2 = a.chunk(2, -1)
        return eta1[..., None] * z + eta2[..., None] * z**2
    return a[..., None] * z


def log_sum(name, terms):
    """``log`` of the sum (integral) of ``exp(terms)`` over the latent values, summed over units: [...]."""
    spacing = GRID[1] - GRID[0] if name.startswith("gaussian") else torch.ones(())
    return (torch.logsumexp(terms, -1) + spacing.log()).sum(-1)


class Results(TorchDispatchMode):
    """Keeps what each bllkern op returned inside the ``with`` block."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "bllkern":
            self.kept.append(result)
        return result


def available(op, device_type="cpu", dtype=torch.float32):
    """Names of the backends that can run ``op``; the reference always can."""
    return [name for name in backends.BACKENDS if backends.why_not(name, op, device_type, dtype) is None]


def relative_l2(x, truth):
    """``|x - truth| / |truth|`` in float64, over all elements."""
    x, truth = x.detach().double(), truth.detach().double()
    return ((x - truth).norm() / truth.norm()).item()


def value_and_gradients(function, *tensors):
    """``function`` of copies of ``tensors``, and its gradients by them (of its sum, where it is not a scalar)."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def assert_matches_float64(function, formula, *tensors, tolerance=1e-6):
    """Value and gradients of ``function`` are, as vectors, those of ``formula`` on the same numbers in float64."""
    actual = value_and_gradients(function, *tensors)
    truth = value_and_gradients(formula, *(x.double() for x in tensors))
    for i, (x, t) in enumerate(zip(actual, truth, strict=True)):
        what = f"gradient {i - 1}" if i else "value"
        assert x.shape == t.shape, what
        error = relative_l2(x, t)
        assert error <= tolerance, f"{what}: relative L2 error {error:.2e}"
        cosine = F.cosine_similarity(x.double().flatten(), t.flatten(), dim=0).item()
        assert cosine >= 1 - 1e-9, f"{what}: cosine {cosine}"


def assert_no_worse_than_eager(function, formula, *tensors, tolerance=1e-2):
    """Errors against float64 are at most those of ``formula`` by eager autograd, plus ``tolerance``."""
    actual = value_and_gradients(function, *tensors)
    eager = value_and_gradients(formula, *tensors)
    truth = value_and_gradients(formula, *(x.double() for x in tensors))
    assert actual[0].dtype == torch.float32
    for i, (x, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        what = f"gradient {i - 1}" if i else "value"
        assert i == 0 or x.dtype == tensors[i - 1].dtype, what
        assert relative_l2(x, t) <= relative_l2(e, t) + tolerance, what


def record_calls(monkeypatch, module, name):
    """A list of the arguments of every call of ``module.name`` from now on."""
    calls, function = [], getattr(module, name)

    def recorded(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(module, name, recorded)
    return calls
