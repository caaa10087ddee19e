"""Weights that make up for what the layers before have lost.

Behind quantised layers a linear layer sees inputs y in place of the float model's x. The weight whose outputs on y are
nearest to W x is W mean(x y^T) mean(y y^T)^-1. It is what is rounded then, half way from W by default: all of it would
fit the calibration data too well.

Source: Arai and Ichikawa, Quantization Error Propagation, arXiv:2504.09629; Li et al., GPTAQ, arXiv:2504.02692.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: added to the moments' diagonal, as a share of its mean: directions that the data hardly show stay as they are
_DAMPING = 0.1


@torch.no_grad()
def corrected(w: Tensor, moments: Tensor, cross: Tensor, share: float) -> Tensor:
    """The weight on the way to the one with the nearest outputs.

    Args:
        w: float32 [N, K].
        moments: float32 [K, K], mean(y y^T) of the inputs y that the layer is given now.
        cross: float32 [K, K], mean(x y^T) for the float model's inputs x.
        share: how far to go, 0 .. 1.

    Returns:
        float32 [N, K].
    """
    h = moments.double()
    h.diagonal().add_(_DAMPING * float(h.diagonal().mean()) or 1.0)
    change = torch.linalg.solve(h, (cross.double() - moments.double()).T)
    return w + share * (w @ change.T.to(w.dtype))
