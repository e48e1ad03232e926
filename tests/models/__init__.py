"""Networks written from their papers, for tests and benchmarks of what this package does to whole models.

Each is written the way people write it: functional or module activations, in place or not, additions with + or +=.
"""
