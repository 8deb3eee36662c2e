"""The output head of the language model, which can give the loss of its rows without all their logits.

Shapes: N rows, D width, V vocabulary (this rank's share of it, where it is divided).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mmscale.kernels.linear_cross_entropy import MEMORY_BYTES, VocabRanks, linear_cross_entropy_sum


@dataclass(frozen=True, slots=True)
class LossOptions:
    """See `z_loss` and `memory_bytes` of `linear_cross_entropy_sum`."""

    z_loss: float = 0.0
    memory_bytes: int = MEMORY_BYTES


class LossHead(nn.Linear):
    """A linear head that gives logits or, with labels, the sum of their losses.

    Both are calls of the module: engines that gather and free the weight at calls find it. It takes over the parameters it is
    given, under the names of any linear layer. The z-loss is part of the loss in training mode and not in evaluation mode:
    validation losses stay comparable whatever was added in training.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, options: LossOptions, ranks: VocabRanks | None = None
    ) -> None:
        """`ranks`: those among which the vocabulary is divided; `weight` and `bias` are then this rank's rows."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        self.options, self.ranks = options, ranks

    def forward(self, hidden_ND: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """Logits [..., V] of `hidden_ND` [..., D] or, with labels, the sum of the losses of its N rows: `linear_cross_entropy_sum`."""
        if labels_N is None:
            return F.linear(hidden_ND, self.weight, self.bias)
        options = self.options
        return linear_cross_entropy_sum(
            *(hidden_ND, self.weight, labels_N),
            bias_V=self.bias,
            z_loss=options.z_loss if self.training else 0.0,
            memory_bytes=options.memory_bytes,
            ranks=self.ranks,
        )


def put_loss_head(llm: PreTrainedModel, options: LossOptions) -> None:
    """Puts a `LossHead` with the same parameters in the place of the head of `llm`; it must be a plain linear layer."""
    head = llm.get_output_embeddings()
    assert type(head) in (nn.Linear, LossHead), f"{llm.config.model_type} has a {type(head).__name__} as its head"
    llm.set_output_embeddings(LossHead(head.weight, head.bias, options).train(head.training))


def loss_head(llm: PreTrainedModel) -> LossHead:
    """The head that `put_loss_head` has put there, or its tensor-parallel part."""
    head = llm.get_output_embeddings()
    assert isinstance(head, LossHead), "`put_loss_head` was called"
    return head
