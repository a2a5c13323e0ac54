"""What the server refuses before it does anything: each with a status, one sentence and a code, as OpenAI's API has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

#: Fields that would change an answer, and that transformers' server leaves out of account; by their value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "previous_response_id": (),
    "background": (False,),
    "truncation": ("disabled",),
    "generation_config": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "reasoning_effort": (),
    "reasoning": ({},),
    "web_search_options": (),
    "moderation": (),
    "image": (),
    "include": ([],),
    "text": ({}, {"format": {"type": "text"}}),
    "conversation": (),
    "context_management": (),
    "max_tool_calls": (),
    "parallel_tool_calls": (True,),
}
#: Fields that are served.
_SERVED = {
    "chat_template_kwargs", "frequency_penalty", "input", "instructions", "logit_bias", "max_completion_tokens",
    "max_output_tokens", "max_tokens", "messages", "model", "prompt", "seed", "stop", "stream", "temperature", "tools", "top_p",
}  # fmt: skip
#: Fields without which an answer is the same.
_IDLE = {
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "stream_options", "user",
}  # fmt: skip
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_TEXT_PARTS = ("text", "input_text", "output_text")
#: The sharpest sampling that differs from taking the likeliest token, in float32.
_COLDEST = 1e-3
_MOST_BIAS = 100


class Refused(Exception):
    """A request that is not served, as its answer says it."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request", param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


def answer(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of a refusal."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def check_fields(body: dict[str, Any], name: str, known: Collection[str], vocabulary: int) -> None:
    """Raises `Refused` if a field asks for another model, for what is not done here, or for no sensible number.

    Fields that are null, which are as if they were not there, are taken out.

    Args:
        name: of the model.
        known: fields that requests of this kind may have.
        vocabulary: tokens of the model.
    """
    for field in [*body]:
        if field not in known or not (field in _SERVED or field in _IDLE or field in _NEUTRAL):
            raise Refused(f"{field[:100]} is not served by this route. Leave it out.", param=field[:100])
        if body[field] is None or (field == "logit_bias" and body[field] == {}):
            del body[field]
    asked = body.get("model")
    if asked is not None and asked != name:
        raise Refused(f"This server has one model, {name!r}. Ask for it, or for none.", 404, "model_not_found", "model")
    for field, neutral in _NEUTRAL.items():
        value = body.get(field)
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            raise Refused(f"{field} is not served here. Leave it out.", param=field)
    for field in _LIMITS:
        _number(body, field, int, 1, 2**31 - 1)
    _number(body, "seed", int, -(2**63), 2**63 - 1)
    _number(body, "frequency_penalty", float, -0.99, 10)
    _number(body, "temperature", float, 0, 100)
    _number(body, "top_p", float, 0, 1)
    if body.get("top_p") == 0:
        body["top_p"] = None
        body["temperature"] = 0
    if (body.get("temperature") or 1) < _COLDEST:
        body["temperature"] = 0
    if not isinstance(body.get("stream", False), bool | None):
        raise Refused("stream must be true or false.", param="stream")
    _check_stop(body.get("stop"))
    _check_bias(body.get("logit_bias"), vocabulary)
    for field in ("prompt", "instructions"):
        if not isinstance(body.get(field, ""), str | None):
            raise Refused(f"{field} must be a text.", param=field)
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused("tools must be a list of objects.", param="tools")
    if not _is_text(body):
        raise Refused("The request holds text that is not Unicode (half of a surrogate pair).")


def check_chat(messages: Callable[[], list[dict[str, Any]]], body: dict[str, Any], tokenizer: Any) -> str:
    """The text that the checkpoint's chat template makes of messages.

    Raises:
        Refused: they are none, hold more than text, or the template does not take them, or the tools beside them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            "This model has no chat template. Ask /v1/completions, with the whole prompt.", code="no_template"
        )
    if body.get("tools") and "tools" not in str(tokenizer.chat_template):
        raise Refused("This model's chat template has no place for tools. Leave them out.", param="tools")
    more = body.get("chat_template_kwargs", {})
    taken = set(inspect.signature(type(tokenizer).apply_chat_template).parameters)
    if not isinstance(more, dict) or taken & set(more):
        raise Refused(
            "chat_template_kwargs must be an object of the template's own names.", param="chat_template_kwargs"
        )
    given = body.get("messages", body.get("input"))
    if not isinstance(given, str) and not (
        given and isinstance(given, list) and all(isinstance(m, dict) for m in given)
    ):
        raise Refused("Give messages: a list of objects with role and content.", param="messages")
    if isinstance(given, list) and (odd := _not_text(given)):
        raise Refused(f"This model takes text, and a message holds {odd!r}.", param="messages")
    try:
        return str(
            tokenizer.apply_chat_template(
                messages(), add_generation_prompt=True, tools=body.get("tools"), tokenize=False, **more
            )
        )
    except Refused:
        raise
    except Exception as error:
        said = str(error) if type(error).__module__.startswith("jinja2") else type(error).__name__
        raise Refused(f"The chat template does not take these messages ({said}).", param="messages") from None


def _number(body: dict[str, Any], field: str, kind: type, least: float, most: float) -> None:
    value = body.get(field)
    if value is None:
        return
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not least <= value <= most:  # nor is NaN between them
        what = "a whole number" if kind is int else "a number"
        raise Refused(f"{field} must be {what} from {least} to {most}.", param=field)


def _check_stop(stop: Any) -> None:
    words = [stop] if isinstance(stop, str) else stop
    if words is None:
        return
    if not isinstance(words, list) or len(words) > 16 or not all(isinstance(w, str) and w for w in words):
        raise Refused("stop must be a text, or a list of up to 16; none of them empty.", param="stop")


def _check_bias(bias: Any, vocabulary: int) -> None:
    if bias is None:
        return
    fits = isinstance(bias, dict) and all(
        key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary
        and isinstance(value, int | float) and not isinstance(value, bool) and -_MOST_BIAS <= value <= _MOST_BIAS
        for key, value in bias.items()
    )  # fmt: skip
    if not fits:
        raise Refused(
            f"logit_bias must be an object of token numbers below {vocabulary} and what to add to their logits, from "
            f"-{_MOST_BIAS} to {_MOST_BIAS}.",
            param="logit_bias",
        )


def _not_text(messages: list[dict[str, Any]]) -> str | None:
    """The type of a content part that is no text."""
    for message in messages:
        parts = message.get("content")
        for part in [*(parts if isinstance(parts, list) else []), *([message] if "role" not in message else [])]:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in _TEXT_PARTS and "role" in message:
                return str(kind)
            if kind in ("input_image", "input_file", "input_audio"):
                return str(kind)
    return None


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, dict):
        return all(_is_text(key) and _is_text(one) for key, one in value.items())
    return all(map(_is_text, value)) if isinstance(value, list) else True
