"""Finding a model's files and reading their headers. A leaf: no torch, no engine, no sockets of ours.

Shared by the tokenizer (router, CLI) and the weight loader (engine), so that both read one format in
one place.
"""
