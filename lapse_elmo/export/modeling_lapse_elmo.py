"""The model code of a lapse-elmo Hugging Face directory; it needs only torch and transformers.

An ELMo over words (Peters et al. 2018, with a table of word vectors instead of the character CNN): two stacks of LSTMs
with projection, one forward and one backward. With gates i, f, g, o, a layer computes

    c = clip(i * g + f * c'),    h = clip(P (o * tanh(c))),

and from the second layer on adds its input to its output. The ids are 0 for padding, 1 for ``<S>``, 2 for ``</S>``, 3
for ``<UNK>``, followed by the words. The models add ``<S>`` before and ``</S>`` after a sentence if they are missing,
and remove these positions from their outputs.

Shapes: B sentences, T positions, D projection size, C cell size, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

BEGIN, END = 1, 2


class LapseElmoConfig(PretrainedConfig):
    """Configuration: D ``projection_size``, C ``cell_size``, L ``num_layers``; ``vocab_size`` includes padding."""

    model_type = "lapse_elmo"

    def __init__(
        self,
        vocab_size: int = 4,
        projection_size: int = 128,
        cell_size: int = 512,
        num_layers: int = 2,
        cell_clip: float = 3.0,
        projection_clip: float = 3.0,
        context: str = "top",
        boundaries: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.projection_size, self.cell_size, self.num_layers = projection_size, cell_size, num_layers
        self.cell_clip, self.projection_clip = cell_clip, projection_clip
        self.context, self.boundaries = context, boundaries
        self.hidden_size = 2 * projection_size
        self.num_hidden_layers = num_layers
        kwargs.setdefault("pad_token_id", 0)
        kwargs.setdefault("bos_token_id", BEGIN)
        kwargs.setdefault("eos_token_id", END)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("use_cache", False)
        super().__init__(**kwargs)


class LapseElmoCell(nn.Module):
    """One LSTM layer in one direction."""

    def __init__(self, config: LapseElmoConfig) -> None:
        super().__init__()
        size, cell = config.projection_size, config.cell_size
        self.cell_clip, self.projection_clip = config.cell_clip, config.projection_clip
        self.input_linearity = nn.Linear(size, 4 * cell, bias=False)
        self.state_linearity = nn.Linear(size, 4 * cell)
        self.state_projection = nn.Linear(cell, size, bias=False)

    def forward(self, inputs: Tensor, mask: Tensor, backward: bool) -> Tensor:
        """Return the outputs (B, T, D).

        Args:
            inputs: (B, T, D).
            mask: (B, T) bool; at false positions the state does not change and the output is zero.
            backward: Whether to read from the last position to the first.
        """
        products = self.input_linearity(inputs)
        hidden = inputs.new_zeros(len(inputs), inputs.shape[2])
        cell = inputs.new_zeros(len(inputs), self.state_projection.in_features)
        outputs = [hidden] * inputs.shape[1]
        steps = range(inputs.shape[1])
        for step in reversed(steps) if backward else steps:
            i, f, g, o = (products[:, step] + self.state_linearity(hidden)).chunk(4, 1)
            new_cell = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * cell
            if self.cell_clip:
                new_cell = new_cell.clamp(-self.cell_clip, self.cell_clip)
            new_hidden = self.state_projection(torch.sigmoid(o) * torch.tanh(new_cell))
            if self.projection_clip:
                new_hidden = new_hidden.clamp(-self.projection_clip, self.projection_clip)
            here = mask[:, step, None]
            cell, hidden = torch.where(here, new_cell, cell), torch.where(here, new_hidden, hidden)
            outputs[step] = torch.where(here, new_hidden, torch.zeros_like(new_hidden))
        return torch.stack(outputs, 1)


class LapseElmoLstm(nn.Module):
    """The forward and the backward stack of layers."""

    def __init__(self, config: LapseElmoConfig) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        for layer in range(config.num_layers):
            for direction in ("forward", "backward"):
                self.add_module(f"{direction}_layer_{layer}", LapseElmoCell(config))

    def forward(self, inputs: Tensor, mask: Tensor, direction: str) -> list[Tensor]:
        """Return the input and each layer's output (B, T, D) of one direction."""
        layers = [inputs]
        for layer in range(self.num_layers):
            output = self.get_submodule(f"{direction}_layer_{layer}")(layers[-1], mask, direction == "backward")
            layers.append(output + layers[-1] if layer else output)
        return layers


class LapseElmoMix(nn.Module):
    """Learned weighted sum of all layers, which predicts words in models trained with ``--context mix``."""

    def __init__(self, config: LapseElmoConfig) -> None:
        super().__init__()
        self.scalars = nn.Parameter(torch.zeros(config.num_layers + 1))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, layers: list[Tensor]) -> Tensor:
        """Return the weighted sum of tensors of the same shape (B, T, D)."""
        return (torch.softmax(self.scalars, 0) * self.gamma).view(-1, 1, 1, 1).mul(torch.stack(layers)).sum(0)


class LapseElmoPreTrainedModel(PreTrainedModel):
    """Base class of the models: parameters, initialization and sentence boundaries."""

    config_class = LapseElmoConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["LapseElmoCell"]  # noqa: RUF012 (transformers' own convention)

    def __init__(self, config: LapseElmoConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.projection_size, padding_idx=0)
        self.lstm = LapseElmoLstm(config)
        self.mix = LapseElmoMix(config) if config.context == "mix" else None
        self.softmax = nn.Linear(config.projection_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the softmax layer."""
        return self.softmax

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the softmax layer."""
        self.softmax = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)

    def _add_boundaries(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and mask with a column before and after; its mask is false where a sentence has the boundary."""
        mask = (input_ids != self.config.pad_token_id) if attention_mask is None else attention_mask.bool()
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        begins = ((input_ids == BEGIN) & mask & (mask.cumsum(1) == 1)).any(1)
        last = (mask * positions).amax(1, keepdim=True) == positions
        ends = ((input_ids == END) & mask & last).any(1)
        column = torch.ones_like(input_ids[:, :1])
        ids = torch.cat([column * BEGIN, input_ids, column * END], 1)
        used = torch.full_like(begins, self.config.boundaries)
        return ids, torch.cat([(used & ~begins)[:, None], mask, (used & ~ends)[:, None]], 1)


class LapseElmoModel(LapseElmoPreTrainedModel):
    """The model that returns the contextual vectors of words."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Return the contextual vectors.

        ``last_hidden_state`` (B, T, 2D) is the top layer, forward before backward. ``hidden_states`` are all L + 1
        layers, of which the first is the word embedding concatenated with itself.
        """
        ids, mask = self._add_boundaries(input_ids, attention_mask)
        tokens = self.embedding(ids)
        directions = (self.lstm(tokens, mask, direction) for direction in ("forward", "backward"))
        layers = tuple(torch.cat(both, 2)[:, 1:-1] for both in zip(*directions, strict=True))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if return_dict is False:
            return (layers[-1], layers) if wanted else (layers[-1],)
        return BaseModelOutput(last_hidden_state=layers[-1], hidden_states=layers if wanted else None)


class LapseElmoForCausalLM(LapseElmoPreTrainedModel, GenerationMixin):
    """The forward direction as a language model; the logits at a word predict the next word."""

    #: The loss is the mean of its own batch, so the Trainer has to divide it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pass all ids at every step, since there is no cache."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Return ``logits`` (B, T, vocab_size) and, if ``labels`` (B, T) are given, ``loss`` in nats per target.

        Labels of -100 are ignored.
        """
        ids, mask = self._add_boundaries(input_ids, attention_mask)
        layers = self.lstm(self.embedding(ids), mask, "forward")
        context = (layers[-1] if self.mix is None else self.mix(layers))[:, 1:-1]
        logits = self.softmax(context)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        hidden = tuple(layer[:, 1:-1] for layer in layers) if output_hidden_states else None
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=hidden)
