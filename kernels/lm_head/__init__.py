"""Linear LM head: log-probs of targets, and their CIPO loss."""

from .head import VocabShard
from .logprob import fused_linear_logprob
from .loss import LossOutput, fused_linear_cipo_loss
from .terms import k3

__all__ = ["LossOutput", "VocabShard", "fused_linear_cipo_loss", "fused_linear_logprob", "k3"]
