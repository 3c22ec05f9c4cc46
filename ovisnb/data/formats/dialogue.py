"""Who says what in a row: its messages, under whatever keys they stand.

    used, messages = dialogue({"query": "2 + 2?", "response": "4", "system": "Count."})
    used, [(message.role, message.said["content"]) for message in messages]
    # (('query', 'response', 'system'), [('system', 'Count.'), ('human', '2 + 2?'), ('gpt', '4')])

- `messages` or `conversations` of role/content, or of from/value where the row has what the record form has not
  (`images`, `system`, ...: LLaMA-Factory's ShareGPT form); there also a `chosen` answer, to what is then its prompt.
- `prompt` and `completion` or `response`, `query` and `response`, `instruction` (and `input`) and `output`: text or lists
  of messages. The assistant's turns of a prompt carry no loss.
- `prompt` and `chosen`, or `chosen` alone, which then begins with the prompt; also where both have the prompt.
- `texts` of `{"user", "assistant"}` pairs, also with `system`.
- `system` or `system_prompt` of a row is its first message.

A row whose answer KTO marks as bad (`label` or `kto_tag` false) is refused.

What the keys of a message mean, `ovisnb.data.keys` says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ovisnb.data.formats.parts import short
from ovisnb.data.keys import holds, role_of, told, unread
from ovisnb.data.record import Note, RecordError

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ROLES = {"system": "system", "user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "model": "gpt"}
_ROLES |= {"developer": "system", "tool": "tool", "ignored_gpt": "ignored_gpt"}
_SHARED, _ANSWERED = ("role", "content"), ("role", "content", "tool_calls", *THOUGHTS)
_NAMES = {"from": "role", "value": "content"}
_QUESTIONS = {"prompt": ("completion", "response"), "query": ("response",), "instruction": ("output",)}
"""Keys of a question, and those of its answer."""
_SYSTEM = ("system", "system_prompt")


class Message(NamedTuple):
    """One message."""

    where: str
    """Its place, for an error."""
    role: str
    """The record's role, or "tool"."""
    said: dict[str, Any]
    """`content`, and of an answer `tool_calls` and the keys of `THOUGHTS`."""
    notes: list[Note]


def matches(row: dict[str, Any]) -> bool:
    """Whether a row has a question, an answer or messages under one of the keys above."""
    if "messages" in row or "prompt" in row or {"chosen", "rejected"} <= row.keys():
        return True
    if {"query", "response"} <= row.keys() or {"instruction", "output"} <= row.keys():
        return True
    listed = row.get("conversations")
    return _first_has(listed, "role") or _first_has(listed, "from") or _first_has(row.get("texts"), "user")


def dialogue(row: dict[str, Any]) -> tuple[tuple[str, ...], list[Message]]:
    """-> (the keys that are read, the messages); RecordError, one sentence."""
    used, messages = _messages(row)
    for key in ("label", "kto_tag"):
        value = row.get(key)
        bad = value is False or ("completion" in row and str(value).strip().lower() in ("false", "0"))
        if bad and any(message.role == "gpt" for message in messages):
            said = f"its `{key}` is {str(value).lower()}, which marks an answer that is not to be learnt: drop the row"
            raise RecordError(said, kind="no_answer")
    system = [key for key in _SYSTEM if holds(row.get(key))]
    if len(system) + (bool(messages) and messages[0].role == "system") > 1:
        raise RecordError(f"the row has `{system[0]}` and another system message: keep one")
    first = [Message(f"`{key}`", "system", {"content": row[key]}, []) for key in system]
    return (*used, *system), first + messages


def _messages(row: dict[str, Any]) -> tuple[tuple[str, ...], list[Message]]:
    for key in ("messages", "conversations"):
        if row.get(key) is not None and isinstance(row.get("chosen"), dict):
            return (key, "chosen"), _of(row[key], key, "ignored_gpt") + _of([row["chosen"]], "chosen")
        if row.get(key) is not None:
            return (key,), _of(row[key], key)
    if row.get("texts") is not None and "prompt" not in row:
        return ("texts",), _of(_from_pairs(row["texts"]), "texts")
    asked = next((key for key in _QUESTIONS if row.get(key) is not None), "prompt")
    answer = next((key for key in _QUESTIONS[asked] if row.get(key) is not None), None)
    prompt, used = row.get(asked), (asked,)
    if asked == "instruction" and holds(row.get("input")):
        if not isinstance(prompt, str) or not isinstance(row["input"], str):
            raise RecordError("`instruction` and `input` are not both text: write them as `messages`")
        prompt, used = "\n".join(filter(None, (prompt, row["input"]))), (asked, "input")
    if answer is None and row.get("chosen") is not None:
        answer = "chosen"
        if not isinstance(prompt, list) and _begins_with_prompt(row[answer]):
            return (answer,), _of(row[answer], answer)
        if prompt is None:
            raise RecordError("`chosen` is only an answer, and there is no `prompt` that it answers: give one")
    if prompt is None:  # refused under the key that was given
        _of(None, next((key for key in ("messages", *_QUESTIONS, "chosen", "texts") if key in row), asked))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if answer is None:
        return (asked, *_QUESTIONS[asked]), _of(prompt, asked)
    completion = row[answer]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(completion, list) and isinstance(prompt, list) and prompt and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]  # the prompt once more
    if _begins_with_prompt(completion):
        raise RecordError(f"`{answer}` begins with a question, and not with an answer to `{asked}`: keep the answer")
    return (*used, answer), _of(prompt, asked, "ignored_gpt") + _of(completion, answer)


def _begins_with_prompt(answer: Any) -> bool:
    """Whether messages begin with what is said to the assistant."""
    first = answer[0] if isinstance(answer, list) and answer else None
    said = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(said, str) and _ROLES.get(said) in ("system", "human")


def _of(messages: Any, key: str, answer: str = "gpt") -> list[Message]:
    """The messages under a key; the assistant's get the role `answer`."""
    if not isinstance(messages, (list, tuple)):
        raise RecordError(f'`{key}` is a list of messages: write [{{"role": "user", "content": "..."}}]')
    found = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of `{key}`"
        try:
            found.append(_message(message, where, answer))
        except RecordError as error:
            raise error.at(where) from None
    return found


def _message(message: Any, where: str, answer: str) -> Message:
    if isinstance(message, dict) and "role" not in message:
        message = {_NAMES.get(key, key): value for key, value in message.items()}
    if not isinstance(message, dict) or message.keys().isdisjoint(_ANSWERED[1:]):
        raise RecordError('it is not of the form {"role": ..., "content": ...}')
    said = message.get("role")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        told_so = f"it has the role {short(said)}: use system, user, assistant or tool"
        raise RecordError(told_so, kind="unknown_role")
    role = role_of(message, answer if role == "gpt" else role)
    read = _ANSWERED if role in ("gpt", "ignored_gpt") else _SHARED
    notes = told(unread(message, read), where)
    return Message(where, role, {key: message.get(key) for key in read}, notes)


def _from_pairs(pairs: Any) -> list[dict]:
    """`texts` of user and assistant pairs -> messages; what else a pair holds is said of its answer."""
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise RecordError('`texts` is a list of pairs: write [{"user": ..., "assistant": ...}]')
    found: list[dict] = []
    for pair in pairs:
        rest = {key: value for key, value in pair.items() if key not in ("system", "user", "assistant")}
        system = {"system": pair["system"]} if holds(pair.get("system")) else {}
        said = system | {role: pair[role] for role in ("user", "assistant") if pair.get(role) is not None}
        found += [{"role": role, "content": text} for role, text in said.items()]
        if found:
            found[-1] = rest | found[-1]
    return found


def _first_has(listed: Any, key: str) -> bool:
    return isinstance(listed, list) and bool(listed) and isinstance(listed[0], dict) and key in listed[0]
