"""What keeps soft tokens useful: all codes are used, each token means few; after PUMIT's tokenizer.

https://github.com/function2-llx/PUMIT describes the terms; the code here is written from their formulas. Both take
logarithms of probabilities in float32, since those of probabilities themselves are lost where one underflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biovfm_monai import distributed

__all__ = ["code_entropy", "code_usage"]


def code_usage(log_probabilities: Tensor) -> Tensor:
    """Negative entropy, in nats, of the mean use of codes over images, positions and processes.

    It is least, at -ln(codes), where all codes are used alike.

    Args:
        log_probabilities: B x codes x ..., as from `log_softmax(1)`.
    """
    used = distributed.total(log_probabilities.float().exp().movedim(1, -1).flatten(0, -2).sum(0))
    share = used / used.sum()
    # The derivative of the logarithm is infinite at 0, and a code that nothing uses is just there.
    return (share * share.clamp(min=torch.finfo(share.dtype).tiny).log()).sum()


def code_entropy(log_probabilities: Tensor) -> Tensor:
    """Mean entropy of a token's distribution over codes, in nats; 0 where each token is one code.

    Args:
        log_probabilities: B x codes x ..., as from `log_softmax(1)`.
    """
    log_p = log_probabilities.float()
    return -(log_p.exp() * log_p).sum(1).mean()
