"""Purification by gradient steps on the image (section 2.3, Eq. 2): configuration, purifier, steps, trajectory."""

from .config import PRESETS, PurifyConfig, preset
from .purifier import MeanOfDraws, Purifier, purify
from .trajectory import Step, trajectory

__all__ = ["PRESETS", "MeanOfDraws", "Purifier", "PurifyConfig", "Step", "preset", "purify", "trajectory"]
