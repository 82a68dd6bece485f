"""Conversations to tokens and a mask that says which of them are supervised: every assistant turn, and nothing else.

A conversation is rendered by a chat template (jinja, as Hugging Face tokenizers carry it). Supervised are the text of
each assistant turn and the token that ends it; headers, system prompts, users' turns and line breaks behind the end of
a turn are not. Where a template marks `{% generation %}` blocks, these are what is supervised. Elsewhere turns are
found by rendering the conversation up to the turn with the generation prompt, and up to its end: both have to be
beginnings of the whole, or the template is refused, since a mask would be a guess.

The rendering is cut at the ends of what is supervised and each part is tokenised on its own, so a prompt has the tokens
that it has at inference. Special tokens that the template writes become their ids; those that a message merely spells
become the characters they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np

from conf.files import read_text, user_path
from conf.words import cut, first_line
from data.conversations import LEARN
from data.errors import DataError
from data.tokenizer import Tokenizer

Message = Mapping[str, Any]

NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # For any tokenizer: roles in words, EOS behind an answer.
    "plain": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token + '\\n' }}"
        "{% else %}{{ message.role | capitalize + ': ' + message.content + '\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
# What a template's own expressions can raise beside jinja's errors.
TEMPLATE_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
# Unicode's noncharacters: no text has them, so they can mark places in a rendering.
BEGIN, END, BROKEN = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = dict.fromkeys(map(ord, (BEGIN, END, BROKEN)))


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: its output between BEGIN and END."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return BEGIN + caller() + END


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: text and names alone, so that it can be sent to another process."""

    name: str
    """As the user gave it."""
    source: str
    """The jinja text."""
    variables: tuple[tuple[str, str], ...] = ()
    """bos_token, eos_token and the like."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that a rendering depends on beside the messages."""
        return hashlib.sha256(repr((self.source, self.variables)).encode()).hexdigest()[:16]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # Not Hugging Face's own environment: it has the date of today in it (strftime_now), which would make other
        # tokens tomorrow. Templates that ask whether it is defined fall back to a fixed date.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self.source)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as text, marks of generation blocks included. DataError with the template's own message."""
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        given |= {} if tools is None else {"tools": list(tools)}
        try:
            return self._compiled.render(**given, **dict(self.variables))
        except (jinja2.TemplateError, *TEMPLATE_ERRORS) as error:
            what = type(error).__name__ if isinstance(error, RecursionError | MemoryError) else first_line(error)
            raise DataError(f"chat template {self.name!r} cannot render it: {what}") from error


def _raise(message: str):
    raise jinja2.TemplateError(message)


def load_template(name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template called `name` (chatml, llama3, plain, or the path of a jinja file), or the tokenizer's own for
    None. Raises DataError if there is none, or the tokenizer lacks the special tokens of a named one."""
    variables = tuple(sorted(tokenizer.named_tokens.items()))
    if name is None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer {tokenizer.name!r} has no chat template of its own: set data.chat_template to "
                f"{', '.join(NAMED)}, or a jinja file"
            )
        return ChatTemplate(f"that of {tokenizer.name}", tokenizer.chat_template, variables)
    if name in NAMED:
        missing = sorted(set(re.findall(r"<\|\w+\|>", NAMED[name])) - tokenizer.special_tokens.keys())
        if missing:
            raise DataError(
                f"data.chat_template={name}: tokenizer {tokenizer.name!r} has no special token {', '.join(missing)}. "
                "Use plain, the tokenizer's own template (null), or a tokenizer that has them"
            )
        return ChatTemplate(name, NAMED[name], variables)
    path = user_path(name)
    if not path.is_file():
        raise DataError(f"data.chat_template={cut(name)!r}: no such file. Choose {', '.join(NAMED)}, or a jinja file")
    remedy = f"data.chat_template takes {', '.join(NAMED)}, or a jinja file"
    template = ChatTemplate(name, read_text(path, error=DataError, remedy=remedy), variables)
    try:
        template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except DataError as error:
        raise DataError(f"data.chat_template={name!r}: {error}") from error
    return template


class ChatEncoder:
    """Turns conversations into tokens and masks. Raises DataError for a tokenizer that cannot encode parts of a text
    one by one."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else None
        parts = ("a b\n", "c d", "\n\ne")
        joined = np.concatenate([self._ids(part) for part in parts])
        if tokenizer.decode(joined) != tokenizer.decode(tokenizer.encode("".join(parts))):
            raise DataError(
                f"tokenizer {tokenizer.name!r} puts a token before every text, so the parts of a conversation cannot "
                "be tokenised one by one and its answers not be masked exactly; use a byte-level tokenizer"
            )

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(tokens in the tokenizer's dtype, bool mask), both [n]; a token is supervised where the mask is True.

        Raises DataError if the template cannot render the conversation or its turns cannot be told apart exactly.
        """
        ids = [(self._ids(text), supervised) for text, supervised in self.parts(messages, tools)]
        tokens = np.concatenate([np.zeros(0, self.tokenizer.dtype), *(part for part, _ in ids)])
        return tokens, np.concatenate(
            [np.zeros(0, bool), *(np.full(len(part), supervised) for part, supervised in ids)]
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation that the assistant is to go on with."""
        guarded = self._guarded(messages)
        return self._ids(_unmarked(self.template.render(guarded, add_generation_prompt=True))[0]).tolist()

    def end_of_turn(self) -> int:
        """The token that ends an answer, for generation to stop at."""
        tokens, supervised = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return int(tokens[np.flatnonzero(supervised)[-1]])

    def parts(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[tuple[str, bool]]:
        """The rendered conversation in parts (text, supervised); joined, they are the rendering of the whole.

        A message with `learn` false is not supervised.
        """
        guarded, tools = self._guarded(messages), self._guarded(tools)
        whole, spans = _unmarked(self.template.render(guarded, tools=tools))
        if not spans:
            spans = self._turns(guarded, whole, tools)
        flags = [one.get(LEARN, True) for one in messages if one["role"] == "assistant"]
        if not all(flags):
            if len(spans) != len(flags):
                raise DataError(
                    f"chat template {self.template.name!r} marks {len(spans)} answers of {len(flags)}, so those that "
                    "are not to be supervised (weight, train) cannot be told from the others"
                )
            spans = [span for span, is_supervised in zip(spans, flags) if is_supervised]
        parts, done = [], 0
        for begin, end in spans:
            parts += [(whole[done:begin], False), (whole[begin:end], True)]
            done = end
        return [(text, supervised) for text, supervised in [*parts, (whole[done:], False)] if text]

    def _turns(self, messages: list[dict[str, Any]], whole: str, tools) -> list[tuple[int, int]]:
        """Where the assistant's turns are in the rendering, by rendering beginnings of the conversation."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head = self.template.render(messages[:i], add_generation_prompt=True, tools=tools)
            upto = self.template.render(messages[: i + 1], tools=tools)
            what = f"chat template {self.template.name!r} cannot be masked exactly: turn {i + 1}"
            way_out = "Mark answers with {% generation %} in the template, or use another (data.chat_template)"
            if not (whole.startswith(upto) and upto.startswith(head)):
                raise DataError(f"{what} is rendered otherwise where the conversation goes on. {way_out}")
            answer = upto[len(head) :]
            before = self._before_content(answer, message)
            if before.strip():
                raise DataError(
                    f"{what} has {cut(repr(before))} before the answer, not in the generation prompt. {way_out}"
                )
            spans.append((len(head), len(head) + len(self._without_break(answer))))
        return spans

    def _before_content(self, answer: str, message: Mapping[str, Any]) -> str:
        """What stands in an answer's rendering before anything that the message says, its end left out."""
        content, reasoning = (str(message.get(key) or "").strip() for key in ("content", "reasoning_content"))
        if content:
            before = answer.partition(content)[0]
            return "" if reasoning and reasoning in before else before
        if reasoning or message.get("tool_calls"):
            return ""  # which the template spells in its own way
        answer = self._without_break(answer)
        ends = [token for token in self.tokenizer.special_tokens if answer.endswith(token)]
        return answer.removesuffix(max(ends, key=len)) if ends else answer

    def _without_break(self, answer: str) -> str:
        """The answer without white space behind the special token that ends the turn."""
        stripped = answer.rstrip()
        ends = self._special is not None and any(stripped.endswith(token) for token in self.tokenizer.special_tokens)
        return stripped if ends else answer

    def _guarded(self, value: Any) -> Any:
        """`value`, messages say, with a mark inside every special token that a text in it spells out."""
        if isinstance(value, str):
            plain = value.translate(MARKS)
            return plain if self._special is None else self._special.sub(_break_up, plain)
        if isinstance(value, Mapping):
            return {key: self._guarded(one) for key, one in value.items() if key != LEARN}
        return [self._guarded(one) for one in value] if isinstance(value, list | tuple) else value

    def _ids(self, text: str) -> np.ndarray:
        """The tokens of a part of a rendering, special tokens as such."""
        pieces = [text] if self._special is None else self._special.split(text)
        ids = [np.zeros(0, self.tokenizer.dtype)]
        for piece in filter(None, pieces):
            special = self.tokenizer.special_tokens.get(piece)
            plain = piece.replace(BROKEN, "")
            ids.append(self.tokenizer.encode(plain) if special is None else np.array([special], self.tokenizer.dtype))
        return np.concatenate(ids)


def _break_up(match: re.Match) -> str:
    return match[0][0] + BROKEN + match[0][1:]


def _unmarked(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendering without the marks of generation blocks, and where the blocks are in it."""
    text, spans, begin = "", [], 0
    for piece in re.split(f"([{BEGIN}{END}])", rendered):
        if piece == BEGIN:
            begin = len(text)
        elif piece == END:
            spans.append((begin, len(text)))
        else:
            text += piece
    return text, spans


def usable_inputs(lengths: np.ndarray, seq_len: int, is_supervised) -> np.ndarray:
    """The inputs of each conversation that training at `seq_len` uses: int64 [N], 0 for one that is left out.

    The rule: a conversation keeps its first seq_len inputs. If nothing supervised is left in them, it is left out.
    lengths: tokens of each. is_supervised(document, start, stop) -> bool [stop - start]; asked for those that are cut
    only.
    """
    usable = np.minimum(lengths - 1, seq_len)
    for document in np.flatnonzero(lengths - 1 > seq_len).tolist():
        if not is_supervised(document, 1, seq_len + 1).any():
            usable[document] = 0
    return usable
