"""Speculative decoding that changes no bit: guesses for the next tokens, verified in one step.

Tokens are drawn with noise(seed, position), so what a position's token is does not depend on how it was
guessed. A draft is accepted if and only if it equals the token that is drawn in its place; what follows a
wrong one is thrown away. So a proposer decides about speed alone.
"""
