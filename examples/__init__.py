"""Experiments on vanishing and exploding gradients and their cures: python -m examples, or make demo.

"The notes" are the text on this subject from which the experiments are taken. Its programs use another
framework.
"""
