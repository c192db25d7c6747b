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


def accuracy(objective, options, cuts, epochs, lr):
    """On the test digits, after training from seed 0 in batches of 100."""
    shared = {"data": "digits", "model": "mlp", "schedule": None, "batch_size": 100, "weight_decay": 1e-2, "seed": 0}
    sizes = {"train_size": None, "test_size": None}
    recipe = Recipe(**shared, **sizes, objective=objective, options=options, cuts=cuts, epochs=epochs, lr=lr)
    training = Training(recipe, load("digits"), torch.device("cpu"))
    for _ in range(epochs):
        training.train_epoch(lambda loss: None)
    return training.results()["accuracy"]


@pytest.mark.parametrize("family", OPTIONS)
def test_family(family):
    options = {"family": family, **OPTIONS[family]}
    assert accuracy("bll", options, models.default_cuts("mlp"), epochs=6, lr=4e-3) > 0.9


def test_target_propagation_does_not_collapse():
    """With maps that learn from the activations which they move (``feedback="chained"``), it is at chance."""
    assert accuracy("target_propagation", {}, models.default_cuts("mlp"), epochs=10, lr=4e-3) > 0.9
