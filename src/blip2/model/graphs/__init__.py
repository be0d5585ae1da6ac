"""The layers of an LLM, quantised or small, or of an image encoder, as LiteRT computes them on a CPU.

graph          a model file, signature by signature, and the products in it
weights        as they stand in it
runtime        runs it
attention      what stands between the products, PyTorch's
decoders, t5   OPT and Llama; T5
words          a token of a single row, through all layers with their attention
prompts        a prompt of one, where nothing was rounded
towers         image encoders with attention
convolutions   EfficientNet, quantised or not
taking_over    puts all that in the place of a network's layers
"""
