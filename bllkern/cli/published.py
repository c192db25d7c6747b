"""What the two papers report, and what is trained here to be set beside it."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = {
    "cifar10": "CIFAR-10",
    "tiny-imagenet": "Tiny-ImageNet",
    "imagenet": "ImageNet",
    "fashion-mnist": "Fashion-MNIST",
    "reversal": "sequence reversal",
}


@dataclass(frozen=True)
class Paper:
    """A table of test errors in percent.

    ``columns``: the published methods.  ``published``: their errors by (data, network).  ``methods``: what is trained,
    as objective and options, by the name of its column.  ``note`` says where the figures come from.
    """

    title: str
    columns: tuple[str, ...]
    published: dict[tuple[str, str], tuple[float | None, ...]]
    methods: dict[str, tuple[str, dict]]
    note: str


@dataclass(frozen=True)
class Scale:
    """What is trained: ``rows`` are (data, network); ``recipe`` holds fields of :class:`bllkern.cli.loop.Recipe`."""

    rows: tuple[tuple[str, str], ...]
    recipe: dict
    seeds: int
    note: str = ""


PAPERS = {
    "bwbpf": Paper(
        title="BWBPF (arXiv 2312.13311)",
        columns=("BP", "PredSim", "DGL", "SEDONA", "BWBPF"),
        published={
            ("cifar10", "vgg19"): (12.31, 13.87, 12.19, 11.58, 6.52),
            ("cifar10", "resnet50"): (7.99, 8.93, 8.27, 7.53, 4.85),
            ("cifar10", "resnet101"): (7.14, 7.93, 8.30, 6.59, 4.53),
            ("cifar10", "resnet152"): (6.35, 7.41, 6.39, 6.13, 4.48),
            ("tiny-imagenet", "vgg19"): (47.11, 55.30, 48.70, 43.44, 40.09),
            ("tiny-imagenet", "resnet50"): (46.54, 55.22, 46.04, 45.60, 35.83),
            ("tiny-imagenet", "resnet101"): (44.50, 46.80, 46.20, 40.88, 35.28),
            ("tiny-imagenet", "resnet152"): (39.18, 48.24, 42.36, 35.90, 35.01),
        },
        methods={
            "backprop": ("backprop", {}),
            "predsim": ("predsim", {}),
            "bwbpf, isolated": ("bwbpf", {"head": "linear", "label_smoothing": 0.0}),
            "bwbpf, as released": ("deep_supervision", {}),
        },
        note="Published: 400 epochs on CIFAR-10, 200 on Tiny-ImageNet; BP, PredSim, DGL and SEDONA are SEDONA's "
        "figures, under another schedule. The paper's code does not isolate its blocks: what it measured is *as "
        "released*.",
    ),
    "bll": Paper(
        title="BLL (arXiv 2305.14974)",
        columns=("BLL",),
        published={
            ("imagenet", "resnet50"): (46.0,),
            ("cifar10", "resnet18"): (None,),
            ("fashion-mnist", "resnet18"): (None,),
            ("reversal", "transformer"): (None,),
        },
        methods={
            "backprop": ("backprop", {}),
            "feedback alignment": ("fa", {}),
            "sign-symmetric": ("sign_symmetric", {}),
            "bll": ("bll", {}),
            "bll, chained feedback": ("bll", {"feedback": "chained"}),
        },
        note="Published: about 54 % top-1 on ImageNet, as a reviewer reads its Table 2; for the others no figure is at "
        "hand.",
    ),
}

_SHORT = {"batch_size": 100, "lr": 4e-3, "weight_decay": 1e-2, "train_size": 10_000, "test_size": 2000, "epochs": 5}
_FULL = {  # the papers' optimizer and augmentation
    **{"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "train_size": None, "test_size": None, "epochs": 30},
    **{"optimizer": "sgd", "lr_schedule": "cosine", "augment": "crop-flip"},
}

_SMALL = "convnet (32, 64, 128, 128 channels) stands in for the paper's networks, which two CPU cores cannot train."
_REVERSED = "Sequence reversal: 10 of 8 symbols, the share of wrong ones."
_CONVNET = (("cifar10", "convnet"),)
_RESNETS = (("cifar10", "resnet18"), ("cifar10", "resnet50"))

SCALES = {
    ("bwbpf", "cpu"): Scale(_CONVNET, _SHORT, seeds=3, note=_SMALL),
    ("bwbpf", "gpu"): Scale(_RESNETS, _FULL, seeds=1),
    ("bll", "cpu"): Scale(_CONVNET + (("reversal", "transformer"),), _SHORT, seeds=3, note=f"{_SMALL} {_REVERSED}"),
    ("bll", "gpu"): Scale(_RESNETS, _FULL, seeds=1),
}
