"""Every family trains the perceptron on scikit-learn's digits, in all ways that feedback can go."""

import pytest
import torch

from bllkern import models
from bllkern.cli.data import load
from bllkern.cli.loop import Recipe, Training

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {
    "bernoulli": {},
    "categorical:8": {"feedback": "chained"},
    "gaussian": {"bootstrapping": True},
    "gaussian_learned": {},
    "poisson": {"feedback": "chained", "agreement": 0.01},
}


@pytest.mark.parametrize("family", OPTIONS)
def test_family(family):
    shared = {"data": "digits", "model": "mlp", "objective": "bll", "schedule": None, "epochs": 6, "batch_size": 100}
    options = {"family": family, **OPTIONS[family]}
    sizes = {"lr": 4e-3, "weight_decay": 1e-2, "seed": 0, "train_size": None, "test_size": None}
    recipe = Recipe(**shared, **sizes, options=options, cuts=models.default_cuts("mlp"))
    training = Training(recipe, load("digits"), torch.device("cpu"))
    for _ in range(recipe.epochs):
        training.train_epoch(lambda loss: None)
    assert training.results()["accuracy"] > 0.9
