"""The networks of bllkern.models: shapes, names, cuts, and that gradients reach every parameter."""

import hashlib

import pytest
import torch

from bllkern import models

TOKEN_MODELS = ["gpt", "transformer"]
TORCHVISION = {  # keys and shapes of torchvision 0.28: 16 digits of the sha256 of a state_dict's lines "key shape"
    "resnet18": "66b04efc1dfd4b80",
    "resnet34": "4aa3e2bbbdc5e2fd",
    "resnet50": "614cd53ddf849669",
    "resnet101": "593b3bde446ee903",
    "resnet152": "9ce3831312550858",
    "vgg11": "dc54d45fed4bc7b4",
    "vgg13": "057b00c1243905f9",
    "vgg16": "ae5d7d87f5e61a76",
    "vgg19": "555ec1b35ce917df",
}


def _inputs(name, batch=2):
    if name in TOKEN_MODELS:
        return torch.randint(7, (batch, 6)), (6,)
    return torch.randn(batch, 3, 16, 16), (3, 16, 16)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_logits_gradients_and_cuts(name):
    x, in_shape = _inputs(name)
    net = models.build(name, 7, in_shape)
    logits = net(x)
    assert logits.shape == ((2, 6, 7) if name in TOKEN_MODELS else (2, 7))
    logits.square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    names = [n for n, _ in net.named_modules()]
    cuts = models.default_cuts(name)
    assert len(cuts) >= 2 and sorted(cuts, key=names.index) == cuts  # every cut is a module, in order


@pytest.mark.parametrize("in_shape", [(1, 8, 8), (3, 32, 32), (3, 28, 30)])
@pytest.mark.parametrize("name", ["mlp", "convnet", "vgg11", "resnet18"])
def test_image_sizes(name, in_shape):
    assert models.build(name, 10, in_shape)(torch.randn(2, *in_shape)).shape == (2, 10)


@pytest.mark.parametrize(
    "name, parameters",
    # torchvision's resnet18 and resnet50 (11,689,512, 25,557,032) with a stem of 1,728 weights instead of 9,408 and fc
    # for 10 instead of 1,000 classes; the paper's 0.27M and 1.7M with 2,752 parameters of shortcut convolutions
    [("resnet18", 11_173_962), ("resnet50", 23_520_842), ("resnet20", 272_474), ("resnet110", 1_730_714)],
)
def test_number_of_parameters(name, parameters):
    assert sum(p.numel() for p in models.build(name, 10, (3, 32, 32)).parameters()) == parameters


@pytest.mark.parametrize("name", TORCHVISION)
def test_checkpoints_of_torchvision_fit(name):
    with torch.device("meta"):
        state = models.build(name, 1000, (3, 224, 224)).state_dict()
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in state.items())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == TORCHVISION[name]
    small = models.build(name, 10, (3, 32, 32)).state_dict()
    assert [key for key in small if "classifier" not in key] == [key for key in state if "classifier" not in key]


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_large_images(name):
    with torch.device("meta"):
        net = models.build(name, 10, (3, 224, 224))
        assert net(torch.randn(2, 3, 224, 224)).shape == (2, 10)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_causal_transformer_does_not_look_ahead(name):
    net = models.build(name, 7, (6,)).eval()
    x, _ = _inputs(name, 1)
    changed = x.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 7
    different = (net(x) != net(changed)).any(-1)[0]
    assert different.tolist() == [False] * 4 + [True] * 2


def test_transformer_that_sees_everything():
    net = models.transformer(7, (6,), causal=False).eval()
    x, _ = _inputs("transformer", 1)
    changed = x.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 7
    assert (net(x) != net(changed)).any(-1).all()


@pytest.mark.parametrize("name", ["resnet35", "", "MLP"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="model must be one of .*convnet"):
        models.build(name, 10, (3, 32, 32))
    with pytest.raises(ValueError, match="model must be one of .*convnet"):
        models.default_cuts(name)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"in_shape must have 3 dimensions for 'convnet', got \[64\]"):
        models.build("convnet", 10, (64,))
    with pytest.raises(ValueError, match=r"in_shape must have 1 dimensions for 'transformer'"):
        models.build("transformer", 10, (3, 32, 32))
    for name in TOKEN_MODELS:
        with pytest.raises(ValueError, match="T <= 6"):
            models.build(name, 7, (6,))(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="depth must be 6 n"):
        models.cifar_resnet(21, 10, (3, 32, 32))
    for build in (models.transformer, models.gpt):
        with pytest.raises(ValueError, match="width must be a multiple of heads, got width 65 and heads 4"):
            build(7, (6,), width=65)
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width 64 and heads 3"):
        models.vit(7, (3, 8, 8), width=64)
    with pytest.raises(ValueError, match=r"multiples of patch=4, got \[3, 8, 9\]"):
        models.vit(7, (3, 8, 9))


@pytest.mark.parametrize("name", ["mlp", "convnet", "vgg11", "resnet18", "resnet20", "vit"])
def test_seed_decides_the_weights(name):
    def state():
        torch.manual_seed(3)
        return models.build(name, 10, (3, 8, 8)).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet56"])
@pytest.mark.parametrize("blocks", [4, 8, 12, 16])
def test_cuts_along_the_stages(name, blocks):
    """The outputs of BWBPF (arXiv 2312.13311)."""
    stages = models.MODELS[name].stages
    if blocks > sum(stages):
        with pytest.raises(ValueError, match=f"blocks must be from 4 to 8 for 'resnet18', got {blocks}"):
            models.default_cuts(name, blocks)
        return
    cuts = models.default_cuts(name, blocks)
    assert len(cuts) == blocks - 1 and set(models.default_cuts(name)) <= set(cuts)
    starts = [sum(stages[:i]) for i in range(len(stages) + 1)]
    units = [f"layer{i}.{k}" for i, depth in enumerate(stages, 1) for k in range(depth)]
    ends = [units.index(cut) + 1 if "." in cut else starts[int(cut[-1])] for cut in cuts]
    assert ends == sorted(set(ends))
    lengths = [b - a for a, b in zip([0, *ends], [*ends, len(units)])]
    assert min(lengths) >= 1 and (blocks == 4 or max(lengths) <= 2 * len(units) / blocks)


def test_cuts_into_other_numbers_of_blocks():
    assert models.default_cuts("vgg19", 5) == [f"features.{i}" for i in (6, 13, 26, 39)]
    net = models.build("vgg19", 10, (3, 32, 32))
    assert all(isinstance(net.get_submodule(cut), torch.nn.MaxPool2d) for cut in models.default_cuts("vgg19"))
    for name, blocks, allowed in (("vgg19", 4, "5"), ("resnet50", 3, "from 4 to 16"), ("mlp", 9, "4")):
        with pytest.raises(ValueError, match=f"blocks must be {allowed} for '{name}', got {blocks}"):
            models.default_cuts(name, blocks)
