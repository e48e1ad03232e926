"""Initialisation: Xavier, He and LeCun, the gain of every activation, and apply_ for a whole model.

gain.py computes gains, fill.py fills one weight, following.py finds the activation after each layer, and
apply.py initialises a model.
"""

from gradkernels.init.apply import Initialised, InitReport, apply_
from gradkernels.init.fill import (
    he_normal_,
    he_uniform_,
    lecun_normal_,
    lecun_uniform_,
    xavier_normal_,
    xavier_uniform_,
)
from gradkernels.init.gain import calculate_gain

__all__ = [
    "InitReport",
    "Initialised",
    "apply_",
    "calculate_gain",
    "he_normal_",
    "he_uniform_",
    "lecun_normal_",
    "lecun_uniform_",
    "xavier_normal_",
    "xavier_uniform_",
]
