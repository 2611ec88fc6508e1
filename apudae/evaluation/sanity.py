"""Defenses known to be broken, to try an attack suite on."""

from torch import Tensor, nn

from ..contracts import check_whole


class Quantised(nn.Module):
    """A defense known to be broken, to try attackers on: images in `levels` grey values; rounding has no gradient."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        check_whole(2, levels=levels)
        self.levels = levels

    def extra_repr(self) -> str:
        return f"levels={self.levels}"

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)
