"""A text file to a model that writes, in Python. Run it: python examples/language_model.py TEXT.txt OUT_FOLDER"""

import sys

import torch

import unrolled
from unrolled.progress import open_bar


def main(text: str, out: str, **settings: object) -> None:
    # Train, with the state carried from window to window; the last tenth of the text is held out.
    model = unrolled.train(text, out, watcher=open_bar(), **settings)
    print(model.form)  # text -> next: many-to-many, aligned, autoregressive (language model)

    # Measure, on any text.
    result = unrolled.evaluate(model, text, lanes=32)
    print(f"{result.nats_per_char:.3f} nats, {result.bits_per_char:.3f} bits per character")

    # Write; the text comes piece by piece.
    model = unrolled.load(out)
    for piece in unrolled.generate(model, prompt="The ", length=200, temperature=0.8, seed=1):
        print(piece, end="", flush=True)
    print()

    # Or step by step: a state is a value, so a model can be stopped, copied and gone on with anywhere.
    state = model.begin()
    for symbol in torch.tensor(model.vocabulary.encode("The").tolist()):
        scores, state = model.step(symbol[None], state)
    likeliest = scores[0].topk(3).indices.tolist()
    print("after 'The':", [model.vocabulary.name(symbol) for symbol in likeliest])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], cell="gru", hidden=128, layers=1, epochs=1)
