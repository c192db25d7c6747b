"""Networks of torchvision and transformers convert, and ours take their checkpoints."""

import pytest
import torch
import torch.nn.functional as F

import bllkern
from bllkern import models

NUMBERS = {"resnet18": 4, "mobilenet_v3_small": 4, "densenet121": 3, "googlenet": 4, "swin_t": 3}


def images(size=32):
    return torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_the_same_network_as_torchvision(name):
    others = pytest.importorskip("torchvision").models
    if name == "vit":
        other, size = others.VisionTransformer(32, 4, 2, 3, 48, 192, num_classes=10), 32
        ours = models.vit(10, (3, 32, 32), width=48, depth=2)
    else:
        other, size = getattr(others, name)(num_classes=10), 128
        ours = models.build(name, 10, (3, size, size))
    ours.load_state_dict(other.state_dict())
    x = images(size)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NUMBERS)
def test_networks_of_torchvision_convert(name):
    others = pytest.importorskip("torchvision").models
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    plain, (x, y) = getattr(others, name)(num_classes=10, **options), images(64)
    keys = list(plain.state_dict())
    net = bllkern.convert(plain, NUMBERS[name], 10, "bwbpf", example=x)
    assert len(bllkern.network.boundaries(net)) == NUMBERS[name] - 1
    if name in ("resnet18", "mobilenet_v3_small"):
        bllkern.assert_isolated(net, x, y)
    with bllkern.targets(y):
        F.cross_entropy(net(x), y).backward()
    assert [p for p in plain.parameters() if p.grad is None] == []
    assert list(bllkern.unwrap(net).state_dict()) == keys


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 40, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, **ends, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **options)
    return transformers.GPT2LMHeadModel(config)


def test_the_same_network_as_gpt2():
    other, ours = gpt2(tie_word_embeddings=False), models.gpt(40, (16,), width=32, depth=3)
    keys = {key: value for key, value in other.state_dict().items() if not key.endswith((".attn.bias", ".masked_bias"))}
    assert list(ours.state_dict()) == list(keys)
    ours.load_state_dict(keys)
    tokens = torch.randint(40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), other.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
@pytest.mark.parametrize("cuts", [["transformer.h.0", "transformer.h.1"], 3])
def test_gpt2_of_transformers_converts(cuts, schedule):
    plain = gpt2(tie_word_embeddings=False)
    tokens = torch.randint(40, (4, 9))
    net = bllkern.convert(plain, cuts, 40, "bwbpf", schedule, example=tokens)
    optimizers = bllkern.optimizers(net, lambda params: torch.optim.Adam(params, lr=3e-3))
    bllkern.assert_isolated(net, tokens, tokens)
    losses = []
    for _ in range(8):
        optimizers.zero_grad()
        with bllkern.targets(tokens):
            loss = net(tokens, labels=tokens).loss
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and len(bllkern.local_losses(net)) == 2


def test_gpt2_of_transformers_denoises():
    """The noise enters where tokens are embedded, and the output is that of the class as ever."""
    plain, tokens = gpt2(tie_word_embeddings=False), torch.randint(40, (4, 9))
    objective = bllkern.objectives.BLL(evidence=0, similarity=0, denoising=1.0, noise=0.5)
    net = bllkern.convert(plain, ["transformer.h.1"], 40, objective, example=tokens)
    bllkern.assert_isolated(net, tokens, tokens)
    with bllkern.targets(tokens):
        logits = net(tokens).logits
    assert type(logits) is torch.Tensor and bllkern.local_losses(net)["transformer.h.1"] > 0
    assert plain.transformer.wte.weight.grad.abs().sum() > 0


def test_tied_embeddings_of_gpt2_are_refused():
    with pytest.raises(RuntimeError, match="reaches 'transformer.wte.*tied to 'lm_head.weight'"):
        bllkern.convert(gpt2(), ["transformer.h.0"], 40, example=torch.randint(40, (4, 9)))


@pytest.mark.parametrize("name", ["Bert", "ViT", "Llama"])
def test_networks_of_transformers_convert(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    y = torch.tensor([0, 1, 2, 3])
    if name == "ViT":
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
        plain, x = transformers.ViTForImageClassification(config), torch.randn(4, 3, 16, 16)
    elif name == "Bert":
        config = transformers.BertConfig(**sizes, vocab_size=40, num_labels=5)
        plain, x = transformers.BertForSequenceClassification(config), torch.randint(40, (4, 9))
    else:
        config = transformers.LlamaConfig(**sizes, vocab_size=40, pad_token_id=0, tie_word_embeddings=False)
        plain, x = transformers.LlamaForCausalLM(config), torch.randint(40, (4, 9))
        y = x
    stack = next(name for name, module in plain.named_modules() if isinstance(module, torch.nn.ModuleList))
    net = bllkern.convert(plain, [f"{stack}.0", f"{stack}.1"], 40, "bwbpf", example=x)
    bllkern.assert_isolated(net, x, y)
    with bllkern.targets(y):
        logits = net(x).logits
    F.cross_entropy(logits.flatten(0, -2), y.flatten()).backward()
    assert [n for n, p in plain.named_parameters() if p.grad is None and "pooler" not in n] == []
