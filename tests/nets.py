"""Small networks of every kind that the block-local tests train, with an input and targets for each."""

import torch
from torch import nn

import bllkern
from bllkern.models.gpt import GPT
from bllkern.models.resnet import BasicBlock, ResNet
from bllkern.models.transformer import Transformer
from bllkern.models.vgg import VGG
from bllkern.models.vit import VisionTransformer
from bllkern.network import boundaries
from bllkern.objectives import BLL

CLASSES = 5
EVERY_TERM = BLL(
    family="bernoulli",
    agreement=0.1,
    decorrelation=0.5,
    denoising=1.0,
    prediction=0.5,
    similarity_target="feedback",
    feedback="chained",
    bootstrapping=True,
)
NAMES = ["mlp", "convnet", "vgg", "resnet", "vit", "transformer", "gpt"]


def build(name):
    """The network ``name``, the names of its cuts, an input and targets."""
    if name == "mlp":
        net = nn.Sequential(
            nn.Linear(12, 16),
            nn.ReLU(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 10),
            nn.ReLU(),
            nn.Linear(10, CLASSES),
        )
        return net, ["1", "3", "5"], torch.randn(16, 12), torch.randint(0, CLASSES, (16,))
    if name == "convnet":
        net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        )
        return net, ["0", "1"], torch.randn(16, 3, 8, 8), torch.randint(0, CLASSES, (16,))
    if name == "resnet":
        net = ResNet(BasicBlock, (1, 2, 1), CLASSES, (3, 8, 8), planes=4)
        return net, ["layer1", "layer2.0", "layer3"], torch.randn(16, 3, 8, 8), torch.randint(0, CLASSES, (16,))
    if name == "vgg":
        net = VGG(11, CLASSES, (3, 8, 8), channels=(4, 4, 8, 8, 8))
        return net, ["features.3", "features.14"], torch.randn(16, 3, 8, 8), torch.randint(0, CLASSES, (16,))
    if name == "vit":
        net = VisionTransformer(CLASSES, (3, 8, 8), width=16, heads=2, depth=3)
        cuts = ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
        return net, cuts, torch.randn(16, 3, 8, 8), torch.randint(0, CLASSES, (16,))
    tokens, targets = torch.randint(0, CLASSES, (8, 6)), torch.randint(0, CLASSES, (8, 6))
    if name == "gpt":
        net = GPT(CLASSES, (6,), width=16, heads=2, depth=3)
        return net, ["transformer.h.0", "transformer.h.1"], tokens, targets
    return Transformer(CLASSES, 6, width=16, heads=2, depth=3), ["layers.0", "layers.1"], tokens, targets


def train(net, x, y, steps, momentum=0.0, **given):
    """The local losses of every step, whatever the schedule; ``given`` goes to ``bllkern.targets``."""
    optimizers = bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=momentum))
    losses = []
    for _ in range(steps):
        optimizers.zero_grad()
        with bllkern.targets(y, **given):
            loss = net(x).square().mean()
        if any(boundary.schedule == "deferred" for boundary in boundaries(net).values()):
            loss = loss + bllkern.local_loss(net)
        loss.backward()
        optimizers.step()
        losses += [loss.clone() for loss in bllkern.local_losses(net).values()]
    return losses


def cross_entropy(output, y):
    """The global loss, of classes per sample or per token."""
    return nn.functional.cross_entropy(output.flatten(0, -2), y.flatten())
