"""A perceptron with batch norm before or after the activation: Ioffe, Szegedy, 2015."""

from torch import nn


def perceptron(width: int = 64, depth: int = 3) -> nn.Sequential:
    """(N, 20) -> (N, 4): Linear, BatchNorm1d, ReLU."""
    layers: list[nn.Module] = []
    for place in range(depth):
        layers += [nn.Linear(width if place else 20, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def perceptron_activation_first(width: int = 64, depth: int = 3) -> nn.Sequential:
    """(N, 20) -> (N, 4): Linear, ReLU, BatchNorm1d, so no activation follows a batch norm."""
    layers: list[nn.Module] = []
    for place in range(depth):
        layers += [nn.Linear(width if place else 20, width), nn.ReLU(), nn.BatchNorm1d(width)]
    return nn.Sequential(*layers, nn.Linear(width, 4))
