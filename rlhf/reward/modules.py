"""The networks of reward and preference models: from token ids to a few numbers for each text. No tokenizers, no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Pooling = Literal["mean", "last"]


class EncoderWithHead(torch.nn.Module):
    """An encoder whose pooled hidden states a linear head turns into the outputs for a text."""

    def __init__(self, encoder: torch.nn.Module, layers: Sequence[int], pooling: Pooling, outputs: int = 1):
        super().__init__()
        self.encoder, self.layers, self.pooling = encoder, tuple(layers), pooling
        self.head = torch.nn.Linear(len(self.layers) * encoder.config.hidden_size, outputs)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n, n_layers * hidden], fp32, from right-padded ids and mask [n, n_tokens]."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = [output.hidden_states[layer] for layer in self.layers]
        lengths = attention_mask.sum(1, keepdim=True)
        if self.pooling == "last":
            rows = torch.arange(len(lengths))
            return torch.cat([layer[rows, lengths[:, 0] - 1] for layer in states], dim=1).float()
        shares = (attention_mask / lengths)[:, None]  # as a product, no masked copy of the states is made
        return torch.cat([shares @ layer.float() for layer in states], dim=2)[:, 0]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n, outputs]."""
        return self.head(self.features(input_ids, attention_mask))


class Classifier(torch.nn.Module):
    """A transformers sequence classifier.

    Where its head gives logits for every token (a causal model's does), those of the last one are taken here: transformers itself
    looks for the last one that is no padding by its id, which a text may hold as well.

    Args:
        log_odds: of a classifier with two labels: the second's log-odds are its one output. Otherwise the logits are its outputs.
        passed_over: the token id that the folder's configuration calls padding: transformers, given one text, looks for the last
            token that is another one. None: there is none, so the last token counts, whatever it is.
    """

    def __init__(self, model: torch.nn.Module, log_odds: bool = False, passed_over: int | None = None):
        super().__init__()
        self.model, self.log_odds, self.passed_over = model, log_odds, passed_over

    @property
    def head(self) -> torch.nn.Linear:
        """The linear layer that makes the logits, whatever the architecture calls it."""
        width = self.model.config.num_labels
        return [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == width][-1]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n, outputs], fp32, from right-padded ids and mask [n, n_tokens]."""
        made: list[torch.Tensor] = []
        hook = self.head.register_forward_hook(lambda head, args, output: made.append(output))
        try:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        finally:
            hook.remove()
        if made[-1].dim() == 3:
            logits = made[-1][
                torch.arange(len(input_ids), device=input_ids.device), self._last(input_ids, attention_mask)
            ]
        logits = logits.float()
        return logits[:, 1:] - logits[:, :1] if self.log_odds else logits

    def _last(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n], position of the token that is read; 0 where a text holds none but what is passed over, as in transformers."""
        counted = attention_mask.bool()
        if self.passed_over is not None:
            counted = counted & (input_ids != self.passed_over)
        return (torch.arange(input_ids.shape[1], device=input_ids.device) * counted).argmax(1)


class CumulativeLogits(torch.nn.Module):
    """A scorer with the thresholds of ordinal ratings, while it is trained.

    The thresholds rise by construction: the first is free, each gap is a softplus.

    Args:
        scorer: gives a reward r, [n, 1].
        thresholds: to start from, rising, [K - 1].
    """

    def __init__(self, scorer: torch.nn.Module, thresholds: torch.Tensor):
        super().__init__()
        self.scorer = scorer
        self.first = torch.nn.Parameter(thresholds[:1].clone())
        self.gaps = torch.nn.Parameter(torch.log(torch.expm1(thresholds.diff())))

    @property
    def head(self) -> torch.nn.Linear:
        return self.scorer.head

    def thresholds(self) -> torch.Tensor:
        return torch.cat([self.first, self.first + torch.nn.functional.softplus(self.gaps).cumsum(0)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """z_k = r - threshold_k, so that P(level > k) = sigmoid(z_k); [n, K - 1]."""
        return self.scorer(input_ids=input_ids, attention_mask=attention_mask) - self.thresholds()


def parts(module: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """A module's weights but the head's, and the head's (with thresholds): what a new head learns faster."""
    head = list(module.head.parameters())
    if isinstance(module, CumulativeLogits):
        head += [module.first, module.gaps]
    own = {id(parameter) for parameter in head}
    return [parameter for parameter in module.parameters() if id(parameter) not in own], head


def start_head(head: torch.nn.Linear) -> None:
    """A new head starts small: N(0, 1 / (h + 1)) for h features (Stiennon et al. 2020), and a bias of 0."""
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)


def split_embedding(outputs: torch.Tensor, dimensions: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A GPM's unit embeddings [n, 2k], and its gates [n, k] if its outputs are wider than that."""
    gates = None
    if outputs.shape[1] > dimensions:
        gates = torch.softmax(outputs[:, dimensions:], dim=1) * (dimensions // 2)
    return torch.nn.functional.normalize(outputs[:, :dimensions], dim=1), gates


def skew_symmetric_score(first: torch.Tensor, second: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """GPM's score s(i beats j) = <R v_i, v_j> = sum_l lambda_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l]), one per pair.

    R has the blocks [[0, -1], [1, 0]] (Zhang et al. 2024, "Beyond Bradley-Terry models: a general preference model", section
    4). Swapping the responses changes the sign. With v = [r, 1] it is r_i - r_j, the Bradley-Terry model.

    Args:
        first, second: embeddings v_i and v_j, [n_pairs, 2k].
        gate: lambda, at least 0, [n_pairs, k]; None: all 1.
    """
    areas = first[:, 0::2] * second[:, 1::2] - first[:, 1::2] * second[:, 0::2]
    return (areas if gate is None else gate * areas).sum(1)
