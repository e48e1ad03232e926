"""Rewriting models: convert, revert and fold.

Each file imports only from those before it in this list:

* Reading a forward: bytecode.py (what code does with names), purity.py (which names it may use),
  attributes.py (which attributes it reads), trace.py (its graph).
* Rewriting it: guard.py (the rewritten forward and its conditions), patterns.py (calls that are recognised),
  result.py, norm_act_layers.py (norms that apply an activation themselves), border.py (children that are
  written out in their parent's forward), aliasing.py (values that share memory), rewrite.py, block.py (the
  class of a converted block).
* Whole models: check.py, report.py, convert.py, fold.py (batch norms that go into weights, for inference).
"""

from gradkernels.conversion import convert, fold

__all__ = ["convert", "fold"]
