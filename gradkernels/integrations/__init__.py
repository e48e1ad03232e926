"""Callbacks for trainers. Each module imports its framework when it is imported, and nothing here imports one.

    lightning.py            lightning.pytorch
    pytorch_lightning.py    pytorch_lightning, whose classes are others; lightning_hooks.py serves both
    transformers.py         the Trainer of transformers
    ultralytics.py          the trainers of ultralytics

accelerate needs none: attach_clipping takes its optimizer. metric_rows.py turns what GradientMonitor records
into metrics of a logger.
"""
