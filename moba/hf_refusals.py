"""What of a transformers model cannot be MoBA's, said by name: before a model is switched, and in each forward pass.

transformers itself does not refuse: a model that does not follow its attention interface takes
`attn_implementation="moba"` and attends as it always did, or without its causal mask. So a model that is made with it,
or switched to it, is looked at (`watch`), and a language model has to have reached MoBA's attention in its forward
pass.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from moba.hf_layout import OTHERWISE, REFUSES, TokenLayout

INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("
OWN_CLASSES = re.compile(r"\[config\._attn_implementation\]")
"""Attention that is looked up in a table of the model's own."""
# Arguments some models pass to their attention, which MoBA would have to ignore.
UNSUPPORTED = {
    "softcap": "caps its scores",
    "s_aux": "has attention sinks",
    "sinks": "has attention sinks",
    "indices": "picks the keys of each query itself",
    "position_bias": "adds a position bias to its scores",
    "cache": "runs with a paged cache (continuous batching)",
}


# -------------------- models


def refuse_unless_it_follows(model: PreTrainedModel) -> None:
    """Raises ValueError for a language model whose class does not take its attention from transformers' interface.

    Models of images and sound, and those that hold a language model of another class, may have any attention.
    """
    config = model.config
    if not hasattr(config, "vocab_size") or type(config.get_text_config(decoder=True)) is not type(config):
        return
    module = sys.modules.get(type(model).__module__)
    try:
        source = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):  # a class without a file: what it reaches is seen in its forward pass
        return
    own = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE) and INTERFACE not in source
    if own or OWN_CLASSES.search(source):
        raise ValueError(
            f"{type(model).__name__}: {REFUSES} models with an attention of their own, which do not follow "
            f"transformers' attention interface{OTHERWISE}"
        )


def refuse_unless_switched(model: nn.Module, name: str) -> None:
    """Raises ValueError if a language model in it kept another attention, as one with a config of its own may."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "vocab_size"):
            kept = module.config._attn_implementation
            if kept != name:
                raise ValueError(
                    f"{type(module).__name__} in {type(model).__name__} stays at attn_implementation={kept!r} where "
                    f"transformers sets the whole to {name!r}: {REFUSES} such models{OTHERWISE}"
                )


def watch_all(model: nn.Module, name: str) -> None:
    """Watches a model and those in it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            watch(module, name)


def watch(model: PreTrainedModel, name: str) -> None:
    """Refuses a model that cannot run the attention `name`, and has the inputs of its forward passes checked."""
    if any(isinstance(hook, InputsCheck) for hook in model._forward_pre_hooks.values()):
        return
    refuse_unless_it_follows(model)
    inputs = InputsCheck(name)
    model.register_forward_pre_hook(inputs, with_kwargs=True)
    if isinstance(model, GenerationMixin):
        model.register_forward_hook(_Reached(inputs))


def watch_what_is_made(name: str) -> None:
    """Watches every transformers model that is made with this attention from now on."""

    def on_registration(module: nn.Module, _name: str, _submodule: nn.Module | None) -> None:
        if isinstance(module, PreTrainedModel) and getattr(module.config, "_attn_implementation", None) == name:
            watch(module, name)

    torch.nn.modules.module.register_module_module_registration_hook(on_registration)


class Calls:
    """How often MoBA's attention was called in this process."""

    number = 0


class InputsCheck:
    """Forward pre-hook of a model: refuses a 2-D attention_mask that would be read as something else."""

    def __init__(self, name: str):
        self.name = name
        self.calls_before = -1

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(model.config, "_attn_implementation", None) != self.name:
            return
        self.calls_before = Calls.number
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            names = list(inspect.signature(model.forward).parameters)
            mask = dict(zip(names, args)).get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype != torch.bool:
            refuse_mask_values(mask)


class _Reached:
    """Forward hook of a language model: MoBA's attention was called in its forward pass."""

    def __init__(self, inputs: InputsCheck):
        self.inputs = inputs

    def __call__(self, model: nn.Module, _args: tuple, _outputs: Any) -> None:
        if (
            self.inputs.calls_before == Calls.number
            and getattr(model.config, "_attn_implementation", None) == self.inputs.name
        ):
            raise ValueError(
                f"{type(model).__name__}: {REFUSES} models of which no layer attends through transformers' attention "
                f"interface{OTHERWISE}"
            )


def refuse_mask_values(mask: Tensor) -> None:
    """Raises ValueError for a 2-D mask of other values than 0 and 1, or of floats that all are 0: transformers takes
    all but 0 for true. Reads it on the host."""
    other = mask[(mask != 0) & (mask != 1)]
    if other.numel():
        raise ValueError(
            f"attention_mask has values such as {other[0].item():g}: attn_implementation='moba' needs 1 for real "
            "tokens and 0 for padding; documents are told by position_ids that start anew, "
            "without attention_mask, and with use_cache=False"
        )
    if mask.is_floating_point() and mask.numel() and not bool(mask.any()):
        raise ValueError(
            f"attention_mask of {mask.dtype} holds zeros only, as if to be added to scores: "
            "attn_implementation='moba' needs 1 for real tokens and 0 for padding"
        )


# -------------------- calls


def refuse_unsupported(module: nn.Module, mask: Any, dropout: float, size: tuple[int, int, int], kwargs: dict) -> None:
    """Raises ValueError, by name, for what attention is asked to do beyond causal attention over packed documents.

    `size`: rows, queries and keys per row.
    """
    problem = None
    window = kwargs.get("sliding_window")
    if isinstance(mask, TokenLayout) and mask.problem:
        raise ValueError(mask.problem)
    if dropout:
        problem = f"dropout={dropout}: set config.attention_dropout to 0"
    elif kwargs.get("output_attentions"):
        problem = f"output_attentions=True: attention weights are never formed{OTHERWISE}"
    elif window is not None and window < size[2]:
        problem = f"sliding_window={window} with {size[2]} keys: set config.sliding_window to None before loading"
    elif mask is not None and not isinstance(mask, TokenLayout):
        problem = f"an attention_mask of shape {list(mask.shape)}: give the model a 2-D mask, 1 for real tokens"
    elif kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        problem = f"is_causal=False: MoBA is causal{OTHERWISE}"
    elif mask is not None and mask.size not in (None, size):
        problem = f"rows, queries and keys {list(size)} with a mask made for {list(mask.size)}{OTHERWISE}"
    blocks = kwargs.get("block_indices")
    if blocks is not None and blocks.shape[-1] * getattr(module.config, "index_block_size", 0) < size[2]:
        problem = f"block_indices: the model picks the blocks of each query itself{OTHERWISE}"
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            problem = f"{name}: the model {what}{OTHERWISE}"
    if problem:
        raise ValueError(f"{REFUSES} {problem}")


def refuse_ignored_packing(positions: Tensor | None, layout: TokenLayout | None) -> None:
    """Raises ValueError if positions [B, Q] start anew within a row that is taken for one document.

    Reads them on the host, once for all layers that share a layout.
    """
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2:
        return
    if layout is not None and (layout.is_packed or "positions" in layout.seen):
        return
    anew_BQ = positions.diff(dim=1) != 1
    if layout is not None:
        layout.seen.add("positions")
        if layout.real_BS is not None:  # padding has any position, and a step over it is one of any size
            real_BQ = layout.real_BS[:, -positions.shape[1] :].to(positions.device)
            anew_BQ = (positions.diff(dim=1) < 1) & real_BQ[:, 1:] & real_BQ[:, :-1]
    if bool(anew_BQ.any()):
        raise ValueError(
            "position_ids start anew within a row, but with attention_mask or a cache transformers does not take that "
            "for packed documents: with attn_implementation='moba' pass use_cache=False and no attention_mask, or "
            "cu_seq_lens_q and cu_seq_lens_k"
        )
