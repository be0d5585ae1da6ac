"""A dialogue about a picture, word by word: python examples/dialogue.py PICTURE"""

import sys

import blip2

conversation = blip2.load("mini", parts=["generation"]).chat(sys.argv[1])
for question in ("what is in the picture?", "what colour is it?"):
    print(question, end=" ")
    for piece in conversation.stream(question):
        print(piece, end="", flush=True)
    print()
