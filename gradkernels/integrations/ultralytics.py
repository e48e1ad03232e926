"""A callback for the trainers of ultralytics: convert the model before it trains."""

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER

from gradkernels import conversion


def convert(trainer: BaseTrainer) -> None:
    """Convert the model of a trainer with gradkernels.convert, and log what was replaced.

    Add it to a YOLO with model.add_callback("on_pretrain_routine_end", convert). The averaged copy, which the
    trainer validates and saves, is not converted, so a checkpoint needs no gradkernels.

    Args:
        trainer: a trainer whose model exists, as after on_pretrain_routine_start.
    """
    LOGGER.info(conversion.convert.convert(trainer.model))
