"""A whole job: built in `build`, run in `run`."""

from titanmoe.trainer.run import Trainer

__all__ = ["Trainer"]
