"""The training loop: schedule, trainer, what comes after the last step."""
