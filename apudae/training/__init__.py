"""Training of autoencoders and classifiers: the loop, its objectives, several processes, its state on disk."""

from .distributed import in_processes
from .loop import Recipe, fit
from .objectives import train_adversarial, train_classifier, train_dae

__all__ = ["Recipe", "fit", "in_processes", "train_adversarial", "train_classifier", "train_dae"]
