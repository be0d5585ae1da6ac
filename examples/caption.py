"""Captions a picture and asks about it: python examples/caption.py PICTURE"""

import sys

import blip2

model = blip2.load("mini")
image = sys.argv[1]
print(model.caption(image))
print(model.ask(image, "what is in the picture?"))
print(model.ask(image, "what colour is it?", answers=["red", "green", "blue", "yellow"]))
