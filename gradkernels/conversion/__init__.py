"""Rewriting models: convert, revert and fold.

From a forward to a fused block: trace.py reads the forward, purity.py finds what else it depends on, rewrite.py finds what can be
fused, guard.py holds what has to be so at each call, block.py makes the class. convert.py walks over a model; fold.py is for inference.
"""
