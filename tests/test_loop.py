"""The training loop of the command line: with backprop it ends with the weights of a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_cli import SMALL
from test_cli import _same as same
from test_cli import _train as train
from test_cli import _weights as weights

from bllkern import models
from bllkern.cli import data


@pytest.mark.parametrize("autocast", [False, True])
def test_backprop_is_the_plain_loop(tmp_path, autocast):
    assert train("--objective", "backprop", *(["--autocast"] if autocast else []), output=tmp_path) == 0
    digits = data.load("digits", train_size=60, test_size=40)
    torch.manual_seed(0)
    net = models.build("mlp", 10, (1, 8, 8))
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, 9)
    order = torch.Generator().manual_seed(0)
    for _ in range(3):
        for x, y in data.batches(digits.train_x, digits.train_y, 20, digits.augment, order):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = net(x)
            F.cross_entropy(output.float(), y).backward()
            optimizer.step()
            scheduler.step()
    assert same(weights(tmp_path), net.state_dict())


def test_sgd_with_cosine_is_the_plain_loop(tmp_path):
    """The setting of BWBPF: momentum 0.9, weight decay 5e-4, learning rate 0.1 annealed to 0."""
    assert train("--objective", "backprop", "--preset", "bwbpf", *SMALL, "--augment", "flip", output=tmp_path) == 0
    digits = data.load("digits", train_size=60, test_size=40, augment="flip")
    torch.manual_seed(0)
    net = models.build("mlp", 10, (1, 8, 8))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(0)
    step = 0
    for _ in range(3):
        for x, y in data.batches(digits.train_x, digits.train_y, 20, digits.augment, order):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 9))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            step += 1
    for key, value in net.state_dict().items():
        torch.testing.assert_close(weights(tmp_path)[key], value)
