"""Write a conversation as the model wants it: its own Jinja template, in a sandbox.

    render_chat(tokenizer, [Message("user", "Hello")])
    # <|im_start|>user
    # Hello<|im_end|>
    # <|im_start|>assistant

Templates come with models from strangers. They see texts and nothing else, cannot change what they see, reach no
attribute with an underscore, loop over at most 100,000 numbers (Jinja's own limits) and multiply nothing long.
Filters and functions are those of Hugging Face's `apply_chat_template`, which templates are written for.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Final, NoReturn

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchweld.models.tokenizer import ChatTemplate, Tokenizer

_LARGEST_PRODUCT: Final = 1 << 20
_LARGEST_POWER: Final = 64


class ChatError(ValueError):
    """A conversation that cannot be written: the model has no template, or its template refuses or fails."""


@dataclass(frozen=True)
class Message:
    """One turn. role: "system", "user" or "assistant" (a template may know others)."""

    role: str
    content: str


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    now: Callable[[], datetime.datetime] = datetime.datetime.now,
) -> str:
    """The text of a conversation, up to where the model's answer begins; encode it with `rendered=True`.

    add_generation_prompt: end with the beginning of an answer. now: the time, for templates that write the date.
    Raises ChatError where there is no template, and where it does not take this conversation.
    """
    if tokenizer.chat is None:
        raise ChatError(
            f"{tokenizer.path} has no chat template (it may be a base model that was not trained to converse); "
            "expected tokenizer.chat_template in the file or chat_template in tokenizer_config.json: "
            "leave out --chat, or write the turns into the prompt yourself"
        )
    turns = [asdict(message) for message in messages]
    return _render(tokenizer, tokenizer.chat, turns, add_generation_prompt, now)


def _render(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    turns: list[dict[str, str]],
    add_generation_prompt: bool,
    now: Callable[[], datetime.datetime],
) -> str:
    environment = _environment(now)
    try:
        return environment.from_string(template.source).render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=template.bos_token,
            eos_token=template.eos_token,
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        line = getattr(error, "lineno", None)
        place = f" (line {line})" if line else ""
        roles = ", ".join(turn["role"] for turn in turns)
        raise ChatError(
            f"the chat template of {tokenizer.path} does not take turns of {roles or 'nobody'}{place}: {reason}"
        ) from None


def _environment(now: Callable[[], datetime.datetime]) -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which "a" * 10 ** 12 and 10 ** 10 ** 10 are refused as well."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """`left * right` or `left ** right`, if that is no large thing."""
        sizes = [
            n if isinstance(n, int | float) else len(n)
            for n in (left, right)
            if isinstance(n, Sized | int | float)
        ]
        largest = max(map(abs, sizes), default=0)
        if largest > _LARGEST_PRODUCT or (operator == "**" and largest > _LARGEST_POWER):
            raise SecurityError(f"a product or power of {largest}")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, Sized) and len(result) > _LARGEST_PRODUCT:
            raise SecurityError(f"a product of {len(result)} elements")
        return result


class _Generation(Extension):
    """`{% generation %}` marks the model's own words for training; the text is what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> list[Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
