"""The decoder: a Llama-style transformer over packed documents, with an attention plan that can be swapped in place.

RMSNorm, SwiGLU, RoPE, grouped-query attention; tied embeddings, biases on q, k, v and QK-norm are options, so that
Llama-, Qwen- and SmolLM-shaped checkpoints fit, and so are layers without RoPE and key convolution. Parameters carry
the names of Hugging Face's LlamaForCausalLM. The model knows no stages: the training loop calls `set_attention` and
`set_rope`, which touch no parameter.

Shape suffixes: T tokens of a pack, C hidden size, V vocabulary rows.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import OFFLOAD_HEADS, OFFLOADED, ModelConfig, RopeConfig
from moba.attention import prepare
from moba.documents import Documents
from moba.kinds import AttentionSpec
from moba.layer import KVCache, LayerCache, MoBAAttention, RMSNorm
from moba.sequence import SequenceAxis
from train.model.loss import tiled_cross_entropy
from train.model.offload import HostBuffers, Inputs, mlp_with_residual, offloaded, tiled
from train.model.rope import Rope
from train.model.sizes import HEAD_GROUPS, head_dim, key_conv_widths, num_kv_heads, rope_layers

DRAWN_AHEAD = 2**30
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, ffn_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm (pre-norm) and added to the residual stream.

    With compile=True, the parts before and after attention are compiled; attention itself is not, since it depends on
    the documents. So a change of spec, RoPE or number of documents recompiles nothing. With a cache, or a key
    convolution over several processes, the part before attention runs eagerly.
    """

    def __init__(self, config: ModelConfig, index: int):
        """`index`: which layer of the model, from 0."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = MoBAAttention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads(config),
            head_dim(config),
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            rope=rope_layers(config)[index],
            key_conv=key_conv_widths(config)[index],
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.ffn_size)

        self.compiled = config.compile is True
        self.recomputes_mlp = config.activation_checkpointing == "mlp"
        self.tiles_mlp = config.activation_checkpointing in OFFLOADED
        self.groups_heads = config.activation_checkpointing == OFFLOAD_HEADS

    def forward(
        self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        if self.groups_heads and cache is None:
            return self._tiled_mlp(self._add_attention_by_groups(x_TC, cos_TD, sin_TD, documents))
        before = _compiled(_before_attention) if self.compiled else _before_attention
        after = _compiled(_after_attention) if self.compiled else _after_attention
        offset_T = self.self_attn.offsets(documents) if cache is None else None
        if cache is None and not self.self_attn.exchanges_keys:
            q_THD, k_TGD, v_TGD = before(self, x_TC, cos_TD, sin_TD, offset_T)
        else:
            q_THD, k_TGD, v_TGD = _before_attention(self, x_TC, cos_TD, sin_TD, offset_T, documents, cache)
        out_THD = self.self_attn.attend(q_THD, k_TGD, v_TGD, documents, cache)
        if self.tiles_mlp:
            return self._tiled_mlp(x_TC + self.self_attn.o_proj(out_THD.flatten(1)))
        return after(self, x_TC, out_THD)

    def _add_attention_by_groups(self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, documents: Documents) -> Tensor:
        """Attention added to the residual stream, a group of heads at a time."""
        normed_TC = self.input_layernorm(x_TC)
        for heads in self.self_attn.head_groups(HEAD_GROUPS):
            arguments = (normed_TC, cos_TD, sin_TD, documents, heads)
            if torch.is_grad_enabled():
                x_TC = x_TC + _recomputed(self.self_attn.of_heads, *arguments)
            else:
                x_TC = x_TC + self.self_attn.of_heads(*arguments)
        return x_TC

    def _tiled_mlp(self, x_TC: Tensor) -> Tensor:
        """The MLP added to the residual stream, a tile of tokens at a time."""
        norm, mlp = self.post_attention_layernorm, self.mlp
        half = functools.partial(_compiled(mlp_with_residual) if self.compiled else mlp_with_residual, eps=norm.eps)
        return tiled(half, x_TC, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)


# Functions, not methods, so that each is compiled once for all layers, whose weights become its arguments.


def _before_attention(
    layer: DecoderLayer, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, offset_T: Tensor | None, *past
) -> tuple[Tensor, Tensor, Tensor]:
    return layer.self_attn.project(layer.input_layernorm(x_TC), cos_TD, sin_TD, offset_T, *past)


def _after_attention(layer: DecoderLayer, x_TC: Tensor, out_THD: Tensor) -> Tensor:
    x_TC = x_TC + layer.self_attn.o_proj(out_THD.flatten(1))
    if layer.recomputes_mlp and torch.is_grad_enabled():
        # Inside the compiled function, so that only what the backward pass reads is recomputed.
        return _recomputed(_add_mlp, layer, x_TC)
    return _add_mlp(layer, x_TC)


def _add_mlp(layer: DecoderLayer, x_TC: Tensor) -> Tensor:
    return x_TC + layer.mlp(layer.post_attention_layernorm(x_TC))


def _recomputed(function: Callable, *arguments) -> Tensor:
    """The function's result, recomputed in the backward pass. Nothing here draws random numbers, so no generator state
    is kept."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """The function, compiled at its first call, and again with a symbolic T when T first changes."""
    return torch.compile(function)


class Backbone(nn.Module):
    """Everything below the output projection: tokens to normalised hidden states."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.activation_checkpointing = config.activation_checkpointing
        self._host = HostBuffers()

    def forward(self, tokens_T: Tensor, cos_TD, sin_TD, documents: Documents, cache: KVCache | None = None) -> Tensor:
        x_TC = self.embed_tokens(tokens_T)
        mode = self.activation_checkpointing if torch.is_grad_enabled() else False
        inputs = Inputs(self._host, x_TC.device) if mode in OFFLOADED else None
        for i, layer in enumerate(self.layers):
            if inputs is not None:
                x_TC = offloaded(layer, inputs, x_TC, cos_TD, sin_TD, documents)
            elif mode is True:
                x_TC = _recomputed(layer, x_TC, cos_TD, sin_TD, documents)
            else:
                x_TC = layer(x_TC, cos_TD, sin_TD, documents, None if cache is None else cache[i])
        return self.norm(x_TC)

    def attentions(self) -> Iterator[MoBAAttention]:
        """The attention module of each layer."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer.self_attn


class OutputProjection(nn.Module):
    """Hidden states to per-token losses, or to logits. A module of its own, so that ZeRO-3 gathers the weight around
    it, in the forward and the backward pass, also where it is tied to the embedding."""

    def __init__(self, hidden_size: int, vocab_size: int, tile: int, tied: nn.Parameter | None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, hidden_size) * 0.02) if tied is None else tied
        self.tile = tile

    def forward(self, hidden_TC: Tensor, labels_T: Tensor | None = None) -> Tensor:
        """Per-token losses, float32 `[T]`, 0 where ignored; without labels, logits `[T, V]` in the weight's dtype."""
        if labels_T is None:
            return F.linear(hidden_TC, self.weight)
        return tiled_cross_entropy(hidden_TC, self.weight, labels_T, self.tile)


class Decoder(nn.Module):
    """The language model. Starts with full attention in all layers, the model's own RoPE and arbitrary weights, to be
    loaded or set by `init_weights`."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        """`vocab_size` rows of the embedding, at least the tokenizer's size. ValueError for a RoPE scaling that is
        unknown."""
        super().__init__()
        self.config = config
        self.rope = Rope(config)
        self.axis: SequenceAxis | None = None
        self.model = Backbone(config, vocab_size)
        tied = self.model.embed_tokens.weight if config.tie_embeddings else None
        assert tied is None or isinstance(tied, nn.Parameter)
        self.lm_head = OutputProjection(config.hidden_size, vocab_size, config.loss_tile, tied)

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """The attention of each layer."""
        return tuple(attention.spec for attention in self.model.attentions())

    def set_attention(self, plan: Sequence[AttentionSpec]) -> None:
        """Gives each layer its attention from now on; no parameter is touched. ValueError unless there is one per
        layer."""
        if len(plan) != len(self.model.layers):
            raise ValueError(f"an attention plan of {len(plan)} layers for a model of {len(self.model.layers)}")
        for attention, spec in zip(self.model.attentions(), plan):
            attention.spec = spec

    def set_sequence_axis(self, axis: SequenceAxis | None) -> None:
        """Splits every pack over the processes of the axis from now on: each computes its slice of the tokens.

        All of them take whole packs and return whole results. ValueError if the axis splits heads and there are fewer
        heads than processes.
        """
        if axis is not None:
            axis.heads(*self._heads)
        self.axis = axis
        for attention in self.model.attentions():
            attention.axis = axis

    @property
    def _heads(self) -> tuple[int, int]:
        return self.config.num_heads, num_kv_heads(self.config)

    def prepare_attention(self, longest: int, device: torch.device) -> None:
        """Does now what attention would do at its first documents of up to `longest` tokens."""
        empty = torch.empty(0, head_dim(self.config), dtype=self.lm_head.weight.dtype, device=device)
        own = self._heads if self.axis is None else self.axis.heads(*self._heads)
        q, k = (empty[:, None].expand(-1, heads, -1) for heads in own)
        prepare(self.attention, q, k, longest)

    def set_rope(self, stage: RopeConfig | None) -> None:
        """Puts a stage's RoPE changes (None: none) on top of the model's own from now on; no parameter is touched."""
        self.rope = Rope(self.config, stage)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, labels_T: Tensor) -> Tensor:
        """Per-token loss of a pack in nats: float32 `[T]`, 0 where the label is -100.

        tokens, positions (0-based in the document or window) and labels (already shifted) are int64 `[T]`; documents do
        not attend to each other. Logits of all tokens never exist at once.
        """
        hidden_TC = self._hidden(tokens_T, positions_T, documents, None)
        if self.axis is None:
            return self.lm_head(hidden_TC, labels_T)
        return self.axis.join(self.lm_head(hidden_TC, self.axis.own(labels_T)), len(labels_T))

    def logits(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        documents: Documents,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, `[T, V]` in the weights' dtype, or `[len(rows), V]` for the tokens `rows` alone.

        With a cache, the tokens of document i continue cached sequence i (positions too) and are added to it. `rows`
        (int64) saves the unused logits of a long prompt. No cache over several processes.
        """
        assert self.axis is None or cache is None, "decoding over several processes"
        hidden_TC = self._hidden(tokens_T, positions_T, documents, cache)
        if self.axis is not None:
            hidden_TC = self.axis.join(hidden_TC, len(tokens_T))
        return self.lm_head(hidden_TC if rows is None else hidden_TC[rows])

    def _hidden(self, tokens_T: Tensor, positions_T: Tensor, documents: Documents, cache: KVCache | None) -> Tensor:
        """`[T, C]` after the last norm, of this process's slice if there are several. Angles are computed once for all
        layers, in float32 whatever the weights are."""
        if self.axis is not None:
            tokens_T, positions_T = self.axis.own(tokens_T), self.axis.own(positions_T)
        cos_TD, sin_TD = self.rope.cos_sin(positions_T, torch.float32, tokens_T.device)
        return self.model(tokens_T, cos_TD, sin_TD, documents, cache)

    @torch.no_grad()
    def init_weights(self, seed: int, threads: int = 1) -> None:
        """Gives all parameters their `initial_value`."""
        parameters = list(self.named_parameters())
        shapes = [(name, tuple(parameter.shape)) for name, parameter in parameters]
        for (_, parameter), value in zip(parameters, self.initial_values(shapes, seed, threads), strict=True):
            parameter.copy_(value)

    def initial_values(
        self, shapes: Sequence[tuple[str, tuple[int, ...]]], seed: int, threads: int = 1
    ) -> Iterator[Tensor]:
        """Yields the `initial_value` of each (name, shape), in order. `threads` draw ahead, up to DRAWN_AHEAD bytes:
        one thread draws some 50 million numbers per second."""
        waiting: deque[Future[Tensor]] = deque()
        sizes = deque(4 * math.prod(shape) for _, shape in shapes)
        with ThreadPoolExecutor(threads) as pool:
            held, ahead = 0, 0
            for _ in shapes:
                while ahead < len(shapes) and (not waiting or held + sizes[len(waiting)] <= DRAWN_AHEAD):
                    held += sizes[len(waiting)]
                    waiting.append(pool.submit(self.initial_value, *shapes[ahead], seed))
                    ahead += 1
                yield waiting.popleft().result()
                held -= sizes.popleft()

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """A parameter's initial value, float32 on the CPU: matrices normal with `init_std`, those that write into the
        residual stream with init_std / sqrt(2 * num_layers) (GPT-2's rule: the stream then starts at the same scale at
        any depth), norms 1, biases 0, key convolutions 0, which leaves the keys as they are (the paper does not say;
        this project's choice).

        Each parameter has a generator of its own, seeded by `seed` and its name: the values depend on nothing else, not
        on world size, device or the order of construction.
        """
        if name.endswith(("bias", "k_conv.weight")):
            return torch.zeros(shape)
        if len(shape) < 2:
            return torch.ones(shape)
        std = self.config.init_std
        if name.endswith(RESIDUAL_OUTPUTS):
            std /= (2 * self.config.num_layers) ** 0.5
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.empty(shape).normal_(0.0, std, generator=generator)
