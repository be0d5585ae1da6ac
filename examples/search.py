"""Finds the pictures that fit a text best: python examples/search.py "a red cup" PICTURE..."""

import sys

import blip2

text, *pictures = sys.argv[1:]
model = blip2.load("mini", parts=["stage1"])
image_embeds = model.embed_images(pictures)  # (B, queries, width)
text_embed = model.embed_texts(text)[0]  # (width,)
similarity = (image_embeds @ text_embed).max(axis=1)  # (B,): that of the best query
for i in similarity.argsort()[::-1][:5]:
    print(f"{similarity[i]:.3f}  {pictures[i]}")
