"""The layers of a quantised LLM as graphs that ONNX Runtime computes on a CPU.

graph          a graph, step by step, and its session
layers         what layers are made of, as steps
feeds          masks, and keys and values with their room, as a graph is fed them
decoders, t5   OPT and Llama; T5
taking_over    puts graphs in the place of a network's layers
"""
