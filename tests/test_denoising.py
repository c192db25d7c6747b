"""Denoising: the whole block between two boundaries runs on a noisy input too, and is pulled to its clean output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern
import nets
from bllkern.models.gpt import GPT
from bllkern.objectives import BLL
from bllkern.parallel.part import Layout, Part

STD, WEIGHT, RATE, STEPS = 0.3, 2.0, 0.1, 10
DENOISING = BLL(evidence=0, similarity=0, denoising=WEIGHT, noise=STD)


class Units(nn.Module):
    """Convolutions and residual units; operations in place follow two of the cuts."""

    def __init__(self):
        super().__init__()
        units = nets.ResNet(nets.BasicBlock, (2, 1), 5, (3, 8, 8), planes=4)
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = units.layer1, units.layer2
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 5)

    def first(self, x):
        return self.stem(x)

    def second(self, z):
        return self.layer2(self.layer1(self.norm(z.relu_())))

    def third(self, z):
        return self.hidden(torch.tanh_(z.mean((2, 3)).view(len(z), -1)))

    def last(self, z):
        return self.head(F.relu_(z))

    def forward(self, x):
        return self.last(self.third(self.second(self.first(x))))


def perceptron():
    sizes = (12, 9, 8, 7, 6, 5, 5)
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers)
    blocks = [lambda n, x, i=i: n[i : i + 4](x) for i in (0, 4, 8)]
    return net, ["3", "7"], blocks, torch.randn(16, 12), torch.randint(0, 5, (16,))


def convolutions():
    """The first cut alone ends where its block begins; behind the others the noise passes other modules first."""
    blocks = [Units.first, Units.second, Units.third, Units.last]
    return Units(), ["stem", "layer2", "hidden"], blocks, torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))


def tokens():
    """The noise of the first block enters where tokens are embedded, two modules before the cut."""
    net = GPT(5, (6,), width=16, heads=2, depth=5)

    def first(n, embedded):
        t = n.transformer
        return t.h[1](t.h[0](embedded + t.wpe.weight[:6]))

    def last(n, z):
        return n.lm_head(n.transformer.ln_f(n.transformer.h[4](z)))

    blocks = [first, lambda n, z: n.transformer.h[3](n.transformer.h[2](z)), last]
    return net, ["transformer.h.1", "transformer.h.3"], blocks, *(torch.randint(0, 5, (8, 6)) for _ in range(2))


CASES = {"perceptron": perceptron, "convolutions": convolutions, "tokens": tokens}


def by_hand(net, blocks, x, y):
    """The gradients of one step in plain torch, and the local losses; draws its noise in the order of the library."""
    losses = []
    z = x if x.is_floating_point() else net.transformer.wte(x)
    for block in blocks[:-1]:
        noisy = z + STD * torch.randn_like(z)
        clean = block(net, z.clone())
        losses.append(WEIGHT * F.mse_loss(block(net, noisy), clean.detach()))
        z = clean.detach()
    total = sum(losses) + nets.cross_entropy(blocks[-1](net, z.clone()), y)
    total.backward()
    return [loss.detach() for loss in losses]


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
@pytest.mark.parametrize("case", CASES)
def test_the_whole_block_as_in_plain_torch(case, schedule):
    torch.manual_seed(0)
    net, cuts, blocks, x, y = CASES[case]()
    net, x = net.double(), x.double() if x.is_floating_point() else x
    plain = copy.deepcopy(net)
    net = bllkern.convert(net, cuts, nets.CLASSES, DENOISING, schedule, example=x)
    optimizers = bllkern.optimizers(net, lambda params: torch.optim.SGD(params, RATE))
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    for seed in range(STEPS):
        torch.manual_seed(seed)
        with bllkern.targets(y):
            output = net(x)
        assert type(output) is torch.Tensor
        nets.cross_entropy(output, y).backward()
        optimizers.step()
        optimizers.zero_grad()
        torch.manual_seed(seed)
        optimizer.zero_grad()
        expected = by_hand(plain, blocks, x, y)
        optimizer.step()
        torch.testing.assert_close(list(bllkern.local_losses(net).values()), expected, rtol=1e-9, atol=0)
        assert all(loss > 0 for loss in expected)
    for p, q in zip(bllkern.unwrap(net).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("case", ["perceptron", "tokens"])
def test_isolated(case, schedule):
    net, cuts, _, x, y = CASES[case]()
    net = bllkern.convert(net, cuts, nets.CLASSES, BLL(denoising=1.0, noise=STD), schedule)
    bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1))
    bllkern.assert_isolated(net, x, y)


def test_outside_of_training_nothing_is_drawn():
    net, cuts, _, x, y = perceptron()
    converted = bllkern.convert(net, cuts, nets.CLASSES, DENOISING, example=x)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(converted(x), net(x))
    assert torch.equal(converted.eval()(x), net(x))
    with bllkern.targets(y):
        assert torch.equal(bllkern.unwrap(converted.train())(x), net(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_block_hands_the_noise_on():
    net, cuts, _, x, y = perceptron()
    net = bllkern.convert(net, cuts, nets.CLASSES, DENOISING, example=x)
    net[3].eval()
    with bllkern.targets(y):
        net(x)
    assert list(bllkern.local_losses(net)) == ["7"] and bllkern.local_losses(net)["7"] > 0


def test_the_noisy_run_is_autocast_too():
    net, cuts, _, x, y = tokens()
    net = bllkern.convert(net, cuts, nets.CLASSES, DENOISING, example=x)
    seen = []
    for block in (net.get_submodule(name).module for name in cuts):
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    net.transformer.h[0].register_forward_hook(lambda module, args, output: seen.append(output.clean))
    with bllkern.targets(y), torch.autocast("cpu", torch.bfloat16):
        net(x)
    assert len(seen) == 5 and len({(z.dtype, z.shape) for z in seen}) == 1


def test_larger_than_the_device():
    results = []
    for offload in (None, "cpu"):
        torch.manual_seed(0)
        net, cuts, _, x, y = convolutions()
        net = bllkern.convert(net, cuts, nets.CLASSES, DENOISING, "immediate", example=x, offload=offload)
        optimizers = bllkern.optimizers(net, lambda params: torch.optim.SGD(params, RATE))
        with bllkern.targets(y):
            nets.cross_entropy(net(x), y).backward()
        optimizers.step()
        results.append(net.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value)


def test_on_a_rank_of_its_own_a_block_gets_what_was_received_with_noise():
    net, cuts, blocks, x, y = convolutions()
    net = bllkern.convert(net, cuts, nets.CLASSES, DENOISING, example=x)
    z, handed_on = torch.randn(8, 4, 6, 6).contiguous(memory_format=torch.channels_last), []
    part = Part(net, Layout(net, (x,)), 1, 2, handed_on.append)
    plain = copy.deepcopy(bllkern.unwrap(net))
    torch.manual_seed(0)
    with bllkern.targets(y):
        part((x.to("meta"),), z.clone())
    torch.manual_seed(0)
    noisy = z + STD * torch.randn_like(z)
    clean = blocks[1](plain, z.clone())
    torch.testing.assert_close(handed_on, [clean.detach()])
    expected = WEIGHT * F.mse_loss(blocks[1](plain, noisy), clean.detach())
    torch.testing.assert_close(part.boundary(1).loss, expected.detach())
