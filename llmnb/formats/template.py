# Written by `make export` from notebooks/5_modern/09_chat.py: edit that file.

"""Chat templates, rendered in a sandbox."""

__all__ = [
    "TEMPLATE_FILE", "chat_template", "find_template", "keep_template",
    "render_chat",
]


# imports of the template
from datetime import datetime
from pathlib import Path

from llmnb.files import package, read_json, read_small, write_whole
from llmnb.formats.checkpoint import find_model
from llmnb.formats.gguf import GGUFFile


# a model's template
TEMPLATE_FILE = "chat_template.jinja"


def chat_template(path):
    """The chat template of a model on disk: a text in Jinja's language.

    path: as for llmnb.load. It lies in a GGUF file, in chat_template.jinja
    or in tokenizer_config.json. Raises ValueError when the model has none:
    then it is one that continues texts, and does not talk.

    Derived in chapter 5.9.
    """
    found = find_template(path)
    if found is None:
        raise ValueError(
            f"{path}: has no chat template, so it continues texts and does "
            "not talk: use llmnb generate"
        )
    return found


def find_template(path):
    """As chat_template, but None where the model has none.

    Derived in chapter 5.9.
    """
    file = find_model(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no model {path}")
    if file.suffix == ".gguf":
        found = GGUFFile(file).get("tokenizer.chat_template")
    else:
        found = _beside(file.parent)
    return found if found and isinstance(found, str) else None


def _beside(folder):
    own = folder / TEMPLATE_FILE
    if own.is_file():
        try:
            return read_small(own, 1 << 20).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{own}: not a text ({error})") from None
    said = folder / "tokenizer_config.json"
    found = read_json(said, 1 << 24) if said.is_file() else {}
    found = found.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [x for x in found if isinstance(x, dict)]
        usual = [x for x in named if x.get("name") == "default"]
        found = usual[-1].get("template") if usual else None
    return found


# keep a template
def keep_template(template, folder):
    """Write a chat template into a folder, as chat_template.jinja.

    None removes one that was kept there before.

    Derived in chapter 5.9.
    """
    kept = Path(folder, TEMPLATE_FILE)
    if template is None:
        kept.unlink(missing_ok=True)
    else:
        write_whole(kept, template.encode())


# render it
def render_chat(template, messages, bos="", eos=""):
    """The text in which a model expects a conversation, up to its answer.

    template: as chat_template gives it. messages: dicts with role (system,
    user or assistant) and content. bos, eos: the texts of the tokens by
    which a text begins and ends. Templates come with models from anywhere, so
    they run in Jinja's sandbox. Raises ValueError when one asks for what the
    sandbox forbids, refuses the messages, or is no template.

    Derived in chapter 5.9.
    """
    sandbox = _sandbox()
    given = {"messages": messages, "add_generation_prompt": True}
    given |= {"bos_token": bos, "eos_token": eos}
    # as transformers says that there are none: templates ask "is not none"
    given |= {"tools": None, "documents": None}
    try:
        return sandbox.from_string(template).render(given)
    except Exception as error:  # a template is a program: it may fail anyhow
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template fails: {why:.200}") from None


# the sandbox
def _sandbox():
    """Jinja's sandbox, with the two functions that templates may call."""
    jinja = package("jinja2.sandbox", "modern", "a chat")

    def refuse(message):
        raise ValueError(message)

    def forbid(x, name):
        kind = type(x).__name__
        raise jinja.SecurityError(f"it asks for {name!r:.80} of a {kind}")

    made = jinja.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )  # fmt: skip
    made.unsafe_undefined = forbid  # Jinja's own says nothing, and goes on
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made
