"""Chat templates come from strangers and run in a sandbox."""

import json

import pytest
from fuzz import refused
from llamas import CHATML, write_gguf

from llmnb.formats.template import chat_template, render_chat

pytest.importorskip("jinja2")
HELLO = [{"role": "user", "content": "hello"}]


def test_transformers_renders_the_same(tmp_path):
    """With what templates of published models use."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    template = (
        "{{ bos_token }}\n{%- set start = 0 %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {{- messages[0].content | trim }}\n"
        "    {%- set messages = messages[1:] %}\n{%- endif %}\n"
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'nobody' %}{% continue %}{% endif %}\n"
        "    {{- '[' + m.role + '] ' + m.content.strip() + eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if tools is not none %}[tools]{% endif %}"
        "{%- if add_generation_prompt is defined %}{{ '[answer]' }}{% endif %}"
    )
    model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, "<s>")
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), **ends
    )
    messages = [{"role": "system", "content": " be brief "}, *HELLO]
    messages += [{"role": "nobody", "content": "?"}]
    how = {"tokenize": False, "add_generation_prompt": True}
    want = theirs.apply_chat_template(messages, chat_template=template, **how)
    assert render_chat(template, messages, "<s>", "</s>") == want
    assert want.endswith("hello</s>[answer]")


def test_there_are_no_tools_and_no_documents():
    """They are defined, as transformers defines them."""
    asked = "{{ tools is not none }} {{ documents is not none }}"
    assert render_chat(asked, HELLO) == "False False"


@pytest.mark.parametrize(("template", "says"), [
    ("{{ ''.__class__ }}", "asks for '__class__' of a str"),
    ("{{ messages.__class__.__mro__ }}", "asks for '__class__'"),
    ("{{ ''['__class__'] }}", "asks for '__class__'"),
    ("{{ (''|attr('__class__')).__mro__ }}", "asks for '__class__'"),
    ("{{ raise_exception.__globals__ }}", "asks for '__globals__'"),
    ("{{ messages.append(1) }}", "asks for 'append' of a list"),
    ("{{ messages[0].update(role='x') }}", "asks for 'update'"),
    ("{{ '{0.__class__}'.format(1) }}", "asks for '__class__' of a int"),
    ("{% for i in range(10**9) %}{% endfor %}", "too big"),
    ("{{ raise_exception('no system here') }}", "no system here"),
    ("{{ messages[5].content }}", "has no (element|attribute)|no element"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ strftime_now(7) }}", "must be str"),
    ("{% if %}", "fails: Expected an expression"),
    ("{{ x", "fails: "),
    ("{% include 'passwd' %}", "no loader"),
    ("{% import os %}", "fails: "),
])  # fmt: skip
def test_what_fails_or_is_forbidden_is_one_error(template, says):
    with pytest.raises(ValueError, match=says) as error:
        render_chat(template, HELLO)
    assert "the chat template fails" in str(error.value)
    assert "\n" not in str(error.value)
    assert HELLO == [{"role": "user", "content": "hello"}]


def folder(tmp_path, **said):
    """A model folder, of whose weights nothing is read."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    return tmp_path


def named(name, template):
    return {"name": name, "template": template}


def test_a_template_is_found_where_it_lies(tmp_path):
    assert chat_template(folder(tmp_path, chat_template="A")) == "A"
    several = [named("tool_use", "T"), named("default", "D")]
    assert chat_template(folder(tmp_path, chat_template=several)) == "D"
    own = tmp_path / "chat_template.jinja"  # which transformers 5 writes
    own.write_text("own")
    assert chat_template(tmp_path) == "own"
    own.write_bytes(b"\xff\xfe")
    refused("chat_template.jinja", chat_template, tmp_path)


def test_a_template_is_found_in_a_gguf(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"tokenizer.chat_template": CHATML})
    assert chat_template(path) == CHATML
    with pytest.raises(ValueError, match="has no chat template"):
        chat_template(write_gguf(tmp_path / "b.gguf", {}))


NONE = [
    None, 7, "", ["T"], [named("tool_use", "T")], [named("default", 7)],
    [named(["default"], "T")],
]  # fmt: skip


@pytest.mark.parametrize("said", [{}, *({"chat_template": x} for x in NONE)])
def test_a_model_without_a_template_does_not_talk(said, tmp_path):
    path = folder(tmp_path, **said)
    refused("has no chat template.*llmnb generate", chat_template, path)
