"""Networks written from their papers, for tests and benchmarks on whole models.

Their code is like common code: activations as functions or modules, in place or not, additions with + or +=.
"""
