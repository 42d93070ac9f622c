"""Chat templates: like Hugging Face's, and harmless."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from torchweld.decoding.chat import ChatError, Message, render_chat
from torchweld.models.builtin import find_builtin
from torchweld.models.errors import ModelFileError
from torchweld.models.gguf import read_gguf
from torchweld.models.safetensors import read_config
from torchweld.models.tokenizer import ChatTemplate, Tokenizer, check_template, tokenizer_from_folder
from torchweld.models.tokenizer_gguf import tokenizer_from_gguf

HELLO = [Message("user", "Hello"), Message("assistant", "Hi!"), Message("user", "<b>'\"\n")]


def tokenizer_with(source: str) -> Tokenizer:
    return Tokenizer(
        Path("m"), lambda: pytest.fail("not needed"), None, (), ChatTemplate(source, "<s>", "</s>")
    )


def builtin(name: str) -> Tokenizer:
    tokenizer = tokenizer_from_gguf(read_gguf(find_builtin(name)))
    assert tokenizer is not None
    return tokenizer


def test_smollm2() -> None:
    tokenizer = builtin("smollm2")
    text = render_chat(tokenizer, [Message("system", "Be brief."), Message("user", "Hi")])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text, rendered=True)
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_a_base_model_has_none() -> None:
    with pytest.raises(ChatError, match=r"has no chat template .* leave out --chat"):
        render_chat(builtin("gemma3"), HELLO)


# As models write them: Llama 2, Gemma, one with a date, one with tools, loop controls and a generation block.
TEMPLATES = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns "
    "must alternate') }}{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}\n{% for m in messages %}\n    {%- if (m['role'] == 'assistant') -%}\n        {%- set "
    "role = 'model' -%}\n    {%- else -%}\n        {%- set role = m['role'] -%}\n    {%- endif -%}\n    {{ "
    "'<start_of_turn>' + role + '\n' }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n    {{ '<start_of_turn>model\n' }}\n{%- endif -%}\n",
    "controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% generation %}{{ m | tojson }}"
    "{% endgeneration %}{% endfor %}{{ messages | tojson(indent=2) }}{% if tools is none %}!{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n * 2 }} {{ '-' * ns.n }} {{ 2 ** 3 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("start_answer", [True, False])
def test_like_hugging_face(name: str, start_answer: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utils.render_jinja_template(
        [[{"role": message.role, "content": message.content} for message in HELLO]],
        chat_template=TEMPLATES[name],
        add_generation_prompt=start_answer,
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer = tokenizer_with(TEMPLATES[name])
    assert render_chat(tokenizer, HELLO, add_generation_prompt=start_answer) == expected


def test_the_date() -> None:
    tokenizer = tokenizer_with("{{ strftime_now('%d %B %Y') }}")
    assert render_chat(tokenizer, [], now=lambda: datetime.datetime(2024, 7, 4)) == "04 July 2024"


def test_a_template_may_refuse() -> None:
    with pytest.raises(ChatError, match="does not take turns of user, user: turns must alternate"):
        render_chat(tokenizer_with(TEMPLATES["llama2"]), [HELLO[0]] * 2)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{% set x = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{{ 'a' * 10 ** 7 }}",
        "{{ 'ab' * 1000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ [1] * 99999999 }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ lookup.missing.deep }}",
        "{% if %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ '%s' % messages | first | nosuchfilter }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_and_broken_templates(source: str) -> None:
    with pytest.raises(ChatError, match=r"the chat template of m does not take turns of user") as caught:
        text = render_chat(tokenizer_with(source), [Message("user", "Hi")])
        pytest.fail(f"rendered {text[:200]!r}")
    assert len(str(caught.value)) < 1000


def folder(path: Path, config: dict[str, object], template: str | None = None) -> Tokenizer:
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (path / "config.json").write_text("{}", encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = tokenizer_from_folder(path, read_config(path))
    assert tokenizer is not None
    return tokenizer


def test_templates_of_folders(tmp_path: Path) -> None:
    assert folder(tmp_path, {}).chat is None
    found = folder(
        tmp_path, {"chat_template": "T", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    ).chat
    assert found == ChatTemplate("T", "<s>", "</s>")
    several = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    found = folder(tmp_path, {"chat_template": several, "eos_token": None}).chat
    assert found == ChatTemplate("B")
    assert folder(tmp_path, {"chat_template": "T"}, "from the file").chat == ChatTemplate("from the file")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelFileError, match="'chat_template' is 5"):
        folder(tmp_path, {"chat_template": 5})


def test_an_endless_template_is_refused() -> None:
    with pytest.raises(ModelFileError, match="a chat template of 2000000 characters"):
        check_template(Path("m"), "x" * 2_000_000)
