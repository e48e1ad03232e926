"""Experiments on vanishing and exploding gradients and their cures: python -m examples, or make demo."""
