"""What rows of conversations say beside roles and contents: honoured, given to the template, or counted and said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_loader import CountingSource

from conf.schema import SourceConfig
from data.conversations import ConversationReader, from_json
from data.errors import DataError
from data.loader import Loader
from data.sft import NAMED, ChatEncoder, ChatTemplate
from data.text import Documents, find_files
from data.tokenizer import load_tokenizer

TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}({{ m.tool_call_id }}): "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.reasoning_content }}|{{ m.content }}|"
    "{{ (m.tool_calls or []) | tojson }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


def read(row, template=NAMED["plain"]):
    """(messages, tools, what was said) of a row."""
    said = []
    reader = ConversationReader(SourceConfig(format="chat"), template)
    text = reader.read(row, "x.jsonl, conversation 0")
    reader.report(said.append)
    return (*(from_json(text) if text else (None, None)), said)


def supervised(messages, template=NAMED["plain"], tools=None):
    encoder = ChatEncoder(load_tokenizer("bytes"), ChatTemplate("x", template, (("eos_token", "</s>"),)))
    return [text for text, is_supervised in encoder.parts(messages, tools) if is_supervised]


def talk(*answers):
    return {"messages": [one for answer in answers for one in ({"role": "user", "content": "q"}, answer)]}


def answer(content, **more):
    return {"role": "assistant", "content": content} | more


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_flags_are_honoured(flag):
    """Catches a turn that the data says not to learn, supervised."""
    messages, _, said = read(talk(answer("no", **flag), answer("yes", weight=1, train=True)))
    assert said == [] and supervised(messages) == [" yes</s>"]
    assert read(talk(answer("no", **flag)))[2] == ["left out 1 conversations without an assistant's turn to learn"]
    with pytest.raises(DataError, match=r"weight=0\.5: a turn is supervised"):
        read(talk(answer("x", weight=0.5)))


def test_templates_get_what_they_name_and_the_rest_is_counted():
    """Catches tools, calls and thoughts dropped without a word."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    row = talk(answer("", tool_calls=[call], reasoning_content="hm")) | {"tools": json.dumps([{"name": "f"}])}
    row["messages"].append({"role": "tool", "content": "4", "tool_call_id": "c1", "when": "now"})
    messages, tools, said = read(row, TOOLS)
    assert tools == [{"name": "f"}] and said == ["left out 1 times 'when' of a message: no key of a message here"]
    encoder = ChatEncoder(load_tokenizer("bytes"), ChatTemplate("x", TOOLS))
    whole = "".join(text for text, _ in encoder.parts(messages, tools))
    assert '[{"name": "f"}]' in whole and "tool(c1): 4" in whole
    assert supervised(messages, TOOLS, tools) == ["hm||" + json.dumps([call])]

    _, tools, said = read(talk(answer("x", reasoning_content="hm", tool_call_id="1")) | {"tools": [{"name": "f"}]})
    assert tools is None and len(said) == 3 and all("the chat template has no place for" in line for line in said)
    with pytest.raises(DataError, match="tool_calls cannot be trained on with this chat template"):
        read(talk(answer(None, tool_calls=[call])))


def test_an_empty_answer_does_not_train_what_the_template_adds():
    """Catches a template's own thoughts supervised in front of an answer that is empty; the others are refused
    already."""
    qwen = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for content in ("", "x"):
        with pytest.raises(DataError, match="before the answer"):
            supervised(talk(answer(content))["messages"], qwen)
    assert supervised(talk(answer(""))["messages"]) == [" </s>"]


def test_rows_without_text_are_counted(tmp_path):
    """Catches rows dropped without a word, and documents of white space."""
    rows = [{"text": "a"}, {"text": None}, {"other": 1}, {"text": " \n"}, {"text": ""}, {"text": "b"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, said = Documents(SourceConfig()), []
    assert list(documents.of_files([tmp_path / "x.jsonl"])) == [("0", "a"), ("5", "b")]
    documents.report(said.append)
    assert said == ["left out 4 of 6 rows without text (missing, null, empty or only white space)"]


@pytest.mark.parametrize("name", ["a.csv", "b.PDF", "c.tsv.gz", "d.docx"])
def test_what_is_no_text_is_refused_by_name(tmp_path, name):
    """Catches a table or a PDF read as text, and one in a glob with others."""
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{name}.* cannot be read: documents are jsonl, parquet or text"):
        find_files(str(tmp_path / name))


class Talks(CountingSource):
    """Conversations, a part of them far longer than the length trained at."""

    is_chat = True

    def usable_inputs(self, seq_len):
        return np.minimum(self.lengths - 1, seq_len)

    def supervised(self, document, start, length):
        return np.ones(min(length + 1, int(self.lengths[document]) - start), bool)

    def window(self, document, start, length):
        return self.tokens(document, start, min(start + length + 1, int(self.lengths[document])))


def test_a_mixture_keeps_its_shares_where_conversations_are_cut():
    """Catches weights from whole conversations, of which a part alone is trained on: 15 of 100 tokens instead of 50."""
    rng = np.random.default_rng(0)
    text = CountingSource("text", rng.integers(20, 60, 400).tolist())
    talks = Talks("talks", np.where(rng.random(400) < 0.25, 900, rng.integers(20, 60, 400)).tolist())
    loader = Loader({"text": text, "talks": talks}, seed=0)
    loader.set_stage(seq_len=64, batch_tokens=640, micro_tokens=64, mix={"text": 1, "talks": 1})
    tokens = {"text": 0, "talks": 0}
    for _ in range(60):
        for batch in loader.next_step():
            for window in batch.windows:
                source = {"text": text, "talks": talks}[window.source]
                tokens[window.source] += max(
                    0, min(window.length, int(source.lengths[window.document]) - 1 - window.start)
                )
    assert tokens["talks"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.04)


def test_common_shapes_are_recognised_and_named():
    """Catches ShareGPT and Alpaca rows refused, roles that are swapped, an input that is lost, flags that no longer
    count, and a shape that is guessed without a word."""
    turns = [
        {"from": "system", "value": "be short"},
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "5", "weight": 0},
        {"from": "human", "value": "no"},
        {"from": "gpt", "value": "4"},
    ]
    messages, _, said = read({"id": 7, "conversations": turns})
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "be short"),
        ("user", "2+2?"),
        ("assistant", "5"),
        ("user", "no"),
        ("assistant", "4"),
    ]
    assert supervised(messages) == [" 4</s>"] and said == ["1 rows read as ShareGPT conversations (from, value)"]
    messages, _, said = read({"instruction": "Add.", "input": "2, 2", "output": "4"})
    assert [m["content"] for m in messages] == ["Add.\n\n2, 2", "4"]
    assert said == ["1 rows read as Alpaca instructions (instruction, input, output)"]
    assert read({"instruction": "Say hi.", "input": "", "output": "hi"})[0][0]["content"] == "Say hi."
    with pytest.raises(DataError, match=r"from=narrator in a row of conversations\. Known are human"):
        read({"conversations": [{"from": "narrator", "value": "x"}]})
    with pytest.raises(DataError, match="role and a content, both text"):
        read({"conversations": [{"from": "gpt"}]})
