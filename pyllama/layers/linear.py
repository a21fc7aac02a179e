"""A linear layer: torch's, with the project's product."""

from __future__ import annotations

from torch import Tensor, nn

from pyllama.ops.product import product


class Linear(nn.Linear):
    def forward(self, x_TD: Tensor) -> Tensor:
        return product(x_TD, self.weight, self.bias)
