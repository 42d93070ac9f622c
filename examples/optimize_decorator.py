"""`optimize` as a decorator: on a function of tensors, on a module class, with and without brackets.

python -m examples.optimize_decorator
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from torchweld import optimize


@optimize
def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x gate) * (x up): x [..., K], gate and up [K, N] -> [..., N]."""
    return nn.functional.silu(x @ gate) * (x @ up)


@optimize(verify=1)
class Block(nn.Module):
    """Normalize, widen, narrow, add: [B, T, 64] -> the same. `verify=1` compares the result with float64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [B, T, 64]."""
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


def main() -> None:
    """Call both at two sizes; the second size compiles nothing."""
    torch.manual_seed(0)
    block = Block().eval()
    with torch.no_grad():
        for batch, length in ((2, 10), (1, 3)):
            x = torch.randn(batch, length, 64)
            print("gated", tuple(gated(x, torch.randn(64, 32), torch.randn(64, 32)).shape))
            print("block", tuple(block(x).shape))
    # mypy does not see what a class decorator adds.
    print(cast(Any, block).report.to_markdown())


if __name__ == "__main__":
    main()
