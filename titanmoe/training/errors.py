"""Ends of a job that are nobody's mistake in the config. Their messages are for the user."""

from __future__ import annotations


class TrainingFailedError(RuntimeError):
    """The job cannot go on."""


class NonFiniteError(TrainingFailedError):
    """Loss or gradients are NaN or infinite; the step was not taken."""


class StoppedUnsavedError(TrainingFailedError):
    """The job was told to stop while checkpoints are off."""


class NotExportedError(TrainingFailedError):
    """The trained model could not be written in Hugging Face layout."""
